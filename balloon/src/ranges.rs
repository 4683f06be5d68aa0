//! Page numbers from a guest, turned into ranges that can be discarded. Pure: no system call here.

use vm_memory::GuestAddress;

use api::units::{Bytes, PAGE_SHIFT, PAGE_SIZE, Pages};

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

    /// The part of this range in front of `other`; `None` where there is none.
    pub fn before(&self, other: &Self) -> Option<Self> {
        Self::between(self.start.0, self.end().min(other.start.0))
    }

    /// The part of this range behind `other`; `None` where there is none.
    pub fn behind(&self, other: &Self) -> Option<Self> {
        Self::between(self.start.0.max(other.end()), self.end())
    }

    /// Makes `next`, which starts no earlier, a part of this range where the two touch or overlap.
    fn takes_in(&mut self, next: &Self) -> bool {
        let touches = next.start.0 <= self.end();
        if touches {
            let end = self.end().max(next.end());
            self.len = Bytes(end.saturating_sub(self.start.0));
        }
        touches
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
    // Takes one pass where they are sorted already, as they mostly are.
    pfns.sort_unstable();
    let run = |run: &[u32]| {
        let (first, last) = (*run.first()?, *run.last()?);
        Some(pages_from(first, u64::from(last.saturating_sub(first)).saturating_add(1)))
    };
    pfns.chunk_by(|page, next| next.wrapping_sub(*page) <= 1).filter_map(run)
}

/// How many of the pages `pfns` lie in `range`. One that is named twice counts twice.
pub(crate) fn pages_inside(pfns: &[u32], range: &Range) -> Pages {
    let (first, end) = (range.start.0 >> PAGE_SHIFT, range.end() >> PAGE_SHIFT);
    let (Ok(first), Some(last)) = (u32::try_from(first), end.checked_sub(1)) else { return Pages(0) };
    let Some(more) = u32::try_from(last).unwrap_or(u32::MAX).checked_sub(first) else { return Pages(0) };
    // Without branches, and no wider than the numbers: four or eight at a time.
    let is_inside = |pfn: &u32| u32::from(pfn.wrapping_sub(first) <= more);
    Pages(pfns.chunks(1 << 16).map(|some| u64::from(some.iter().map(is_inside).sum::<u32>())).sum())
}

fn pages_from(first: u32, count: u64) -> Range {
    Range { start: GuestAddress(u64::from(first) << PAGE_SHIFT), len: Bytes(count << PAGE_SHIFT) }
}

/// Ranges that are sorted by their start, with those that touch or overlap made one.
pub fn merged(sorted: impl Iterator<Item = Range>) -> impl Iterator<Item = Range> {
    let mut sorted = sorted.peekable();
    std::iter::from_fn(move || {
        let mut range = sorted.next()?;
        while sorted.next_if(|next| range.takes_in(next)).is_some() {}
        Some(range)
    })
}

/// Which bits of `words` are set among those in `within`, as runs that don't touch each other, upwards.
pub(crate) fn runs(
    words: &[u64],
    within: std::ops::Range<u64>,
) -> impl Iterator<Item = std::ops::Range<u64>> {
    let end = within.end;
    let words = usize::try_from(end.div_ceil(64)).ok().and_then(|count| words.get(..count)).unwrap_or(words);
    let first = move |from: u64, set: bool| {
        let rest = usize::try_from(from / 64).ok().and_then(|word| words.get(word..))?;
        let found = rest.iter().zip(from / 64..).find_map(|(bits, word)| {
            let bits = if set { *bits } else { !bits };
            let bits = if word == from / 64 { bits >> (from % 64) << (from % 64) } else { bits };
            (bits != 0).then(|| word.saturating_mul(64).saturating_add(u64::from(bits.trailing_zeros())))
        });
        found.filter(|bit| *bit < end)
    };
    let mut next = within.start;
    std::iter::from_fn(move || {
        let start = first(next, true)?;
        next = first(start, false).unwrap_or(end);
        Some(start..next)
    })
}

/// Which 4 KiB pages of a region on huge pages the guest has given up.
///
/// The host can only take a huge page back whole: one that is given up in part
/// waits here for the rest. One bit for each 4 KiB, 32 KiB for each GiB.
pub struct PartlyGiven {
    /// A bit for each page.
    words: Vec<u64>,
    /// How many bits are set, for each huge page.
    given: Vec<u32>,
    /// How many are set in all that is not given up whole.
    waiting: Pages,
    huge: Bytes,
    len: Bytes,
}

