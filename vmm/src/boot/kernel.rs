//! Puts kernel, initramfs, command line and what the boot protocol asks for into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use api::units::Bytes;
use image::BootFile;
use image::kernel::prepared::PreparedKernel;
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{BzImage, KernelLoader, load_cmdline};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::unpacked;
use crate::arch::x86_64::layout::{self, MapEntry};
use crate::boot::sparse::SparseElf;

/// Bytes in a command line, without its final zero.
const LONGEST_CMDLINE: usize = layout::CMDLINE_CAPACITY - 1;

/// Why a guest's kernel could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file can't be read.
    #[error("can't read the {what} {}: {source}", path.display())]
    Read {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no kernel.
    #[error("{} is not a kernel: give a bzImage (such as /boot/vmlinuz-*) or an uncompressed ELF (vmlinux)", .0.display())]
    NotAKernel(PathBuf),
    /// An ELF that PVH can't start.
    #[error("{} is an ELF without a PVH entry: build the kernel with CONFIG_PVH=y, or give its bzImage", .0.display())]
    NoPvhEntry(PathBuf),
    /// A kernel too old for the 64-bit protocol.
    #[error("{} has no 64-bit entry point (boot protocol 2.12): give a 64-bit Linux kernel, 3.8 or newer", .0.display())]
    No64BitEntry(PathBuf),
    /// The file is damaged, or does not fit.
    #[error("can't load the kernel {} into {memory} of memory: {why}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// The guest's memory.
        memory: Bytes,
        /// Why.
        why: String,
    },
    /// Kernel and initramfs together don't fit.
    #[error(
        "the {what} ({size}) does not fit beside the kernel into the guest's memory: give it at least {needed}"
    )]
    DoesNotFit {
        /// Kernel or initramfs.
        what: &'static str,
        /// Its size.
        size: Bytes,
        /// Memory in which it would fit.
        needed: Bytes,
    },
    /// A part of the file is missing.
    #[error("the kernel {} is cut off: by its header it has {whole} bytes, and {there} are there", path.display())]
    CutOff {
        /// The file.
        path: PathBuf,
        /// Bytes that it should have.
        whole: u64,
        /// Bytes that it has.
        there: u64,
    },
    /// Nothing is in it.
    #[error("the initramfs {} is empty: give the right file, or none", .0.display())]
    EmptyInitrd(PathBuf),
    /// The command line has no place.
    #[error(
        "the kernel's command line is too long: with what ballast adds it has {0} bytes, and Linux takes {LONGEST_CMDLINE}"
    )]
    CmdlineTooLong(usize),
    /// The command line can't be used.
    #[error("the kernel's command line can't be used: {0}")]
    Cmdline(String),
    /// Guest memory refused a write that should fit.
    #[error("boot data could not be written to guest memory: {0}")]
    Write(String),
}

/// How the first vCPU shall start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst): long mode, RSI at the zero page.
    Linux64(GuestAddress),
    /// PVH (xen: docs/misc/pvh.pandoc): 32-bit protected mode, EBX at the start info.
    Pvh(GuestAddress),
}

/// What a guest boots.
#[derive(Clone, Debug)]
pub struct Boot<'a> {
    /// The kernel.
    pub kernel: &'a BootFile,
    /// What is packed in it, where that was unpacked.
    pub unpacked: Option<&'a PreparedKernel>,
    /// The initramfs.
    pub initrd: Option<&'a BootFile>,
    /// The command line.
    pub cmdline: &'a str,
    /// Addresses in the hole in RAM that the guest is told to keep off; empty for none.
    pub reserved: Range<u64>,
}

/// A piece of guest memory with something in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    pub(super) start: GuestAddress,
    pub(super) size: Bytes,
}

/// Loads everything into a guest with `size` bytes of RAM.
///
/// # Errors
/// [`KernelError`] names the file and what is wrong with it.
pub fn load(boot: &Boot<'_>, memory: &GuestMemoryMmap, size: Bytes) -> Result<Entry, KernelError> {
    let mut kernel = open("kernel", boot.kernel)?;
    let mut magic = [0u8; 4];
    kernel.read_exact(&mut magic).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => KernelError::NotAKernel(boot.kernel.name().to_owned()),
        _ => read_error("kernel", boot.kernel.name(), error),
    })?;
    write_cmdline(boot.cmdline, memory)?;
    if magic == *b"\x7fELF" {
        load_elf(boot, &mut kernel, memory, size)
    } else if let Some(unpacked) = boot.unpacked
        && let Some(entry) = unpacked::load(boot, &mut kernel, unpacked, memory, size)?
    {
        Ok(entry)
    } else {
        load_bzimage(boot, &mut kernel, memory, size)
    }
}

