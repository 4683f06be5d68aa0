//! Memory that can be plugged into a guest: where it lies, and who can reach it.
//!
//! One memory slot of KVM covers all of it. What is not plugged is closed by
//! its protection in this process (`PROT_NONE`): KVM, which reaches guest
//! memory through this process's mappings, then can't bring it in for the
//! guest, and no device can touch it. To open or close a block costs one
//! system call and leaves the second-level tables of all else alone, where
//! deleting a memory slot would have KVM build them anew
//! (`kvm_mmu_zap_all_fast`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use api::units::Bytes;
use balloon::plug::{self, Access, SetAccess};
use balloon::ranges::Range;

use crate::config::Backing;
use crate::memory::mapping::{MemoryError, Region, Use, map};

/// A region of guest memory into which blocks can be plugged.
pub struct Pluggable {
    region: Region,
    most: Bytes,
    dropping: *mut u8,
    /// Huge pages are had from the host when they are plugged.
    huge_pages: Option<File>,
}

// SAFETY: the pointers are only addresses here, of memory that stays mapped for the life of the process.
unsafe impl Send for Pluggable {}
// SAFETY: as above; nothing is reached through a shared `Pluggable` without further unsafe code.
unsafe impl Sync for Pluggable {}

/// An address to pass between threads.
#[derive(Clone, Copy)]
struct Host(*mut u8);

// SAFETY: only an address, of memory that stays mapped for the life of the process.
unsafe impl Send for Host {}

impl Pluggable {
    /// For a region of which at most `most` shall be plugged, at its place in `file` if it has one.
    pub(crate) fn new(
        region: Region,
        most: Bytes,
        file: Option<&File>,
        backing: Backing,
    ) -> Result<Self, MemoryError> {
        // MADV_REMOVE takes a writable mapping, and the guest's is closed by then.
        let dropping = match file {
            Some(file) => {
                let dropping = map(region.size, Some((file.as_raw_fd(), region.offset)), Use::Dropping)?;
                never_huge(dropping, region.size);
                dropping
            }
            None => region.host,
        };
        let huge_pages = file
            .filter(|_| backing == Backing::HugePages2M)
            .map(File::try_clone)
            .transpose()
            .map_err(|source| MemoryError::Memfd { size: region.size, source })?;
        // Whole blocks: what is left of the last one is never plugged.
        let block = plug::block_size(region.size).0;
        let most = Bytes(most.0 - most.0 % block);
        Ok(Self { region, most, dropping, huge_pages })
    }

    /// The region.
    pub const fn region(&self) -> Region {
        self.region
    }

    /// The most of it that shall be plugged.
    pub const fn most(&self) -> Bytes {
        self.most
    }

    /// Where this process drops the region's memory; not where the guest's accesses go, if it lies in a file.
    pub const fn dropping(&self) -> *mut u8 {
        self.dropping
    }

    /// What opens and closes blocks of the region.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn set_access(&self) -> io::Result<SetAccess> {
        let Region { guest, host, size, offset } = self.region;
        let host = Host(host);
        let huge_pages = self.huge_pages.as_ref().map(File::try_clone).transpose()?;
        let region = Range { start: guest, len: size };
        Ok(Box::new(move |range, access| {
            let host = host;
            let part = range.within(&region).filter(|part| *part == range);
            let part = part.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
            let from_start = part.start.0.saturating_sub(region.start.0);
            let at = host.0.wrapping_add(to_usize(from_start)?);
            let len = to_usize(part.len.0)?;
            let (Some(file), Access::Granted) = (&huge_pages, access) else {
                return protect(at, len, access);
            };
            let (file, offset) = (file.as_raw_fd(), offset.saturating_add(Bytes(from_start)));
            allocate(file, offset, part.len)?;
            // The guest can't reach them then, so nobody would ever give them back.
            protect(at, len, access).inspect_err(|_| release(file, offset, part.len))
        }))
    }
}

/// Nobody reads or writes a mapping that memory is dropped by; a huge page that the host put together
/// there would bring back what was dropped. A kernel without huge pages refuses, and needs no advice.
fn never_huge(at: *mut u8, size: Bytes) {
    if let Ok(len) = to_usize(size.0) {
        // SAFETY: a mapping of this module's own; the advice changes nothing in it.
        unsafe { libc::madvise(at.cast(), len, libc::MADV_NOHUGEPAGE) };
    }
}

