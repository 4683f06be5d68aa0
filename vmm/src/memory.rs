//! Guest memory: mapped lazily, of the kind that the user chose, and measured.

mod accounts;
pub(crate) mod fault_guard;
pub(crate) mod mapping;
pub mod pluggable;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use self::accounts::Accounts;
pub use self::accounts::Held;
use self::mapping::{ALIGNMENT, Use, advise, map, memfd};
pub use self::mapping::{MemoryError, Region};
use api::units::Bytes;
use devices::virtio::vhost_user::{SharedMemory, SharedRegion};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

use crate::arch::x86_64::layout;
use crate::config::{Backing, MemoryOptions};
use crate::host::HugePages;
use crate::memory::pluggable::Pluggable;

/// A guest's RAM.
pub struct Ram {
    guest: Arc<GuestMemoryMmap>,
    regions: Vec<Region>,
    boot: Bytes,
    pluggable: Option<Pluggable>,
    // Held for its file: what is resident of a shared mapping is what the file holds.
    file: Option<File>,
    backing: Backing,
    collapses: bool,
    accounts: Arc<Accounts>,
}

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
        let counted = file.as_ref().map(File::try_clone).transpose().map_err(MemoryError::Accounts)?;
        let accounts = Accounts::new(mappings.collect(), counted).map_err(MemoryError::Accounts)?;
        let accounts = Arc::new(accounts);
        let backing = options.backing;
        let collapses = HugePages::look().collapse(backing, options.thp);
        Ok(Self { guest, regions, boot, pluggable, file, backing, collapses, accounts })
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

    /// Whether the host may put huge pages together in it by itself (khugepaged), and so bring back
    /// what was given up. As the host was set when the VM was made: it can't look again once it runs.
    pub const fn collapses(&self) -> bool {
        self.collapses
    }

    /// The memfd behind it, if there is one.
    pub fn fd(&self) -> Option<RawFd> {
        self.file.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The memory as another process can map it; `None` where it is of this process alone, or not all of it is the
    /// guest's to reach.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn shared(&self) -> io::Result<Option<SharedMemory>> {
        let Some(file) = self.file.as_ref().filter(|_| self.pluggable.is_none()) else { return Ok(None) };
        let regions = self.regions.iter().map(|region| SharedRegion {
            guest: region.guest,
            size: region.size.0,
            offset: region.offset.0,
        });
        Ok(Some(SharedMemory { file: file.try_clone()?, regions: regions.collect() }))
    }

    /// Has a thread count what the host holds, so that [`held`](Self::held) never takes long.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn count(&self) -> io::Result<()> {
        self.accounts.start()
    }

    /// How much of it the host really holds in memory, and in huge pages. What it has swapped out is none of
    /// that, whatever the backing.
    ///
    /// It is counted by the kernel, not long ago, or reckoned from an older count (see `Accounts::held`);
    /// what lies in huge pages is as old as the count. mincore(2) would not tell,
    /// as it reports the page cache.
    ///
    /// # Errors
    /// When the kernel's accounts can't be read.
    pub fn held(&self) -> io::Result<Held> {
        match (&self.file, self.backing) {
            // Reserved huge pages are never swapped.
            (Some(file), Backing::HugePages2M) => {
                let resident = accounts::allocated(file)?;
                Ok(Held { resident, huge: resident })
            }
            _ => self.accounts.held(),
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

/// Refuses what would kill the guest later: a huge page that is not there is a SIGBUS at first touch.
fn check_huge_pages(size: Bytes) -> Result<(), MemoryError> {
    if !size.0.is_multiple_of(ALIGNMENT.0) {
        return Err(MemoryError::HugePageSize(size));
    }
    let needed = size.0 / ALIGNMENT.0;
    let free = HugePages::look().free;
    if free < needed { Err(MemoryError::HugePages { needed, free }) } else { Ok(()) }
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
        // for what is not plugged; a device that a guest sends there ends the VM (`fault_guard`).
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
    use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

    /// What is held at this moment, and not some milliseconds ago.
    fn held(ram: &Ram) -> Held {
        ram.accounts.forget();
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

    #[test]
    fn what_another_process_can_map_is_all_that_the_guest_has_and_stays_as_large() {
        let memfd = MemoryOptions { backing: Backing::Memfd, ..Default::default() };
        let ram = Ram::new(Bytes::gib(6), memfd).expect("mapped");
        let shared = ram.shared().expect("descriptors").expect("it can be shared");
        let sizes: u64 = shared.regions.iter().map(|region| region.size).sum();
        assert_eq!((shared.regions.len(), sizes), (2, Bytes::gib(6).0));
        let size = shared.file.metadata().expect("a file").len();
        for wrong in [0, size - 4096, size + 4096] {
            assert!(shared.file.set_len(wrong).is_err(), "{wrong}");
        }
        let plugs = Ram::with_pluggable(Bytes::mib(64), Bytes::mib(64), memfd).expect("mapped");
        assert!(plugs.shared().expect("descriptors").is_none());
        let private = Ram::new(Bytes::mib(64), MemoryOptions::default()).expect("mapped");
        assert!(private.shared().expect("descriptors").is_none());
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
