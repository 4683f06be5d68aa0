//! Page numbers from a guest, turned into ranges that can be discarded. Pure: no system call here.

use vm_memory::GuestAddress;

use crate::units::{Bytes, PAGE_SHIFT, PAGE_SIZE};

/// Guest physical memory from `start`, `len` bytes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// Its first byte.
    pub start: GuestAddress,
    /// How long it is.
    pub len: Bytes,
}

impl Range {
    /// The byte after the last; saturates at the end of the address space.
    pub const fn end(&self) -> u64 {
        self.start.0.saturating_add(self.len.0)
    }

    fn between(start: u64, end: u64) -> Option<Self> {
        let len = end.checked_sub(start).filter(|len| *len > 0)?;
        Some(Self { start: GuestAddress(start), len: Bytes(len) })
    }

    /// The part of this range inside `other`; `None` where there is none.
    pub fn within(&self, other: &Self) -> Option<Self> {
        Self::between(self.start.0.max(other.start.0), self.end().min(other.end()))
    }

    /// The whole pages of `page` bytes (a power of two) in this range; `None`
    /// where it holds none. A page that is given only in part is not touched.
    pub fn whole_pages(&self, page: Bytes) -> Option<Self> {
        let mask = page.0.checked_sub(1)?;
        let start = self.start.0.checked_add(mask)? & !mask;
        Self::between(start, self.end() & !mask)
    }

    /// The same range, counted from the start of `region`, which holds it.
    pub(crate) fn offset_in(&self, region: &Self) -> u64 {
        self.start.0.saturating_sub(region.start.0)
    }
}

/// Sorted, merged ranges of the pages in `pfns` (page numbers of 4 KiB,
/// virtio 1.2, section 5.5.6), which is sorted in place. A page that is named
/// twice counts once.
pub fn of_pages(pfns: &mut [u32]) -> impl Iterator<Item = Range> {
    pfns.sort_unstable();
    merged(
        pfns.iter()
            .map(|pfn| Range { start: GuestAddress(u64::from(*pfn) << PAGE_SHIFT), len: Bytes(PAGE_SIZE) }),
    )
}

/// Ranges that are sorted by their start, with those that touch or overlap made one.
pub fn merged(sorted: impl Iterator<Item = Range>) -> impl Iterator<Item = Range> {
    let mut sorted = sorted.peekable();
    std::iter::from_fn(move || {
        let mut range = sorted.next()?;
        while let Some(next) = sorted.next_if(|next| next.start.0 <= range.end()) {
            let end = range.end().max(next.end());
            range.len = Bytes(end.saturating_sub(range.start.0));
        }
        Some(range)
    })
}

/// Which 4 KiB pages of a region on huge pages the guest has given up.
///
/// The host can only take a huge page back whole: one that is given up in part
/// waits here for the rest. One bit for each 4 KiB, 32 KiB for each GiB.
pub struct PartlyGiven {
    words: Vec<u64>,
    huge: Bytes,
    len: Bytes,
}

impl PartlyGiven {
    /// For a region of `len` bytes on pages of `huge` bytes (a power of two, at least 4 KiB).
    pub fn new(len: Bytes, huge: Bytes) -> Self {
        let pages = len.pages().0;
        // As large as the host's own configuration says.
        Self { words: vec![0; pages.div_ceil(64) as usize], huge, len }
    }

    /// Marks `given` (counted from the region's start) as given up and returns
    /// the huge pages it touches that are now given up as a whole, merged.
    pub fn give(&mut self, given: Range) -> Vec<Range> {
        let Some(given) = self.set(given, true) else { return Vec::new() };
        let mask = self.huge.0 - 1;
        let mut complete: Vec<Range> = Vec::new();
        let mut huge = given.start.0 & !mask;
        while huge < given.end() {
            let page = Range { start: GuestAddress(huge), len: self.huge };
            if page.end() <= self.len.0 && self.is_given(page) {
                match complete.last_mut().filter(|last| last.end() == huge) {
                    Some(last) => last.len += self.huge,
                    None => complete.push(page),
                }
            }
            huge = page.end();
        }
        complete
    }

    /// The guest uses `taken` again (counted from the region's start).
    pub fn take_back(&mut self, taken: Range) {
        self.set(taken, false);
    }

    /// The guest uses everything again.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Sets the bits of whole pages inside the region; returns what was inside.
    fn set(&mut self, range: Range, given: bool) -> Option<Range> {
        let all = Range { start: GuestAddress(0), len: self.len };
        let range = range.within(&all)?.whole_pages(Bytes(PAGE_SIZE))?;
        for page in range.start.0 >> PAGE_SHIFT..range.end() >> PAGE_SHIFT {
            let Some(word) = self.words.get_mut((page / 64) as usize) else { break };
            let bit = 1 << (page % 64);
            *word = if given { *word | bit } else { *word & !bit };
        }
        Some(range)
    }

    fn is_given(&self, range: Range) -> bool {
        (range.start.0 >> PAGE_SHIFT..range.end() >> PAGE_SHIFT)
            .all(|page| self.words.get((page / 64) as usize).is_some_and(|word| word & 1 << (page % 64) != 0))
    }
}