fn to_usize(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Has the host set memory of a file aside, so that no later touch of it can fail. All of it or none.
fn allocate(file: RawFd, offset: Bytes, len: Bytes) -> io::Result<()> {
    // The pages that it could get before there were no more would be kept for nobody.
    fallocate(file, 0, offset, len).inspect_err(|_| release(file, offset, len))
}

/// Gives memory of a file back to the host.
fn release(file: RawFd, offset: Bytes, len: Bytes) {
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    if let Err(error) = fallocate(file, punch, offset, len) {
        tracing::warn!("the host did not take {len} back that could not be plugged: {error}");
    }
}

fn fallocate(file: RawFd, mode: libc::c_int, offset: Bytes, len: Bytes) -> io::Result<()> {
    let number = |bytes: Bytes| libc::off_t::try_from(bytes.0).map_err(io::Error::other);
    // SAFETY: a descriptor that the caller holds, and no pointer.
    let done = unsafe { libc::fallocate(file, mode, number(offset)?, number(len)?) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Opens or closes a part of the region, which starts and ends at a block.
fn protect(at: *mut u8, len: usize, access: Access) -> io::Result<()> {
    let protection = match access {
        Access::Granted => libc::PROT_READ | libc::PROT_WRITE,
        Access::Revoked => libc::PROT_NONE,
    };
    // SAFETY: inside the region's own mapping, of which no reference exists: guest memory is
    // reached through raw accesses alone, and one that comes too late is caught (`fault_guard`).
    let done = unsafe { libc::mprotect(at.cast(), len, protection) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::ptr;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::config::MemoryOptions;
    use crate::memory::Ram;
    use crate::memory::mapping::memfd;

    /// `rw` or `--`, for the byte at `address` of this process.
    fn rights(address: u64) -> String {
        let maps = fs::read_to_string("/proc/self/maps").expect("own maps");
        let line = maps.lines().find(|line| {
            let (start, end) =
                line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
            let number = |text| u64::from_str_radix(text, 16).expect("an address");
            (number(start)..number(end)).contains(&address)
        });
        line.and_then(|line| line.split(' ').nth(1)).expect("mapped")[..2].to_owned()
    }

    #[test]
    fn the_mapping_to_drop_by_never_holds_a_huge_page() {
        if !fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap_or(false) {
            eprintln!("SKIPPED: this kernel has no transparent huge pages");
            return;
        }
        let options = MemoryOptions { backing: Backing::Memfd, thp: true, ..Default::default() };
        let ram = Ram::with_pluggable(Bytes::mib(64), Bytes::mib(100), options).expect("address space");
        let dropping = ram.pluggable().expect("asked for").dropping() as u64;
        let smaps = fs::read_to_string("/proc/self/smaps").expect("own maps");
        let (_, own) = smaps.split_once(&format!("{dropping:x}-")).expect("mapped");
        let flags = own.lines().find_map(|line| line.strip_prefix("VmFlags:")).expect("flags");
        assert!(flags.split(' ').any(|flag| flag == "nh"), "{flags}");
    }

    /// No memory can be opened where none is mapped: the host refuses after it has set pages aside.
    #[test]
    fn pages_that_the_guest_can_not_be_let_at_go_back() {
        let size = Bytes::mib(128);
        let file = memfd(size, 0).expect("a memfd");
        let guest = GuestAddress(1 << 30);
        let region = Region { guest, host: ptr::without_provenance_mut(1 << 21), size, offset: Bytes::ZERO };
        let pluggable = Pluggable::new(region, size, Some(&file), Backing::HugePages2M).expect("mapped");
        let mut set_access = pluggable.set_access().expect("descriptors");
        let block = Range { start: GuestAddress(guest.0 + (4 << 20)), len: Bytes::mib(2) };
        assert!(set_access(block, Access::Granted).is_err());
        assert_eq!(file.metadata().expect("a file").blocks(), 0);
    }

    #[test]
    fn only_what_is_granted_can_be_reached() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let options = MemoryOptions { backing, ..Default::default() };
            let ram = Ram::with_pluggable(Bytes::mib(64), Bytes::mib(100), options).expect("address space");
            let pluggable = ram.pluggable().expect("asked for");
            let Region { guest, host, size, .. } = pluggable.region();
            assert_eq!((guest, size), (GuestAddress(128 << 20), Bytes::mib(128)));
            assert_eq!((ram.boot(), pluggable.most(), ram.most()), {
                (Bytes::mib(64), Bytes::mib(100), Bytes::mib(164))
            });
            assert_eq!((host as u64) % (2 << 20), 0, "huge pages of guest and host lie alike");
            let mut set_access = pluggable.set_access().expect("descriptors");
            let middle = Range { start: GuestAddress(guest.0 + (4 << 20)), len: Bytes::mib(2) };
            let seen = || [2, 4, 6].map(|mib| rights(host as u64 + (mib << 20)));
            assert_eq!(seen(), ["--", "--", "--"]);
            set_access(middle, Access::Granted).expect("granted");
            assert_eq!(seen(), ["--", "rw", "--"]);
            set_access(middle, Access::Revoked).expect("revoked");
            assert_eq!(seen(), ["--", "--", "--"]);
            let past = Range { start: GuestAddress(guest.0 + (127 << 20)), len: Bytes::mib(2) };
            assert!(set_access(past, Access::Granted).is_err());
        }
    }
}
