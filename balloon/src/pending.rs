//! Memory that a guest has given up and the host still holds, until enough of it has come
//! together. Pure: no system call here.

use vm_memory::GuestAddress;

use crate::ranges::{self, Range};
use api::units::{Bytes, PAGE_SHIFT, PAGE_SIZE, Pages};

/// Whole blocks that wait at most. A balloon's page numbers come in pieces of 1 MiB (Linux); this
/// is enough to make the system calls few.
pub const MOST_WHOLE: Bytes = Bytes::mib(16);

/// Memory of a region that waits at most, where it does not come together to whole blocks. In
/// random order, 256 MiB of 1 GiB are a quarter fewer ranges than pages.
pub const MOST_WAITING: Bytes = Bytes::mib(256);

/// Pages of one region that were given up and not dropped yet. One bit for each 4 KiB, 32 KiB for
/// each GiB; untouched until the first page comes.
pub struct Pending {
    /// The region, from the start of the block in which it starts.
    region: Range,
    /// How large a block is (a power of two, at least a page).
    block: Bytes,
    /// A bit for each page.
    words: Vec<u64>,
    /// How many pages wait, for each block.
    counts: Vec<u32>,
    /// A bit for each block of which any page waits.
    touched: Vec<u64>,
    /// How many blocks wait whole.
    whole: u64,
    waiting: Pages,
}

impl Pending {
    /// For `region`, in blocks of `block` bytes (a power of two, at least 4 KiB).
    pub fn new(region: Range, block: Bytes) -> Self {
        let start = region.start.0 & !block.0.saturating_sub(1);
        let region = Range { start: GuestAddress(start), len: Bytes(region.end().saturating_sub(start)) };
        let blocks = region.len.0.checked_div(block.0).unwrap_or(0).saturating_add(1);
        // As large as the host's own configuration says.
        Self {
            region,
            block,
            words: vec![0; region.len.pages().0.div_ceil(64) as usize],
            counts: vec![0; blocks as usize],
            touched: vec![0; blocks.div_ceil(64) as usize],
            whole: 0,
            waiting: Pages(0),
        }
    }

    /// What waits.
    pub fn waiting(&self) -> Bytes {
        self.waiting.bytes()
    }

    /// Has the whole pages of `range` in the region wait; returns whether it is time to
    /// [`take_ready`](Self::take_ready).
    pub fn push(&mut self, range: Range) -> bool {
        self.set(range, true);
        self.is_full()
    }

    /// The guest uses the whole pages of `range` again: none of them waits any more.
    pub fn remove(&mut self, range: Range) {
        self.set(range, false);
    }

    fn set(&mut self, range: Range, waits: bool) {
        let pages = range.within(&self.region).and_then(|range| range.whole_pages(Bytes(PAGE_SIZE)));
        let Some(pages) = pages else { return };
        let first = pages.offset_in(&self.region) >> PAGE_SHIFT;
        for piece in pieces(first..first.saturating_add(pages.len.pages().0), self.block.pages().0) {
            self.set_piece(&piece, waits);
        }
    }

    fn set_piece(&mut self, piece: &Piece, waits: bool) {
        let (Some(word), Some(count)) = (self.words.get_mut(piece.word), self.counts.get_mut(piece.block))
        else {
            return;
        };
        let changed = piece.bits & if waits { !*word } else { *word };
        let (pages, before) = (changed.count_ones(), *count);
        *word ^= changed;
        *count = if waits { before.saturating_add(pages) } else { before.saturating_sub(pages) };
        let (pages, was_whole) = (u64::from(pages), u64::from(is_whole(before, self.block)));
        self.whole =
            self.whole.saturating_add(u64::from(is_whole(*count, self.block))).saturating_sub(was_whole);
        self.waiting = Pages(if waits {
            self.waiting.0.saturating_add(pages)
        } else {
            self.waiting.0.saturating_sub(pages)
        });
        if let Some(touched) = self.touched.get_mut(piece.block / 64) {
            let bit = 1 << (piece.block % 64);
            *touched = if *count > 0 { *touched | bit } else { *touched & !bit };
        }
    }

    fn is_full(&self) -> bool {
        let whole = Bytes(self.block.0.saturating_mul(self.whole));
        whole >= MOST_WHOLE || self.waiting() >= MOST_WAITING
    }

