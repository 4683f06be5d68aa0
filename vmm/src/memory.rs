//! Guest memory: mapped lazily, of the kind that the user chose, and measured.

mod accounts;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::ptr;
use std::sync::Arc;

use self::accounts::Accounts;
pub use self::accounts::Held;
use balloon::units::Bytes;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::boot::layout;
use crate::config::{Backing, MemoryOptions};
use crate::host::HugePages;
use crate::pluggable::Pluggable;

/// Mappings start at such an address, so that the host can use huge pages from the first byte on.
const ALIGNMENT: Bytes = Bytes::mib(2);

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
    #[error("with huge pages of 2 MiB, max must be a multiple of 2 MiB, and {0} is not")]
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
    /// The pieces don't make a guest memory.
    #[error("guest memory could not be put together: {0}")]
    Compose(String),
}

/// A guest's RAM.
pub struct Ram {
    guest: Arc<GuestMemoryMmap>,
    regions: Vec<Region>,
    boot: Bytes,
    pluggable: Option<Pluggable>,
    // Held for its file: what is resident of a shared mapping is what the file holds.
    file: Option<File>,
    backing: Backing,
    accounts: Accounts,
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

impl Ram {
    /// Maps `size` bytes of RAM. Nothing is resident until it is touched, unless asked for.
    ///
    /// # Errors
    /// [`MemoryError`] says what the host refused.
    pub fn new(size: Bytes, options: MemoryOptions) -> Result<Self, MemoryError> {
        Self::with_pluggable(size, Bytes::ZERO, options)
    }

    /// Maps `boot` bytes of RAM as [`new`](Self::new) does, and address space into which up to
    /// `more` can be plugged; none of that can be reached yet.
    ///
    /// # Errors
    /// [`MemoryError`] says what the host refused.
    pub fn with_pluggable(boot: Bytes, more: Bytes, options: MemoryOptions) -> Result<Self, MemoryError> {
        let place = (more > Bytes::ZERO).then(|| layout::pluggable(boot, more));
        let boot_places = layout::ram(boot);
        let mut offsets = offsets(boot_places.iter().chain(&place).map(|(_, size)| *size));
        let size = offsets.pop().unwrap_or(Bytes::ZERO);
        let file = match options.backing {
            Backing::Anonymous => None,
            Backing::Memfd => Some(memfd(size, 0)?),
            Backing::HugePages2M => {
                check_huge_pages(boot)?;
                Some(memfd(size, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)?)
            }
        };
        let mut regions = Vec::new();
        for ((guest, size), &offset) in boot_places.into_iter().zip(&offsets) {
            let host = map(size, file.as_ref().map(|file| (file.as_raw_fd(), offset)), Use::Boot)?;
            advise(host, size, options)?;
            regions.push(Region { guest, host, size, offset });
        }
        let pluggable = place
            .zip(offsets.last())
            .map(|((guest, size), &offset)| {
                let at = file.as_ref().map(|file| (file.as_raw_fd(), offset));
                let host = map(size, at, Use::Pluggable)?;
                advise(host, size, MemoryOptions { prefault: false, ..options })?;
                let region = Region { guest, host, size, offset };
                Pluggable::new(region, more, file.as_ref(), options.backing)
            })
            .transpose()?;
        regions.extend(pluggable.as_ref().map(Pluggable::region));
        let guest = Arc::new(compose(&regions)?);
        let mappings = regions.iter().map(|region| {
            let start = region.host as u64;
            start..start.saturating_add(region.size.0)
        });
        let accounts = Accounts::new(mappings.collect());
        Ok(Self { guest, regions, boot, pluggable, file, backing: options.backing, accounts })
    }

    /// The memory as devices and loaders reach it.
    pub fn guest(&self) -> &Arc<GuestMemoryMmap> {
        &self.guest
    }

    /// Its regions; one into which memory can be plugged is the last.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// What the guest boots with.
    pub const fn boot(&self) -> Bytes {
        self.boot
    }

    /// What can be plugged, if anything.
    pub const fn pluggable(&self) -> Option<&Pluggable> {
        self.pluggable.as_ref()
    }

