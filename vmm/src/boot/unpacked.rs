//! Boots a bzImage's kernel without the bzImage: unpacked on the host, and put at an address of chance as its own
//! decompressor does (Documentation/arch/x86/boot.rst; arch/x86/boot/compressed/kaslr.c).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use api::units::Bytes;
use image::kernel::placement::Places;
use image::kernel::prepared::{PreparedKernel, Shape};
use image::kernel::{has_value, has_word};
use image::{BootFile, Unpacking};
use linux_loader::loader::bootparam::setup_header;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, VolatileSlice};

use super::kernel::{
    Boot, Entry, KernelError, check_kernel_fits, load_initrd, read_error, write_error, write_zero_page,
};
use crate::arch::x86_64::layout::{self, MapEntry};

/// Where a bzImage's setup header is.
const SETUP_HEADER: u64 = 0x1f1;
/// In `loadflags`: the kernel's address is one of chance, so that it chooses those of its memory maps by chance too.
const KASLR_FLAG: u8 = 1 << 1;
/// Words that take memory from the kernel. It is where it is linked then, which is below what they take.
const MEMORY_WORDS: [&str; 2] = ["mem", "memmap"];

/// The kernel in a bzImage, unpacked. `None` where it has to unpack itself, or is no bzImage.
///
/// To be called before the guest has memory: what unpacking takes is given back by then.
pub fn prepare(file: &BootFile, unpacking: &Unpacking) -> Option<PreparedKernel> {
    // Of what can be opened only once, or is none, whoever loads it tells.
    if !file.is_file() {
        return None;
    }
    match file.open().map_err(image::Error::Read).and_then(|file| unpacking.prepare(&file)) {
        Ok((kernel, origin)) => {
            tracing::debug!("the kernel starts unpacked: {origin}");
            Some(kernel)
        }
        Err(why) => {
            tracing::debug!("the kernel is booted as it is: {why}");
            None
        }
    }
}

/// Loads the unpacked `kernel` of the bzImage `file`. `None` where that can't be done: the guest's memory is as
/// it was then.
///
/// # Errors
/// As [`super::kernel::load`].
pub(super) fn load(
    boot: &Boot<'_>,
    file: &mut File,
    kernel: &PreparedKernel,
    memory: &GuestMemoryMmap,
    size: Bytes,
) -> Result<Option<Entry>, KernelError> {
    let shape = kernel.shape();
    check_kernel_fits(Bytes(shape.base + shape.size), size)?;
    let mut header = setup_header::default();
    file.seek(SeekFrom::Start(SETUP_HEADER))
        .and_then(|_| file.read_exact(header.as_mut_slice()))
        .map_err(|error| read_error("kernel", boot.kernel.name(), error))?;
    let highest = Bytes(u64::from(header.initrd_addr_max).saturating_add(1).min(layout::HOLE.start));
    let initrd = load_initrd(boot.initrd, memory, size, Bytes(shape.base + shape.size), highest)?;
    let map = layout::memory_map(size, boot.reserved.clone());
    let taken = initrd.map(|initrd| initrd.start.0..initrd.start.0.saturating_add(initrd.size.0));
    let random = random().map_err(write_error)?;
    let place = place(kernel, boot.cmdline, &map, taken.as_slice(), random);
    let start = GuestAddress(place.physical);
    let room = usize::try_from(shape.size).map_err(write_error)?;
    let room = memory.get_slice(start, room).map_err(write_error)?;
    if let Err(why) = kernel.load(&room, place.distance) {
        tracing::debug!("the kernel is booted as it is: {why}");
        kernel.forget();
        wipe(&room);
        return Ok(None);
    }
    if place.is_random {
        header.loadflags |= KASLR_FLAG;
    }
    write_zero_page(memory, &map, header, initrd)?;
    Ok(Some(Entry::Linux64(GuestAddress(place.physical + shape.entry))))
}

/// Where a kernel lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    physical: u64,
    /// How much higher it is linked than it says.
    distance: u64,
    /// Whether it was chosen by chance.
    is_random: bool,
}