impl PartlyGiven {
    /// For a region of `len` bytes on pages of `huge` bytes (a power of two, at least 4 KiB).
    pub fn new(len: Bytes, huge: Bytes) -> Self {
        let whole = len.0.checked_div(huge.0).unwrap_or(0);
        // As large as the host's own configuration says.
        Self {
            words: vec![0; len.pages().0.div_ceil(64) as usize],
            given: vec![0; whole as usize],
            waiting: Pages(0),
            huge,
            len,
        }
    }

    /// Marks `range` (counted from the region's start) as given up and returns
    /// the huge pages that this completes, merged.
    pub fn give(&mut self, range: Range) -> Vec<Range> {
        let mut complete: Vec<Range> = Vec::new();
        for page in self.pages_in(range) {
            let Some(start) = self.give_page(page) else { continue };
            match complete.last_mut().filter(|last| last.end() == start) {
                Some(last) => last.len += self.huge,
                None => complete.push(Range { start: GuestAddress(start), len: self.huge }),
            }
        }
        complete
    }

    /// The guest uses `range` again (counted from the region's start).
    pub fn take_back(&mut self, range: Range) {
        for page in self.pages_in(range) {
            let Some((word, bit)) = self.bit(page).filter(|(word, bit)| **word & bit != 0) else { continue };
            *word &= !bit;
            let (huge_page, all) = (self.huge_page_of(page), self.huge.pages().0);
            let mut waited = 1;
            if let Some(given) = self.given.get_mut(huge_page) {
                // The host brings all of one in that was gone.
                let was_whole = u64::from(*given) == all;
                *given = given.saturating_sub(1);
                if was_whole {
                    self.waiting = Pages(self.waiting.0.saturating_add(u64::from(*given)));
                    waited = 0;
                }
            }
            self.waiting = Pages(self.waiting.0.saturating_sub(waited));
        }
    }

    /// How much is given up that the host can't take, as a part of its huge page is not.
    pub fn waiting(&self) -> Bytes {
        self.waiting.bytes()
    }

    /// What is given up (counted from the region's start), upwards.
    pub fn ranges(&self) -> impl Iterator<Item = Range> {
        runs(&self.words, 0..self.len.pages().0).map(|run| Range {
            start: GuestAddress(run.start << PAGE_SHIFT),
            len: Pages(run.end - run.start).bytes(),
        })
    }