fn open(what: &'static str, file: &BootFile) -> Result<File, KernelError> {
    let path = file.name();
    let file = file.open().map_err(|error| read_error(what, path, error))?;
    let metadata = file.metadata().map_err(|error| read_error(what, path, error))?;
    if metadata.is_dir() {
        return Err(read_error(what, path, io::Error::from(io::ErrorKind::IsADirectory)));
    }
    Ok(file)
}

pub(super) fn read_error(what: &'static str, path: &Path, source: io::Error) -> KernelError {
    KernelError::Read { what, path: path.to_owned(), source }
}

pub(super) fn write_error(error: impl std::fmt::Display) -> KernelError {
    KernelError::Write(error.to_string())
}

fn write_cmdline(text: &str, memory: &GuestMemoryMmap) -> Result<(), KernelError> {
    if text.len() > LONGEST_CMDLINE {
        return Err(KernelError::CmdlineTooLong(text.len()));
    }
    let cmdline = Cmdline::try_from(text, layout::CMDLINE_CAPACITY)
        .map_err(|error| KernelError::Cmdline(error.to_string()))?;
    load_cmdline(memory, layout::CMDLINE, &cmdline).map_err(|error| KernelError::Cmdline(error.to_string()))
}

fn load_elf(
    boot: &Boot<'_>,
    kernel: &mut File,
    memory: &GuestMemoryMmap,
    size: Bytes,
) -> Result<Entry, KernelError> {
    let mut sparse = SparseElf::new(kernel);
    let loaded = Elf::load(memory, None, &mut sparse, Some(layout::HIGH_MEMORY)).map_err(|error| {
        KernelError::Load { path: boot.kernel.name().to_owned(), memory: size, why: error.to_string() }
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(KernelError::NoPvhEntry(boot.kernel.name().to_owned()));
    };
    // The loader copies what is in the file; what is only reserved (.bss) must be RAM as well.
    check_kernel_fits(Bytes(loaded.kernel_end), size)?;
    let initrd = load_initrd(boot.initrd, memory, size, Bytes(loaded.kernel_end), Bytes(layout::HOLE.start))?;
    write_pvh(memory, &layout::memory_map(size, boot.reserved.clone()), initrd)?;
    Ok(Entry::Pvh(entry))
}

fn load_bzimage(
    boot: &Boot<'_>,
    kernel: &mut File,
    memory: &GuestMemoryMmap,
    size: Bytes,
) -> Result<Entry, KernelError> {
    let not_a_kernel = || KernelError::NotAKernel(boot.kernel.name().to_owned());
    let length =
        kernel.seek(SeekFrom::End(0)).map_err(|error| read_error("kernel", boot.kernel.name(), error))?;
    let mut head = [0u8; HEADER_MAGIC + 4];
    let is_read = kernel.rewind().is_ok() && kernel.read_exact(&mut head).is_ok();
    if !is_read || !head.ends_with(b"HdrS") {
        return Err(not_a_kernel());
    }
    let whole = image_length(&head);
    if length < whole {
        return Err(KernelError::CutOff { path: boot.kernel.name().to_owned(), whole, there: length });
    }
    check_kernel_fits(Bytes(layout::HIGH_MEMORY.0 + length), size)?;
    let loaded = BzImage::load(memory, None, kernel, Some(layout::HIGH_MEMORY)).map_err(|error| {
        KernelError::Load { path: boot.kernel.name().to_owned(), memory: size, why: error.to_string() }
    })?;
    let header = loaded.setup_header.ok_or_else(not_a_kernel)?;
    // XLF_KERNEL_64: the legacy 64-bit entry point at 0x200 exists.
    if header.version < 0x20c || header.xloadflags & 1 == 0 {
        return Err(KernelError::No64BitEntry(boot.kernel.name().to_owned()));
    }
    // The kernel unpacks itself to where it prefers to run, and needs init_size from there on.
    let unpacked =
        Bytes(loaded.kernel_load.0.max(header.pref_address).saturating_add(header.init_size.into()));
    let end = unpacked.max(Bytes(loaded.kernel_end));
    check_kernel_fits(end, size)?;
    let highest = Bytes(u64::from(header.initrd_addr_max).saturating_add(1).min(layout::HOLE.start));
    let initrd = load_initrd(boot.initrd, memory, size, end, highest)?;
    write_zero_page(memory, &layout::memory_map(size, boot.reserved.clone()), header, initrd)?;
    Ok(Entry::Linux64(GuestAddress(loaded.kernel_load.0.saturating_add(0x200))))
}

// Fields of a bzImage's header (Documentation/arch/x86/boot.rst).
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_PARAGRAPHS: usize = 0x1f4;
const HEADER_MAGIC: usize = 0x202;

/// How long a bzImage is by its header: the boot sector, the real-mode code and the rest. Signatures may follow.
fn image_length(head: &[u8; HEADER_MAGIC + 4]) -> u64 {
    let sectors = match head.get(SETUP_SECTORS) {
        // "For backwards compatibility".
        None | Some(0) => 4,
        Some(&sectors) => u64::from(sectors),
    };
    let paragraphs = head.get(PAYLOAD_PARAGRAPHS..).and_then(|rest| rest.first_chunk()).copied();
    (sectors + 1) * 512 + u64::from(paragraphs.map_or(0, u32::from_le_bytes)) * 16
}

pub(super) fn check_kernel_fits(end: Bytes, memory: Bytes) -> Result<(), KernelError> {
    if end > memory.min(Bytes(layout::HOLE.start)) {
        let size = end.saturating_sub(Bytes(layout::HIGH_MEMORY.0));
        return Err(KernelError::DoesNotFit { what: "unpacked kernel", size, needed: up_to_mib(end) });
    }
    Ok(())
}

fn up_to_mib(size: Bytes) -> Bytes {
    Bytes::mib(size.0.div_ceil(Bytes::mib(1).0))
}

/// Reads the initramfs to the highest place below `highest`, above `lowest`.
pub(super) fn load_initrd(
    file: Option<&BootFile>,
    memory: &GuestMemoryMmap,
    ram: Bytes,
    lowest: Bytes,
    highest: Bytes,
) -> Result<Option<Placed>, KernelError> {
    let Some(file) = file else { return Ok(None) };
    let path = file.name();
    let mut file = open("initramfs", file)?;
    // A pipe has no length; it could be read into memory only by guessing one.
    let length = file.seek(SeekFrom::End(0)).map_err(|error| read_error("initramfs", path, error))?;
    file.rewind().map_err(|error| read_error("initramfs", path, error))?;
    if length == 0 {
        return Err(KernelError::EmptyInitrd(path.to_owned()));
    }
    let size = Bytes(length);
    let start = ram.min(highest).saturating_sub(size).page_floor();
    if start < lowest {
        let needed = up_to_mib(lowest.saturating_add(size).saturating_add(Bytes::kib(4)));
        return Err(KernelError::DoesNotFit { what: "initramfs", size, needed });
    }
    let start = GuestAddress(start.0);
    let count = usize::try_from(length).map_err(write_error)?;
    memory
        .read_exact_volatile_from(start, &mut file, count)
        .map_err(|error| read_error("initramfs", path, io::Error::other(error.to_string())))?;
    Ok(Some(Placed { start, size }))
}

pub(super) fn write_zero_page(
    memory: &GuestMemoryMmap,
    map: &[MapEntry],
    header: setup_header,
    initrd: Option<Placed>,
) -> Result<(), KernelError> {
    let mut params = boot_params { hdr: header, ..Default::default() };
    // "Undefined boot loader" (boot.rst): no assigned number says more about us.
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = layout::CMDLINE.0 as u32;
    if let Some(initrd) = initrd {
        // Below initrd_addr_max, which has 32 bits.
        params.hdr.ramdisk_image = initrd.start.0 as u32;
        params.hdr.ramdisk_size = initrd.size.0 as u32;
    }
    params.acpi_rsdp_addr = layout::ACPI.0;
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: entry.start.0,
            size: entry.size.0,
            r#type: if entry.usable { E820_RAM } else { E820_RESERVED },
        };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, layout::ZERO_PAGE), memory)
        .map_err(write_error)
}