/// Chooses by two `random` numbers.
fn place(
    kernel: &PreparedKernel,
    cmdline: &str,
    map: &[MapEntry],
    taken: &[std::ops::Range<u64>],
    random: [u64; 2],
) -> Place {
    let Shape { base, alignment, size, .. } = kernel.shape();
    let linked = Place { physical: base, distance: 0, is_random: false };
    if kernel.relocations().is_empty() || has_word(cmdline, "nokaslr") {
        return linked;
    }
    let ram: Vec<_> = map
        .iter()
        .filter(|entry| entry.usable)
        .map(|entry| entry.start.0..entry.start.0.saturating_add(entry.size.0).min(layout::HOLE.start))
        .filter(|range| !range.is_empty())
        .collect();
    let [for_memory, for_link_map] = random;
    let physical = if MEMORY_WORDS.iter().any(|word| has_value(cmdline, word)) {
        None
    } else {
        Places::in_memory(&ram, taken, base, size, alignment).choose(for_memory)
    };
    let linked_at = Places::in_link_map(base, size, alignment).choose(for_link_map);
    Place {
        physical: physical.unwrap_or(base),
        distance: linked_at.map_or(0, |linked_at| linked_at.saturating_sub(base)),
        is_random: true,
    }
}

fn random() -> Result<[u64; 2], rustix::io::Errno> {
    let mut bytes = [[0; 8]; 2];
    for bytes in &mut bytes {
        // So few come whole (getrandom(2)).
        getrandom(&mut bytes[..], GetRandomFlags::empty())?;
    }
    Ok(bytes.map(u64::from_le_bytes))
}