    /// The blocks that have come together whole, in merged ranges upwards; the rest goes on
    /// waiting. Where all is more than may wait, all goes.
    pub fn take_ready(&mut self, gone: impl FnMut(Range)) {
        let (all, block) = (self.waiting() >= MOST_WAITING, self.block);
        self.take(|count| all || is_whole(count, block), gone);
    }

    /// All that waits, in merged ranges upwards.
    pub fn take_all(&mut self, gone: impl FnMut(Range)) {
        self.take(|_| true, gone);
    }

    fn take(&mut self, goes: impl Fn(u32) -> bool, gone: impl FnMut(Range)) {
        let taken: Vec<usize> = self.touched().filter(|number| goes(self.count(*number))).collect();
        self.ranges_of(taken.iter().copied()).for_each(gone);
        for number in taken {
            self.forget(number);
        }
    }

    /// All that waits, in merged ranges upwards, which goes on waiting.
    pub fn ranges(&self) -> Vec<Range> {
        self.ranges_of(self.touched()).collect()
    }

    /// Forgets what waits: the guest uses it again.
    pub fn clear(&mut self) {
        self.take_all(drop);
    }

    /// The blocks of which any page waits, upwards.
    fn touched(&self) -> impl Iterator<Item = usize> {
        ranges::runs(&self.touched, 0..self.counts.len() as u64).flatten().map(|number| number as usize)
    }

    /// What waits in these blocks, which are sorted.
    fn ranges_of(&self, blocks: impl Iterator<Item = usize>) -> impl Iterator<Item = Range> {
        let runs = blocks.flat_map(|number| ranges::runs(&self.words, self.pages_of(number)));
        ranges::merged(runs.map(|run| {
            let start = self.region.start.0.saturating_add(run.start << PAGE_SHIFT);
            Range { start: GuestAddress(start), len: Pages(run.end.saturating_sub(run.start)).bytes() }
        }))
    }

    fn forget(&mut self, number: usize) {
        for piece in pieces(self.pages_of(number), self.block.pages().0) {
            self.set_piece(&piece, false);
        }
    }

    fn count(&self, number: usize) -> u32 {
        self.counts.get(number).copied().unwrap_or(0)
    }

    /// The numbers of a block's pages in the region.
    fn pages_of(&self, number: usize) -> std::ops::Range<u64> {
        let pages = self.block.pages().0;
        let first = pages.saturating_mul(number as u64);
        first..first.saturating_add(pages).min(self.region.len.pages().0)
    }
}

/// Pages of one block that share a word.
struct Piece {
    block: usize,
    word: usize,
    bits: u64,
}

/// Cuts `pages` where words and blocks of `block` pages (a power of two) end.
fn pieces(pages: std::ops::Range<u64>, block: u64) -> impl Iterator<Item = Piece> {
    let most = block.clamp(1, 64);
    let mut next = pages.start;
    std::iter::from_fn(move || {
        let first = next;
        let count = (most - first % most).min(pages.end.checked_sub(first).filter(|rest| *rest > 0)?);
        next = first.saturating_add(count);
        let bits = (u64::MAX >> 64_u64.saturating_sub(count)) << (first % 64);
        let number = first.checked_div(block).unwrap_or(0);
        Some(Piece { block: number as usize, word: (first / 64) as usize, bits })
    })
}