    /// All that the guest could have.
    pub fn most(&self) -> Bytes {
        self.boot.saturating_add(self.pluggable.as_ref().map_or(Bytes::ZERO, Pluggable::most))
    }

    /// What it is made of.
    pub const fn backing(&self) -> Backing {
        self.backing
    }

    /// The memfd behind it, if there is one.
    pub fn fd(&self) -> Option<RawFd> {
        self.file.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// How much of it the host really holds, and in huge pages.
    ///
    /// What a memfd holds is told by its blocks: pages that only KVM has touched, or that this
    /// process has unmapped and not punched out, count as well. Anonymous memory is
    /// counted by the kernel, not long ago (see `Accounts::held`); mincore(2) would not tell,
    /// as it reports the page cache.
    ///
    /// # Errors
    /// When the kernel's accounts can't be read.
    pub fn held(&self) -> io::Result<Held> {
        // st_blocks counts 512 bytes, whatever the file system's block is (stat(2)).
        let blocks = |file: &File| Ok::<_, io::Error>(Bytes(file.metadata()?.blocks().saturating_mul(512)));
        match (&self.file, self.backing) {
            (Some(file), Backing::HugePages2M) => {
                let resident = blocks(file)?;
                Ok(Held { resident, huge: resident })
            }
            (Some(file), _) => Ok(Held { resident: blocks(file)?, ..self.accounts.held()? }),
            (None, _) => self.accounts.held(),
        }
    }
}

/// Where regions of these sizes start in a memfd, and, as the last of all, where it ends. Each
/// starts at a huge page, as it does in this process and in the guest: a huge page of a file can
/// be mapped whole only where all three agree. The gap between two takes no memory.
fn offsets(sizes: impl Iterator<Item = Bytes>) -> Vec<Bytes> {
    let mut offsets = vec![Bytes::ZERO];
    let mut end = Bytes::ZERO;
    for size in sizes {
        let up = end.saturating_add(size).0.div_ceil(ALIGNMENT.0).saturating_mul(ALIGNMENT.0);
        end = Bytes(up);
        offsets.push(end);
    }
    offsets
}

/// An anonymous file of `size` bytes, with nothing in it yet.
fn memfd(size: Bytes, flags: libc::c_uint) -> Result<File, MemoryError> {
    let failed = |source| MemoryError::Memfd { size, source };
    // SAFETY: the name is a valid C string, and the call touches nothing else.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size.0).map_err(failed)?;
    Ok(file)
}

/// Refuses what would kill the guest later: a huge page that is not there is a SIGBUS at first touch.
fn check_huge_pages(size: Bytes) -> Result<(), MemoryError> {
    if !size.0.is_multiple_of(ALIGNMENT.0) {
        return Err(MemoryError::HugePageSize(size));
    }
    let needed = size.0 / ALIGNMENT.0;
    let free = HugePages::look().free;
    if free < needed { Err(MemoryError::HugePages { needed, free }) } else { Ok(()) }
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
fn advise(host: *mut u8, size: Bytes, options: MemoryOptions) -> Result<(), MemoryError> {
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

/// The regions as vm-memory sees them. It does not own the mappings: they last as long as the process.
fn compose(regions: &[Region]) -> Result<GuestMemoryMmap, MemoryError> {
    let failed = |what: &dyn std::fmt::Display| MemoryError::Compose(what.to_string());
    let mut parts = Vec::new();
    for region in regions {
        let builder = MmapRegionBuilder::new(region.size.0 as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_NORESERVE);
        // SAFETY: the pointer is a mapping of this size, never unmapped, readable and writable but
        // for what is not plugged; a device that a guest sends there ends the VM (`trespass`).
        let builder = unsafe { builder.with_raw_mmap_pointer(region.host) };
        let mapping = builder.build().map_err(|error| failed(&error))?;
        let part = GuestRegionMmap::new(mapping, region.guest)
            .ok_or_else(|| failed(&"a region ends past the address space"))?;
        parts.push(part);
    }
    GuestMemoryMmap::from_regions(parts).map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes as _, GuestMemoryBackend as _};

    /// What is held at this moment, and not some milliseconds ago.
    fn held(ram: &Ram) -> Held {
        *ram.accounts.last() = None;
        ram.held().expect("accounts")
    }

    /// Touches a few MiB and sees just them become resident.
    fn follows_touches(options: MemoryOptions) {
        let ram = Ram::new(Bytes::gib(6), options).expect("lazily mapped");
        assert_eq!(ram.regions().len(), 2);
        assert_eq!(held(&ram), Held::default());
        let touched = Bytes::mib(8);
        for page in 0..touched.pages().0 {
            let address = GuestAddress(layout::HOLE.end + page * 4096);
            ram.guest().write_obj(1u8, address).expect("RAM");
        }
        assert_eq!(held(&ram).resident, touched);
    }

    #[test]
    fn anonymous_memory_is_counted() {
        follows_touches(MemoryOptions::default());
    }

    #[test]
    fn shared_memory_is_counted() {
        follows_touches(MemoryOptions { backing: Backing::Memfd, ..Default::default() });
    }

    #[test]
    fn prefault_fills_everything() {
        let size = Bytes::mib(64);
        let ram = Ram::new(size, MemoryOptions { prefault: true, ..Default::default() }).expect("mapped");
        assert_eq!(held(&ram).resident, size);
    }

    /// A huge page of the host backs one of the guest only where both begin at such an address
    /// (Linux's mm/khugepaged.c and KVM's mapping level agree on that).
    #[test]
    fn guest_and_host_addresses_agree_in_their_huge_page() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let options = MemoryOptions { backing, ..Default::default() };
            // As much as reaches past the hole, and sizes that are no multiple of a huge page.
            for boot in [Bytes::gib(6), Bytes::mib(255), Bytes(Bytes::gib(4).0 + 4096)] {
                let ram = Ram::with_pluggable(boot, Bytes::mib(255), options).expect("mapped");
                for region in ram.regions() {
                    for address in [region.host as u64, region.guest.0, region.offset.0] {
                        assert!(address.is_multiple_of(ALIGNMENT.0), "{region:?}");
                    }
                }
                assert!(ram.pluggable().is_some_and(|more| more.region().size.0.is_multiple_of(2 << 20)));
            }
        }
    }