/// Leaves zeros, for what comes next.
fn wipe<B: vm_memory::bitmap::BitmapSlice>(memory: &VolatileSlice<'_, B>) {
    let zeros = [0u8; 4096];
    let mut rest = memory.offset(0);
    while let Ok(here) = rest {
        if here.is_empty() {
            break;
        }
        here.copy_from(&zeros);
        rest = here.offset(zeros.len().min(here.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::kernel::header::SMALLEST_ALIGNMENT;
    use image::kernel::prepared;
    use image::testing::{BASE, TestKernel};
    use std::io::{Cursor, Write};
    use vm_memory::Bytes as _;

    const MIB: u64 = 1 << 20;
    const SIZE: Bytes = Bytes::mib(64);

    /// A made-up kernel's bzImage, and what is packed in it.
    fn kernel(kernel: &TestKernel) -> (tempfile::NamedTempFile, PreparedKernel) {
        let image = kernel.bzimage();
        let (mut file, mut made) =
            (tempfile::NamedTempFile::new().expect("a file"), tempfile::tempfile().expect("a file"));
        file.write_all(&image).expect("written");
        prepared::prepare(&image, &mut made).expect("it is a kernel");
        let key = prepared::key(&mut Cursor::new(image)).expect("memory can be read");
        (file, PreparedKernel::open(made, &key).expect("what is made can be used"))
    }

    fn placed(kernel: &PreparedKernel, cmdline: &str, random: [u64; 2]) -> Place {
        let initrd = 40 * MIB..41 * MIB;
        place(kernel, cmdline, &layout::memory_map(SIZE, 0..0), std::slice::from_ref(&initrd), random)
    }

    #[test]
    fn both_addresses_are_of_chance_and_neither_tells_the_other() {
        let (_, kernel) = kernel(&TestKernel::default());
        assert_eq!(placed(&kernel, "quiet", [0, 0]), Place { physical: BASE, distance: 0, is_random: true });
        let higher = placed(&kernel, "quiet", [0, 1]);
        assert_eq!((higher.physical, higher.distance), (BASE, SMALLEST_ALIGNMENT));
        let higher = placed(&kernel, "quiet", [1, 0]);
        assert_eq!((higher.physical, higher.distance), (BASE + SMALLEST_ALIGNMENT, 0));
        let end = kernel.shape().size;
        for random in 0..100 {
            let Place { physical, .. } = placed(&kernel, "quiet", [random, random]);
            assert!(physical + end <= 40 * MIB || physical >= 41 * MIB && physical + end <= SIZE.0);
        }
    }

    #[test]
    fn what_the_command_line_says_of_addresses_and_memory_is_kept() {
        let (_, kernel) = kernel(&TestKernel::default());
        let linked = Place { physical: BASE, distance: 0, is_random: false };
        assert_eq!(placed(&kernel, "quiet nokaslr", [3, 3]), linked);
        assert!(placed(&kernel, "nokaslrx kaslr xnokaslr", [3, 3]).is_random);
        for cmdline in ["mem=40M", "x memmap=1M$32M"] {
            let place = placed(&kernel, cmdline, [3, 3]);
            assert_eq!((place.physical, place.distance), (BASE, 3 * SMALLEST_ALIGNMENT), "{cmdline}");
        }
        let (_, fixed) = self::kernel(&TestKernel { runs: Vec::new(), ..TestKernel::default() });
        assert_eq!(placed(&fixed, "quiet", [3, 3]), linked);
    }

    #[test]
    fn an_unpacked_kernel_is_loaded_with_its_header() {
        let made = TestKernel::default();
        let (file, kernel) = kernel(&made);
        for (cmdline, flags) in [("quiet", KASLR_FLAG), ("nokaslr", 0)] {
            let memory =
                GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE.0 as usize)]).expect("guest memory");
            let boot = Boot {
                kernel: &BootFile::at(file.path()),
                unpacked: Some(&kernel),
                initrd: None,
                cmdline,
                reserved: 0..0,
            };
            let entry = crate::boot::kernel::load(&boot, &memory, SIZE).expect("it fits");
            let Entry::Linux64(entry) = entry else { panic!("{entry:?}") };
            // What no relocation changes.
            let mut code = [0; 64];
            memory.read_slice(&mut code, GuestAddress(entry.0 + 32)).expect("it is in memory");
            assert_eq!(code, made.code[32..96]);
            let loadflags: u8 =
                memory.read_obj(GuestAddress(layout::ZERO_PAGE.0 + 0x211)).expect("a zero page");
            assert_eq!(loadflags & KASLR_FLAG, flags, "{cmdline}");
        }
    }

    #[test]
    fn a_kernel_that_does_not_fit_is_told_with_what_it_needs() {
        let (file, kernel) = kernel(&TestKernel::default());
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("guest memory");
        let boot = Boot {
            kernel: &BootFile::at(file.path()),
            unpacked: Some(&kernel),
            initrd: None,
            cmdline: "",
            reserved: 0..0,
        };
        let error = crate::boot::kernel::load(&boot, &memory, Bytes::mib(16)).expect_err("too small");
        assert!(matches!(error, KernelError::DoesNotFit { .. }), "{error}");
    }

    /// Its file is cut off after it was checked.
    #[test]
    fn where_loading_stops_half_way_memory_is_left_as_it_was() {
        let (file, mut made) =
            (TestKernel::default().bzimage(), tempfile::NamedTempFile::new().expect("a file"));
        prepared::prepare(&file, &mut made).expect("it is a kernel");
        let key = prepared::key(&mut Cursor::new(&file)).expect("memory can be read");
        let kernel = PreparedKernel::open(made.reopen().expect("a file"), &key).expect("it can be used");
        made.as_file().set_len(made.as_file().metadata().expect("a file").len() - 4096).expect("cut off");
        let mut image = tempfile::tempfile().expect("a file");
        image.write_all(&file).expect("written");
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE.0 as usize)]).expect("guest memory");
        let boot = Boot {
            kernel: &BootFile::at("vmlinuz"),
            unpacked: None,
            initrd: None,
            cmdline: "",
            reserved: 0..0,
        };
        let loaded = load(&boot, &mut image, &kernel, &memory, SIZE).expect("it is no error");
        assert_eq!(loaded, None);
        let mut contents = vec![0; SIZE.0 as usize];
        memory.read_slice(&mut contents, GuestAddress(0)).expect("it is in memory");
        assert!(contents.iter().all(|byte| *byte == 0));
    }
}
