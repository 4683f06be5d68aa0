//! Mappings that guest memory lies in: where they start, what backs them, what the host is told of them.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::ptr;

use api::units::Bytes;
use rustix::fs::{SealFlags, fcntl_add_seals};
use vm_memory::GuestAddress;

use crate::config::{Backing, MemoryOptions};

/// Mappings start at such an address, so that the host can use huge pages from the first byte on.
pub(super) const ALIGNMENT: Bytes = Bytes::mib(2);

/// Why the guest's memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the mapping.
    #[error("the host gives no {size} of address space for guest memory: {source}")]
    Map {
        /// As asked.
        size: Bytes,
        /// Why.
        source: io::Error,
    },
    /// The host refused the memfd.
    #[error("the host gives no memfd of {size} for guest memory: {source}")]
    Memfd {
        /// As asked.
        size: Bytes,
        /// Why.
        source: io::Error,
    },
    /// Not enough huge pages are reserved.
    #[error(
        "guest memory needs {needed} huge pages of 2 MiB and {free} are free: \
         reserve them (as root: echo {needed} > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages)"
    )]
    HugePages {
        /// Pages that the guest needs.
        needed: u64,
        /// Pages that are free.
        free: u64,
    },
    /// Huge pages can't be cut.
    #[error(
        "huge pages of 2 MiB make up whole multiples of 2 MiB: {0} is none (it is max, or with --grow plug what the guest starts with)"
    )]
    HugePageSize(Bytes),
    /// The host has no transparent huge pages.
    #[error("the host refused transparent huge pages: {0} (is CONFIG_TRANSPARENT_HUGEPAGE missing?)")]
    Thp(io::Error),
    /// The host could not fill the mapping.
    #[error("the host could not provide all {size} at the start (--prefault): {source}")]
    Prefault {
        /// As asked.
        size: Bytes,
        /// Why.
        source: io::Error,
    },
    /// The kernel's word on it can't be had.
    #[error("what the host holds of guest memory can't be counted: {0} (is /proc mounted?)")]
    Accounts(io::Error),
    /// The pieces don't make a guest memory.
    #[error("guest memory could not be put together: {0}")]
    Compose(String),
}

/// One region of RAM, as KVM and the balloon need to know it.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Where the guest sees it.
    pub guest: GuestAddress,
    /// Where this process sees it.
    pub host: *mut u8,
    /// How long it is.
    pub size: Bytes,
    /// Where it starts in the memfd, if there is one.
    pub offset: Bytes,
}

// SAFETY: the pointer is only an address here; the memory it names stays mapped for
// the life of the process and is shared with the guest in any case.
unsafe impl Send for Region {}
// SAFETY: as above; nothing is reached through a shared `Region` without further unsafe code.
unsafe impl Sync for Region {}

/// An anonymous file of `size` bytes, with nothing in it yet.
pub(crate) fn memfd(size: Bytes, flags: libc::c_uint) -> Result<File, MemoryError> {
    let failed = |source| MemoryError::Memfd { size, source };
    // SAFETY: the name is a valid C string, and the call touches nothing else.
    let fd = unsafe {
        libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags)
    };
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size.0).map_err(failed)?;
    // Whoever is handed it can neither cut it off under the guest nor put more into it than the guest may have.
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(|error| failed(error.into()))?;
    Ok(file)
}

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Memory that the guest boots with: reserved where it is huge pages, so that no touch can fail.
    Boot,
    /// Memory that may be plugged: can't be reached, and reserves nothing.
    Pluggable,
    /// Another view of pluggable memory in a file, to drop it by; nobody reads or writes there.
    Dropping,
}

/// Maps `size` bytes at an aligned address, with inaccessible space left and right of
/// them: a stray access faults, and the kernel can't merge a neighbour into the mapping.
pub(crate) fn map(size: Bytes, file: Option<(RawFd, Bytes)>, to: Use) -> Result<*mut u8, MemoryError> {
    let failed = |source| MemoryError::Map { size, source };
    let too_large = || failed(io::Error::from(io::ErrorKind::OutOfMemory));
    let length = usize::try_from(size.0).map_err(|_| too_large())?;
    let alignment = ALIGNMENT.0 as usize;
    let around = length.checked_add(2 * alignment).ok_or_else(too_large)?;
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let outer = unsafe {
        libc::mmap(
            ptr::null_mut(),
            around,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if outer == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    let inner = outer.wrapping_byte_add(alignment - (outer as usize) % alignment);
    let (flags, fd, offset) = match file {
        Some((fd, offset)) if to == Use::Boot => (libc::MAP_SHARED, fd, offset),
        Some((fd, offset)) => (libc::MAP_SHARED | libc::MAP_NORESERVE, fd, offset),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, Bytes::ZERO),
    };
    let offset = libc::off_t::try_from(offset.0).map_err(|_| too_large())?;
    let protection = if to == Use::Pluggable { libc::PROT_NONE } else { libc::PROT_READ | libc::PROT_WRITE };
    // SAFETY: `inner` lies at most `alignment` into the mapping just made, which has room for
    // `length` from there on, and which nothing else knows yet.
    let mapped = unsafe { libc::mmap(inner, length, protection, flags | libc::MAP_FIXED, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(mapped.cast())
}

/// Tells the host how this memory will be used.
pub(super) fn advise(host: *mut u8, size: Bytes, options: MemoryOptions) -> Result<(), MemoryError> {
    let advise = |advice| {
        // SAFETY: the range is a mapping of this module's own; none of the advices below
        // takes contents away.
        let result = unsafe { libc::madvise(host.cast(), size.0 as usize, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // A guest's memory in a core dump would be large, and not the user's to give away. A kernel
    // without the advice is no reason to stop.
    let _ = advise(libc::MADV_DONTDUMP);
    // Reserved huge pages are as large as can be already.
    if options.thp && options.backing != Backing::HugePages2M {
        advise(libc::MADV_HUGEPAGE).map_err(MemoryError::Thp)?;
    }
    if options.prefault {
        advise(libc::MADV_POPULATE_WRITE).map_err(|source| MemoryError::Prefault { size, source })?;
    }
    Ok(())
}