    /// The guest uses everything again.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.given.fill(0);
        self.waiting = Pages(0);
    }

    /// Marks one page; where that completes its huge page, says where it starts.
    fn give_page(&mut self, page: u64) -> Option<u64> {
        let (word, bit) = self.bit(page).filter(|(word, bit)| **word & bit == 0)?;
        *word |= bit;
        self.waiting = Pages(self.waiting.0.saturating_add(1));
        let (huge_page, all) = (self.huge_page_of(page), self.huge.pages().0);
        let given = self.given.get_mut(huge_page)?;
        *given += 1;
        let is_whole = u64::from(*given) == all;
        if is_whole {
            self.waiting = Pages(self.waiting.0.saturating_sub(all));
        }
        is_whole.then_some(huge_page as u64 * self.huge.0)
    }

    /// The numbers of the whole pages of `range` that lie inside the region.
    fn pages_in(&self, range: Range) -> std::ops::Range<u64> {
        let all = Range { start: GuestAddress(0), len: self.len };
        range
            .within(&all)
            .and_then(|range| range.whole_pages(Bytes(PAGE_SIZE)))
            .map_or(0..0, |range| range.start.0 >> PAGE_SHIFT..range.end() >> PAGE_SHIFT)
    }

    fn bit(&mut self, page: u64) -> Option<(&mut u64, u64)> {
        Some((self.words.get_mut((page / 64) as usize)?, 1 << (page % 64)))
    }

    fn huge_page_of(&self, page: u64) -> usize {
        page.checked_div(self.huge.pages().0).unwrap_or(0) as usize
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, len: u64) -> Range {
        Range { start: GuestAddress(start), len: Bytes(len) }
    }

    fn pages_of(ranges: &[Range]) -> BTreeSet<u64> {
        ranges.iter().flat_map(|range| range.start.0 >> PAGE_SHIFT..range.end() >> PAGE_SHIFT).collect()
    }

    #[test]
    fn neighbours_and_repeats_become_one_range() {
        let ranges: Vec<_> = of_pages(&mut [7, 3, 4, 3, 5, u32::MAX]).collect();
        let last = u64::from(u32::MAX) << PAGE_SHIFT;
        assert_eq!(ranges, [range(0x3000, 0x3000), range(0x7000, 0x1000), range(last, 0x1000)]);
    }

    #[test]
    fn whole_pages_never_reach_past_what_was_given() {
        let huge = Bytes::mib(2);
        assert_eq!(range(0, 2 << 20).whole_pages(huge), Some(range(0, 2 << 20)));
        assert_eq!(range(0x1000, 4 << 20).whole_pages(huge), Some(range(2 << 20, 2 << 20)));
        assert_eq!(range(0x1000, 2 << 20).whole_pages(huge), None);
        assert_eq!(range(u64::MAX - 10, 10).whole_pages(huge), None);
    }

    #[test]
    fn a_huge_page_goes_when_its_last_part_is_given_and_only_once() {
        let huge = 2 << 20;
        let mut bits = PartlyGiven::new(Bytes(3 * huge), Bytes(huge));
        assert_eq!(bits.give(range(0, huge - 0x1000)), []);
        assert_eq!(bits.give(range(0, huge - 0x1000)), []);
        assert_eq!(bits.give(range(huge - 0x1000, 0x1000)), [range(0, huge)]);
        assert_eq!(bits.give(range(0, huge)), []);
        assert_eq!(bits.give(range(0, 3 * huge)), [range(huge, 2 * huge)]);
        bits.take_back(range(huge, 0x1000));
        assert_eq!(bits.give(range(huge, 0x1000)), [range(huge, huge)]);
        bits.clear();
        assert_eq!(bits.give(range(0x1000, huge)), []);
    }

    proptest! {
        #[test]
        fn ranges_hold_each_page_once_and_nothing_else(mut pfns in vec(prop_oneof![0u32..64, any::<u32>()], 0..200)) {
            let given: BTreeSet<u64> = pfns.iter().map(|pfn| u64::from(*pfn)).collect();
            let ranges: Vec<_> = of_pages(&mut pfns).collect();
            prop_assert_eq!(pages_of(&ranges), given);
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end() < pair[1].start.0, "not merged or not sorted");
            }
        }

        #[test]
        fn pages_inside_are_those_inside(
            pfns in vec(prop_oneof![0u32..64, any::<u32>()], 0..200),
            first in prop_oneof![0u64..64, 0u64..1 << 33],
            count in prop_oneof![0u64..64, 0u64..1 << 33],
        ) {
            let range = range(first << PAGE_SHIFT, count << PAGE_SHIFT);
            let inside = pfns.iter().filter(|pfn| (first..first + count).contains(&u64::from(**pfn))).count();
            prop_assert_eq!(pages_inside(&pfns, &range), Pages(inside as u64));
        }

        #[test]
        fn clamped_ranges_lie_in_both(a in any::<[u64; 2]>(), b in any::<[u64; 2]>(), shift in 12u32..31) {
            let (a, b) = (range(a[0], a[1]), range(b[0], b[1]));
            if let Some(both) = a.within(&b) {
                prop_assert!(both.start >= a.start && both.start >= b.start);
                prop_assert!(both.end() <= a.end() && both.end() <= b.end());
            }
            if let Some(whole) = a.whole_pages(Bytes(1 << shift)) {
                prop_assert!(whole.start >= a.start && whole.end() <= a.end());
                prop_assert_eq!((whole.start.0 | whole.len.0) & ((1 << shift) - 1), 0);
            }
        }

        /// Against the plain model: a set of pages.
        #[test]
        fn a_huge_page_goes_only_when_all_of_it_is_given(
            steps in vec((any::<bool>(), 0u64..40, 1u64..12), 1..100),
        ) {
            // Huge pages of 8 pages, and a tail that is none.
            let (huge, pages) = (8 * PAGE_SIZE, 36);
            let mut bits = PartlyGiven::new(Bytes(pages * PAGE_SIZE), Bytes(huge));
            let mut model = BTreeSet::new();
            for (give, first, count) in steps {
                let step = range(first * PAGE_SIZE, count * PAGE_SIZE);
                prop_assert_eq!(pages_of(&bits.ranges().collect::<Vec<_>>()), model.clone());
                let whole = |page: u64| page < 32 && (page / 8 * 8..page / 8 * 8 + 8).all(|page| model.contains(&page));
                let parts = model.iter().filter(|page| !whole(**page)).count();
                prop_assert_eq!(bits.waiting(), Pages(parts as u64).bytes());
                let before = model.clone();
                let touched: BTreeSet<u64> = (first..first + count).filter(|page| *page < pages).collect();
                if !give {
                    bits.take_back(step);
                    model.retain(|page| !touched.contains(page));
                    continue;
                }
                model.extend(&touched);
                let is_whole = |pages: &BTreeSet<u64>, at: u64| (8 * at..8 * at + 8).all(|page| pages.contains(&page));
                let expected: BTreeSet<u64> = (0..pages / 8)
                    .filter(|at| is_whole(&model, *at) && !is_whole(&before, *at))
                    .flat_map(|at| 8 * at..8 * at + 8)
                    .collect();
                prop_assert_eq!(pages_of(&bits.give(step)), expected);
            }
        }
    }
}