fn is_whole(count: u32, block: Bytes) -> bool {
    u64::from(count) == block.pages().0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;
    use api::units::PAGE_SIZE;

    const BLOCK: Bytes = Bytes(8 * PAGE_SIZE);

    fn range(first: u64, count: u64) -> Range {
        Range { start: GuestAddress(first * PAGE_SIZE), len: Bytes(count * PAGE_SIZE) }
    }

    fn all(pending: &mut Pending) -> Vec<Range> {
        let mut gone = Vec::new();
        pending.take_all(|range| gone.push(range));
        gone
    }

    fn ready(pending: &mut Pending) -> Vec<Range> {
        let mut gone = Vec::new();
        pending.take_ready(|range| gone.push(range));
        gone
    }

    fn pages_of(ranges: &[Range]) -> BTreeSet<u64> {
        ranges.iter().flat_map(|range| range.start.0 / PAGE_SIZE..range.end() / PAGE_SIZE).collect()
    }

    #[test]
    fn halves_of_a_block_find_together() {
        let mut pending = Pending::new(range(0, 24), BLOCK);
        for (first, count) in [(0, 4), (12, 4), (4, 4)] {
            assert!(!pending.push(range(first, count)));
        }
        assert_eq!(pending.waiting(), Bytes(12 * PAGE_SIZE));
        assert_eq!(ready(&mut pending), [range(0, 8)]);
        assert_eq!(pending.waiting(), Bytes(4 * PAGE_SIZE));
        // The same page again is no news.
        pending.push(range(13, 1));
        assert_eq!(pending.waiting(), Bytes(4 * PAGE_SIZE));
        assert_eq!(all(&mut pending), [range(12, 4)]);
        assert_eq!(all(&mut pending), []);
    }

    #[test]
    fn a_bounded_amount_waits() {
        let gib = range(0, Bytes::gib(1).pages().0);
        let block = Bytes::mib(2);
        let mut pending = Pending::new(gib, block);
        // Whole blocks go soon.
        assert!(!pending.push(range(0, MOST_WHOLE.pages().0 - 1)));
        assert!(pending.push(range(MOST_WHOLE.pages().0 - 1, 1)));
        assert_eq!(ready(&mut pending), [range(0, MOST_WHOLE.pages().0)]);
        // What never comes together goes in the end.
        let mut pages = 0;
        while !pending.push(range(2 * pages, 1)) {
            pages += 1;
        }
        assert_eq!(pending.waiting(), MOST_WAITING);
        assert_eq!(ready(&mut pending).len() as u64, pages + 1);
        assert_eq!(pending.waiting(), Bytes::ZERO);
        // What the guest uses again stays.
        assert!(pending.push(range(0, MOST_WAITING.pages().0)));
        pending.clear();
        assert!(!pending.push(range(0, 1)));
        assert_eq!(all(&mut pending), [range(0, 1)]);
    }

    /// A region may start and end within a block, and nothing outside it is ever named.
    #[test]
    fn a_region_need_not_be_whole_blocks() {
        let mut pending = Pending::new(range(5, 8), BLOCK);
        pending.push(range(5, 100));
        assert_eq!(ready(&mut pending), []);
        assert_eq!(all(&mut pending), [range(5, 8)]);
        pending.push(Range { start: GuestAddress(u64::MAX - 5000), len: Bytes(5000) });
        assert_eq!(pending.ranges(), []);
    }

    proptest! {
        #[test]
        fn each_page_goes_once_and_whole_blocks_first(
            given in vec((0u64..200, 1u64..12, prop::bool::weighted(0.8)), 1..60),
            pieces in 1usize..4,
        ) {
            let mut pending = Pending::new(range(0, 212), BLOCK);
            let (mut given_up, mut gone) = (BTreeSet::new(), BTreeSet::new());
            for part in given.chunks(given.len().div_ceil(pieces)) {
                let mut waits: BTreeSet<u64> = pages_of(&pending.ranges());
                for (first, count, gives) in part {
                    let named = *first..first + count;
                    if *gives {
                        pending.push(range(*first, *count));
                        waits.extend(named);
                    } else {
                        pending.remove(range(*first, *count));
                        waits.retain(|page| !named.contains(page));
                        given_up.retain(|page| gone.contains(page) || !named.contains(page));
                    }
                }
                given_up.extend(&waits);
                prop_assert_eq!(pending.waiting().pages().0, waits.len() as u64);
                let whole = ready(&mut pending);
                for range in &whole {
                    prop_assert_eq!((range.start.0 | range.len.0) % BLOCK.0, 0);
                }
                let block = |page: &u64| (page / 8 * 8..page / 8 * 8 + 8).all(|page| waits.contains(&page));
                prop_assert_eq!(pages_of(&whole), waits.iter().copied().filter(block).collect());
                gone.extend(pages_of(&whole));
            }
            let rest = all(&mut pending);
            for pair in rest.windows(2) {
                prop_assert!(pair[0].end() < pair[1].start.0, "not merged or not sorted");
            }
            gone.extend(pages_of(&rest));
            prop_assert_eq!(gone, given_up);
            prop_assert_eq!(pending.waiting(), Bytes::ZERO);
        }
    }
}
