//! Host memory behind a micro-VM, and how it is backed.

use std::io;
use std::ptr::{NonNull, null_mut};

use api::units::Bytes;
use serde::{Deserialize, Serialize};

/// What the host backs guest memory with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// Anonymous memory in 4 KiB pages; transparent huge pages refused.
    Small,
    /// Anonymous memory with transparent huge pages asked for.
    Transparent,
    /// hugetlb pages of 2 MiB.
    Hugetlb2M,
    /// hugetlb pages of 1 GiB.
    Hugetlb1G,
}

impl Backing {
    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Small => "4K",
            Self::Transparent => "THP",
            Self::Hugetlb2M => "hugetlb 2M",
            Self::Hugetlb1G => "hugetlb 1G",
        }
    }

    const fn alignment(self) -> usize {
        match self {
            Self::Small | Self::Transparent | Self::Hugetlb2M => 2 << 20,
            Self::Hugetlb1G => 1 << 30,
        }
    }

    const fn map_flags(self) -> libc::c_int {
        match self {
            Self::Small | Self::Transparent => 0,
            Self::Hugetlb2M => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
            Self::Hugetlb1G => libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
        }
    }
}

/// A private mapping of this process, given back when dropped.
#[derive(Debug)]
pub struct Mapping {
    raw: NonNull<u8>,
    raw_len: usize,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only unmapped by its owner.
unsafe impl Send for Mapping {}
// SAFETY: no method reads or writes the memory through a shared reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` (rounded up to the backing's page) as the backing says.
    ///
    /// # Errors
    /// The kernel's: no memory, or no huge pages set aside.
    pub fn new(size: Bytes, backing: Backing) -> io::Result<Self> {
        let align = backing.alignment();
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let len = usize::try_from(size.0).ok().and_then(|n| n.checked_next_multiple_of(align));
        let len = len.ok_or_else(too_large)?;
        let hugetlb = backing.map_flags() != 0;
        // hugetlb mappings come aligned; others get room to align themselves in.
        let raw_len = if hugetlb { len } else { len.checked_add(align).ok_or_else(too_large)? };
        // Huge pages that are not there must be missed here, not at the first touch.
        let reserve = if hugetlb { 0 } else { libc::MAP_NORESERVE };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | reserve | backing.map_flags();
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let raw =
            unsafe { libc::mmap(null_mut(), raw_len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        let raw = match NonNull::new(raw.cast::<u8>()) {
            Some(raw) if raw.as_ptr().cast() != libc::MAP_FAILED => raw,
            _ => return Err(io::Error::last_os_error()),
        };
        let pad = raw.as_ptr().align_offset(align);
        // SAFETY: raw_len is len + align, or the pad is 0.
        let start = unsafe { raw.add(if hugetlb { 0 } else { pad }) };
        let mapping = Self { raw, raw_len, start, len };
        match backing {
            Backing::Small => mapping.advise(libc::MADV_NOHUGEPAGE)?,
            Backing::Transparent => mapping.advise(libc::MADV_HUGEPAGE)?,
            Backing::Hugetlb2M | Backing::Hugetlb1G => {}
        }
        Ok(mapping)
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range is this mapping's own; none of the advices used here loses data.
        match unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) } {
            0 => Ok(()),
            // A kernel without transparent huge pages knows neither advice and has small pages only.
            _ if advice == libc::MADV_NOHUGEPAGE => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes every page present on the host.
    ///
    /// # Errors
    /// The kernel's: no memory, no huge page left.
    pub fn populate(&self) -> io::Result<()> {
        self.advise(libc::MADV_POPULATE_WRITE)
    }

    /// How much of what is present of it lies in huge pages, from 0 to 1; `None` where nothing is present, or
    /// the kernel does not tell (`/proc/self/smaps`).
    pub fn huge_share(&self) -> Option<f64> {
        let start = self.start.as_ptr() as u64;
        share(&std::fs::read_to_string("/proc/self/smaps").ok()?, start, start + self.len as u64)
    }

    /// Where it starts.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// How long it is.
    pub fn size(&self) -> usize {
        self.len
    }
}

/// The share of huge pages in all mappings of `smaps` that reach into a range of addresses (kernel:
/// Documentation/filesystems/proc.rst).
fn share(smaps: &str, start: u64, end: u64) -> Option<f64> {
    let (mut inside, mut present, mut huge) = (false, 0_u64, 0_u64);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((low, high)) = first.split_once('-') {
            let address = |text| u64::from_str_radix(text, 16);
            if let (Ok(low), Ok(high)) = (address(low), address(high)) {
                inside = low < end && start < high;
            }
            continue;
        }
        let kib: u64 = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
        match first {
            "Rss:" if inside => present = present.saturating_add(kib),
            "AnonHugePages:" if inside => huge = huge.saturating_add(kib),
            // Not part of Rss.
            "Private_Hugetlb:" | "Shared_Hugetlb:" if inside => {
                present = present.saturating_add(kib);
                huge = huge.saturating_add(kib);
            }
            _ => {}
        }
    }
    (present > 0).then(|| huge as f64 / present as f64)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what mmap returned; nobody holds a pointer into it beyond its owner.
        unsafe { libc::munmap(self.raw.as_ptr().cast(), self.raw_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_aligned_and_can_be_filled() {
        for backing in [Backing::Small, Backing::Transparent] {
            let mapping = match Mapping::new(Bytes::mib(3), backing) {
                Ok(mapping) => mapping,
                Err(error) => {
                    eprintln!("{} not run: {error}", backing.name());
                    continue;
                }
            };
            assert_eq!(mapping.start() as usize % (2 << 20), 0);
            assert_eq!(mapping.size(), 4 << 20);
            mapping.populate().expect("memory");
        }
        assert!(Mapping::new(Bytes(u64::MAX), Backing::Small).is_err());
    }

    #[test]
    fn small_pages_are_no_huge_ones() {
        let mapping = Mapping::new(Bytes::mib(4), Backing::Small).expect("memory");
        mapping.populate().expect("memory");
        assert_eq!(mapping.huge_share(), Some(0.0));
    }

    #[test]
    fn the_share_is_that_of_the_mappings_in_the_range() {
        let smaps = "10000-20000 rw-p 00000000 00:00 0\nRss:  64 kB\nAnonHugePages:  64 kB\n\
                     20000-30000 rw-p 00000000 00:00 0 [heap]\nRss: 48 kB\nAnonHugePages: 0 kB\n\
                     40000-50000 rw-p 0 00:00 0\nRss: 0 kB\nPrivate_Hugetlb: 2048 kB\n";
        assert_eq!(share(smaps, 0x10000, 0x20000), Some(1.0));
        assert_eq!(share(smaps, 0x1f000, 0x21000), Some(64.0 / 112.0));
        assert_eq!(share(smaps, 0x40000, 0x41000), Some(1.0));
        assert_eq!(share(smaps, 0x30000, 0x40000), None);
    }
}
