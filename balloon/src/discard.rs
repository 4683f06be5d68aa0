//! Gives guest memory back to the host: one policy for each kind of backing.

use vm_memory::GuestAddress;

pub use crate::advise::Discarded;

use crate::advise::Batch;
use crate::ranges::{self, PartlyGiven, Range};
use crate::units::{Bytes, PAGE_SIZE};

/// What lies behind a region of guest memory, which decides what call gives it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory: `MADV_DONTNEED`.
    Anonymous,
    /// A memfd or tmpfs file, mapped shared and writable: `MADV_REMOVE`, which
    /// punches a hole in the file; dropping the mapping alone would keep its pages.
    SharedMemfd,
    /// Huge pages of `page` bytes, given back whole or not at all: a private
    /// mapping with `MADV_DONTNEED` (Linux 5.18 or later), a shared one with `MADV_REMOVE`.
    Hugetlb {
        /// Mapped shared (from a memfd or hugetlbfs file).
        shared: bool,
        /// The size of a huge page.
        page: Bytes,
    },
}

impl Backing {
    fn advice(self) -> libc::c_int {
        match self {
            Self::Anonymous | Self::Hugetlb { shared: false, .. } => libc::MADV_DONTNEED,
            Self::SharedMemfd | Self::Hugetlb { shared: true, .. } => libc::MADV_REMOVE,
        }
    }

    /// The least that the host can take back.
    fn page(self) -> Bytes {
        match self {
            Self::Anonymous | Self::SharedMemfd => Bytes(PAGE_SIZE),
            Self::Hugetlb { page, .. } => page,
        }
    }
}

/// One region of guest RAM and where it is mapped here.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Its first byte as the guest sees it.
    pub guest: GuestAddress,
    /// Its first byte as this process sees it, on a page boundary of its backing.
    pub host: *mut u8,
    /// How long it is.
    pub len: Bytes,
    /// What lies behind it.
    pub backing: Backing,
}

struct Mapped {
    region: Region,
    range: Range,
    /// Only for huge pages.
    partly_given: Option<PartlyGiven>,
}

impl Mapped {
    fn new(region: Region) -> Self {
        let partly_given = match region.backing {
            Backing::Hugetlb { page, .. } => Some(PartlyGiven::new(region.len, page)),
            _ => None,
        };
        Self { region, range: Range { start: region.guest, len: region.len }, partly_given }
    }
}

/// Gives memory of one guest back to the host.
pub struct Discard {
    regions: Vec<Mapped>,
    batch: Batch,
}

// SAFETY: the pointers in it are addresses of guest memory for madvise, which any thread may call.
unsafe impl Send for Discard {}

impl Discard {
    /// For guest RAM in `regions`, which don't overlap.
    ///
    /// # Safety
    /// Each region's `len` bytes at `host` must be guest RAM, mapped as its
    /// `backing` says for as long as the `Discard` lives, and reached only as
    /// memory that may change at any time, never through references: their
    /// content turns to zeros when the guest gives it up.
    pub unsafe fn new(regions: Vec<Region>) -> Self {
        Self { regions: regions.into_iter().map(Mapped::new).collect(), batch: Batch::new() }
    }

    /// What discards have done so far.
    pub fn done(&self) -> Discarded {
        self.batch.done()
    }

    /// The guest has put the pages `pfns` (of 4 KiB) into its balloon. Returns
    /// how much of it is guest RAM. Pages elsewhere are left alone.
    pub fn give_up(&mut self, pfns: &mut [u32]) -> Bytes {
        let mut given = Bytes::ZERO;
        for range in ranges::of_pages(pfns) {
            for mapped in &mut self.regions {
                let Some(part) = range.within(&mapped.range) else { continue };
                given += part.len;
                match &mut mapped.partly_given {
                    None => discard(&mapped.region, &mapped.range, part, &mut self.batch),
                    Some(bits) => {
                        let from_start =
                            Range { start: GuestAddress(part.offset_in(&mapped.range)), len: part.len };
                        for huge in bits.give(from_start) {
                            let start = GuestAddress(huge.start.0.saturating_add(mapped.range.start.0));
                            let whole = Range { start, len: huge.len };
                            discard(&mapped.region, &mapped.range, whole, &mut self.batch);
                        }
                    }
                }
            }
        }
        self.batch.flush();
        given
    }

    /// The guest takes the pages `pfns` (of 4 KiB) out of its balloon; the host
    /// gives it memory when it touches them. Returns how much of it is guest RAM.
    pub fn take_back(&mut self, pfns: &mut [u32]) -> Bytes {
        let mut taken = Bytes::ZERO;
        for range in ranges::of_pages(pfns) {
            for mapped in &mut self.regions {
                let Some(part) = range.within(&mapped.range) else { continue };
                taken += part.len;
                if let Some(bits) = &mut mapped.partly_given {
                    bits.take_back(Range {
                        start: GuestAddress(part.offset_in(&mapped.range)),
                        len: part.len,
                    });
                }
            }
        }
        taken
    }

    /// The guest has nothing in its balloon any more.
    pub fn take_back_all(&mut self) {
        for bits in self.regions.iter_mut().filter_map(|mapped| mapped.partly_given.as_mut()) {
            bits.clear();
        }
    }

    /// Drops free memory that the guest keeps to use as it likes: only what
    /// holds whole pages of the host, as nobody says when it is used again.
    /// Sorts `free` in place. Returns how much of it is guest RAM.
    pub fn drop_free(&mut self, free: &mut [Range]) -> Bytes {
        free.sort_unstable();
        let mut reported = Bytes::ZERO;
        for range in ranges::merged(free.iter().copied()) {
            for mapped in &self.regions {
                let Some(part) = range.within(&mapped.range) else { continue };
                reported += part.len;
                if let Some(whole) = part.whole_pages(mapped.region.backing.page()) {
                    discard(&mapped.region, &mapped.range, whole, &mut self.batch);
                }
            }
        }
        self.batch.flush();
        reported
    }
}

/// Puts `part`, whole host pages inside `range`, down to go back to the host.
fn discard(region: &Region, range: &Range, part: Range, batch: &mut Batch) {
    let (Ok(offset), Ok(len)) = (usize::try_from(part.offset_in(range)), usize::try_from(part.len.0)) else {
        return;
    };
    // SAFETY: `part` lies in `range`, which is the region that `Discard::new`'s caller vouches for.
    unsafe { batch.push(region.host.add(offset), len, region.backing.advice()) };
}