/// E820_TYPE_RAM, and XEN_HVM_MEMMAP_TYPE_RAM.
const E820_RAM: u32 = 1;
/// E820_TYPE_RESERVED, and XEN_HVM_MEMMAP_TYPE_RESERVED.
const E820_RESERVED: u32 = 2;
/// XEN_HVM_START_MAGIC_VALUE.
const PVH_MAGIC: u32 = 0x336e_c578;

fn write_pvh(memory: &GuestMemoryMmap, map: &[MapEntry], initrd: Option<Placed>) -> Result<(), KernelError> {
    let map: Vec<_> = map
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start.0,
            size: entry.size.0,
            type_: if entry.usable { E820_RAM } else { E820_RESERVED },
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .iter()
        .map(|initrd| hvm_modlist_entry { paddr: initrd.start.0, size: initrd.size.0, ..Default::default() })
        .collect();
    let map_at = GuestAddress(layout::PVH_START_INFO.0 + 0x100);
    let modules_at = GuestAddress(layout::PVH_START_INFO.0 + 0x80);
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { modules_at.0 },
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: layout::ACPI.0,
        memmap_paddr: map_at.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, layout::PVH_START_INFO);
    params.set_sections(&map, map_at);
    if !modules.is_empty() {
        params.set_modules(&modules, modules_at);
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(write_error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn boot<'a>(kernel: &'a BootFile, cmdline: &'a str) -> Boot<'a> {
        Boot { kernel, unpacked: None, initrd: None, cmdline, reserved: 0..0 }
    }

    fn refused(contents: &[u8]) -> KernelError {
        let mut file = tempfile::NamedTempFile::new().expect("temporary file");
        file.write_all(contents).expect("written");
        let size = Bytes::mib(64);
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size.0 as usize)]).expect("guest memory");
        load(&boot(&BootFile::at(file.path()), ""), &memory, size).expect_err("no kernel")
    }

    #[test]
    fn what_is_no_kernel_is_called_so() {
        for contents in [&b""[..], b"\x7fE", b"#!/bin/sh\n", &[0; 4096], &[0xff; 100_000]] {
            assert!(matches!(refused(contents), KernelError::NotAKernel(_)));
        }
    }

    #[test]
    fn a_damaged_kernel_is_refused() {
        let mut elf = vec![0u8; 200];
        elf[..4].copy_from_slice(b"\x7fELF");
        assert!(matches!(refused(&elf), KernelError::Load { .. }));
        let mut image = vec![0u8; 4096];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(matches!(refused(&image), KernelError::Load { .. }));
    }

    #[test]
    fn a_missing_file_and_a_directory_are_named() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).expect("guest memory");
        for path in ["/nowhere/vmlinuz", "/"] {
            let error = load(&boot(&BootFile::at(path), ""), &memory, Bytes::mib(64))
                .expect_err("no file")
                .to_string();
            assert!(error.contains(path), "{error}");
        }
    }

    /// A header says how long the image is; what is missing would be zeros to the guest.
    #[test]
    fn an_image_that_is_cut_off_is_refused() {
        let mut image = vec![0u8; 8192];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 3;
        image[0x1f4..0x1f8].copy_from_slice(&(6145u32 / 16 + 1).to_le_bytes());
        let error = refused(&image);
        assert!(matches!(error, KernelError::CutOff { whole: 8208, there: 8192, .. }), "{error}");
        image.extend([0; 16]);
        assert!(matches!(refused(&image), KernelError::Load { .. } | KernelError::No64BitEntry(_)));
        image[0x1f1] = 0;
        assert!(matches!(refused(&image), KernelError::CutOff { whole: 8720, there: 8208, .. }));
        image[0x1f4..0x1f8].fill(0xff);
        assert!(matches!(refused(&image), KernelError::CutOff { .. }));
    }

    #[test]
    fn an_empty_initramfs_is_refused() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).expect("guest memory");
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        let (ram, lowest, highest) = (Bytes::mib(64), Bytes::mib(1), Bytes::mib(64));
        let error =
            load_initrd(Some(&BootFile::at(file.path())), &memory, ram, lowest, highest).expect_err("empty");
        assert!(matches!(error, KernelError::EmptyInitrd(_)), "{error}");
    }

    #[test]
    fn a_command_line_that_is_too_long_is_told_with_the_limit() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).expect("guest memory");
        write_cmdline(&"x".repeat(2047), &memory).expect("as long as Linux takes");
        let error = write_cmdline(&"x".repeat(2048), &memory).expect_err("one more").to_string();
        assert!(error.contains("2048 bytes") && error.contains("2047"), "{error}");
    }
}