    #[test]
    fn huge_pages_are_counted_and_a_hole_in_one_is_too() {
        let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        if !setting.is_ok_and(|setting| setting.contains("[always]") || setting.contains("[madvise]")) {
            eprintln!("this host gives no transparent huge pages, so there are none to count");
            return;
        }
        let options = MemoryOptions { thp: true, ..Default::default() };
        let ram = Ram::new(Bytes::mib(64), options).expect("mapped");
        for page in 0..Bytes::mib(8).pages().0 {
            ram.guest().write_obj(1u8, GuestAddress(Bytes::mib(16).0 + page * 4096)).expect("RAM");
        }
        let before = held(&ram);
        assert_eq!(before.resident, Bytes::mib(8));
        assert!(before.huge >= Bytes::mib(2), "{before:?}");
        let hole = ram.guest().get_host_address(GuestAddress(Bytes::mib(17).0)).expect("RAM");
        // SAFETY: a page of this test's own mapping, of which nobody holds a reference.
        let result = unsafe { libc::madvise(hole.cast(), 4096, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
        let after = held(&ram);
        assert_eq!(after.resident, before.resident - Bytes::kib(4));
        assert_eq!(after.huge, before.huge - Bytes::mib(2), "the one with the hole is none any more");
    }

    #[test]
    fn missing_huge_pages_are_told_with_the_cure() {
        let options = MemoryOptions { backing: Backing::HugePages2M, ..Default::default() };
        let error = Ram::new(Bytes::gib(1024), options).err().expect("no host has that").to_string();
        assert!(error.contains("nr_hugepages"), "{error}");
        assert!(matches!(Ram::new(Bytes::kib(65 << 10 | 4), options), Err(MemoryError::HugePageSize(_))));
    }
}
