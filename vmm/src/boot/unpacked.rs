//! Boots a bzImage's kernel without the bzImage: unpacked on the host, and put at an address of chance as its own
//! decompressor does (Documentation/arch/x86/boot.rst; arch/x86/boot/compressed/kaslr.c).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use api::units::Bytes;
use image::Unpacking;
use image::kernel::placement::Places;
use image::kernel::prepared::{PreparedKernel, Shape};
use image::kernel::{has_value, has_word};
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
pub fn prepare(file: &Path, unpacking: &Unpacking) -> Option<PreparedKernel> {
    match File::open(file).map_err(image::Error::Read).and_then(|file| unpacking.prepare(&file)) {
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
        .map_err(|error| read_error("kernel", boot.kernel, error))?;
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
