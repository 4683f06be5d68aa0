//! Memory that a guest has given up and the host still holds, until enough of it has come
//! together. Pure: no system call here.

use crate::ranges::{self, Range};
use crate::units::Bytes;

/// Memory that waits at most. A balloon's page numbers come in pieces of 1 MiB (Linux); this is
/// enough of them to find whole huge pages together.
pub const MOST_WAITING: Bytes = Bytes::mib(16);

/// Ranges that wait at most: 64 KiB of them.
const MOST_RANGES: usize = 4096;

/// Given up, not dropped yet.
#[derive(Debug, Default)]
pub struct Pending {
    ranges: Vec<Range>,
    waiting: Bytes,
}

impl Pending {
    /// What waits. A page that was given twice counts twice.
    pub fn waiting(&self) -> Bytes {
        self.waiting
    }

    /// Puts `range` down; returns whether it is time to [`take_whole`](Self::take_whole).
    pub fn push(&mut self, range: Range) -> bool {
        self.waiting = self.waiting.saturating_add(range.len);
        match self.ranges.last_mut().filter(|last| last.end() == range.start.0) {
            Some(last) => last.len = last.len.saturating_add(range.len),
            None => self.ranges.push(range),
        }
        self.is_full()
    }

    fn is_full(&self) -> bool {
        self.waiting >= MOST_WAITING || self.ranges.len() >= MOST_RANGES
    }

    /// The whole blocks of `block` bytes (a power of two) that have come together, sorted and
    /// merged; the rest goes on waiting, where it is at most half of what may. Where it is more, all goes.
    pub fn take_whole(&mut self, block: Bytes) -> Vec<Range> {
        let all = self.take_all();
        let whole: Vec<Range> = all.iter().filter_map(|range| range.whole_pages(block)).collect();
        let sum = |ranges: &[Range]| ranges.iter().map(|range| range.len).sum::<Bytes>();
        let left = sum(&all).saturating_sub(sum(&whole));
        // A range with a middle may have an edge on either side of it.
        let most_left = all.len().saturating_add(whole.len());
        if left.0 > MOST_WAITING.0 / 2 || most_left > MOST_RANGES / 2 {
            return all;
        }
        for range in &all {
            let Some(middle) = range.whole_pages(block) else {
                self.push(*range);
                continue;
            };
            for edge in [range.before(&middle), range.behind(&middle)].into_iter().flatten() {
                self.push(edge);
            }
        }
        whole
    }

    /// All that waits, sorted and merged.
    pub fn take_all(&mut self) -> Vec<Range> {
        self.waiting = Bytes::ZERO;
        let mut ranges = std::mem::take(&mut self.ranges);
        ranges.sort_unstable();
        ranges::merge(&mut ranges);
        ranges
    }

    /// All that waits, sorted and merged, which goes on waiting.
    pub fn ranges(&self) -> Vec<Range> {
        let mut ranges = self.ranges.clone();
        ranges.sort_unstable();
        ranges::merged(ranges.into_iter()).collect()
    }

    /// Forgets what waits: the guest uses it again.
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.waiting = Bytes::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::units::PAGE_SIZE;

    const BLOCK: Bytes = Bytes(8 * PAGE_SIZE);

    fn range(first: u64, count: u64) -> Range {
        Range { start: GuestAddress(first * PAGE_SIZE), len: Bytes(count * PAGE_SIZE) }
    }

    fn pages_of(ranges: &[Range]) -> BTreeSet<u64> {
        ranges.iter().flat_map(|range| range.start.0 / PAGE_SIZE..range.end() / PAGE_SIZE).collect()
    }

    #[test]
    fn halves_of_a_block_find_together() {
        let mut pending = Pending::default();
        assert!(!pending.push(range(0, 4)));
        assert!(!pending.push(range(12, 4)));
        assert!(!pending.push(range(4, 4)));
        assert_eq!(pending.waiting(), Bytes(12 * PAGE_SIZE));
        assert_eq!(pending.take_whole(BLOCK), [range(0, 8)]);
        assert_eq!(pending.waiting(), Bytes(4 * PAGE_SIZE));
        assert_eq!(pending.take_all(), [range(12, 4)]);
        assert_eq!(pending.take_all(), []);
    }

    #[test]
    fn what_never_becomes_whole_does_not_wait_for_ever() {
        let mut pending = Pending::default();
        let mut pages = 0;
        while !pending.push(range(2 * pages, 1)) {
            pages += 1;
        }
        let dropped = pending.take_whole(BLOCK);
        assert_eq!(dropped.len() as u64, pages + 1);
        assert_eq!(pending.waiting(), Bytes::ZERO);
    }

    #[test]
    fn a_bounded_amount_waits() {
        let mut pending = Pending::default();
        assert!(pending.push(range(0, MOST_WAITING.pages().0)));
        pending.clear();
        assert_eq!((pending.take_all(), pending.waiting()), (vec![], Bytes::ZERO));
    }

    proptest! {
        #[test]
        fn each_page_goes_once_and_whole_blocks_first(
            given in vec((0u64..200, 1u64..12), 1..60),
            pieces in 1usize..4,
        ) {
            let mut pending = Pending::default();
            let (mut all, mut gone) = (BTreeSet::new(), BTreeSet::new());
            for part in given.chunks(given.len().div_ceil(pieces)) {
                for (first, count) in part {
                    pending.push(range(*first, *count));
                    all.extend(*first..first + count);
                }
                let whole = pending.take_whole(BLOCK);
                for range in &whole {
                    prop_assert_eq!((range.start.0 | range.len.0) % BLOCK.0, 0);
                }
                gone.extend(pages_of(&whole));
            }
            let rest = pending.take_all();
            for pair in rest.windows(2) {
                prop_assert!(pair[0].end() < pair[1].start.0, "not merged or not sorted");
            }
            gone.extend(pages_of(&rest));
            prop_assert_eq!(gone, all);
        }
    }
}
