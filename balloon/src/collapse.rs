//! Keeps the host from bringing memory back that was given up. Pure: no system call here.
//!
//! Linux's khugepaged puts huge pages together out of small ones. Where only a part of a block is
//! there it fills the rest with zeros: with its default (`max_ptes_none`, 511 of 512 pages) one page
//! that was touched lately is enough, and all that a guest gave up of the block is back, for good.
//! A block of which only a part went is closed to that (`MADV_NOHUGEPAGE`) until it goes whole or
//! the guest has taken everything back.
//!
//! Each run of closed blocks is a mapping of its own in the kernel, which allows a process only so
//! many (`vm.max_map_count`). So the runs are bounded: where one more would be too many, the gap to
//! the nearest is closed too, and a block in the middle of a run stays closed. Blocks in between
//! lose their chance of a huge page then; what a guest gave up never comes back.
//!
//! No advice undoes another, so what was closed and opened again is advised to be huge
//! (`MADV_HUGEPAGE`), also where the host gives huge pages unasked and nobody had advised anything.
//! So that there are no runs of a third kind, the first block that is closed has all of the region
//! advised so. Faults there may then wait for the host to free a huge page (`defrag`). To close all
//! memory for good would need one mapping, and would cost a guest all its huge pages.

use crate::blocks::BLOCK;
use crate::ranges::{self, Range};
use api::units::Bytes;

/// Runs of closed blocks in a region at most. The mappings of three regions are then fewer than
/// half of the 65530 that Linux allows by default, and 16 GiB can have every second block closed.
pub const MOST_RUNS: usize = 4096;

/// What the host is to be told of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Whole blocks, but where the region starts or ends within one.
    pub range: Range,
    /// Whether it may put huge pages together there from now on.
    pub huge: bool,
}

/// Which blocks of a region are closed to huge pages.
pub struct Closed {
    region: Range,
    /// One bit a block.
    bits: Vec<u64>,
    blocks: usize,
    runs: usize,
    most_runs: usize,
    /// Whether all that is not closed is advised to be huge.
    advised: bool,
    /// What the host was not told yet.
    changes: Vec<Change>,
}

impl Closed {
    /// For a region of which no block is closed.
    pub fn new(region: Range) -> Self {
        Self::with_runs(region, MOST_RUNS)
    }

    fn with_runs(region: Range, most_runs: usize) -> Self {
        let last = region.end().saturating_add(BLOCK.0 - 1) / BLOCK.0;
        let blocks = usize::try_from(last.saturating_sub(region.start.0 / BLOCK.0)).unwrap_or(0);
        // As large as the host's own configuration says: 8 bytes for each 128 MiB.
        let bits = vec![0; blocks.div_ceil(64)];
        Self { region, bits, blocks, runs: 0, most_runs, advised: false, changes: Vec::new() }
    }

    /// A part of the block that holds `address` goes, and must not come back.
    pub fn close(&mut self, address: u64) {
        let Some(block) = self.block_of(address).filter(|block| !self.is_closed(*block)) else { return };
        let beside = self.beside(block);
        let blocks = if beside > 0 || self.runs < self.most_runs {
            block..block + 1
        } else {
            match self.gap_to_nearest(block) {
                Some(gap) => gap,
                None => return,
            }
        };
        self.set(blocks, false);
    }

    /// The block that holds `address` went whole.
    pub fn open(&mut self, address: u64) {
        let Some(block) = self.block_of(address).filter(|block| self.is_closed(*block)) else { return };
        if self.beside(block) < 2 || self.runs < self.most_runs {
            self.set(block..block + 1, true);
        }
    }

    /// The guest has everything back.
    pub fn open_all(&mut self) {
        self.most_runs = self.most_runs.max(MOST_RUNS);
        if self.runs > 0 {
            self.bits.fill(0);
            self.runs = 0;
            self.changes.clear();
            self.changes.push(Change { range: self.region, huge: true });
        }
    }

    /// Takes what the host is to be told, in order.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// The host refused `change`: it has no mappings left. Those there are must do from now on.
    pub fn refused(&mut self, change: Change) {
        // Of all of the region: takes no mappings.
        if change.range == self.region {
            return;
        }
        let first = self.block_of(change.range.start.0);
        let last = self.block_of(change.range.end().saturating_sub(1));
        let (Some(first), Some(last)) = (first, last) else { return };
        for block in first..=last {
            self.put(block, change.huge);
        }
        self.runs = ranges::runs(&self.bits, 0..self.blocks as u64).count();
        self.most_runs = self.runs;
    }

    /// Closes or opens `blocks`, all of which were otherwise.
    fn set(&mut self, blocks: std::ops::Range<usize>, huge: bool) {
        let (Some(last), start) = (blocks.end.checked_sub(1), blocks.start) else { return };
        if !std::mem::replace(&mut self.advised, true) {
            self.changes.push(Change { range: self.region, huge: true });
        }
        let left = start.checked_sub(1).is_some_and(|left| self.is_closed(left));
        let beside = usize::from(left) + usize::from(self.is_closed(last + 1));
        for block in blocks {
            self.put(block, !huge);
        }
        // To close joins the neighbours to one run; to open parts them.
        self.runs = if huge {
            (self.runs + beside).saturating_sub(1)
        } else {
            (self.runs + 1).saturating_sub(beside)
        };
        let range = Range {
            start: self.address_of(start),
            len: Bytes(BLOCK.0.saturating_mul((last - start + 1) as u64)),
        };
        let Some(range) = range.within(&self.region) else { return };
        match self
            .changes
            .last_mut()
            .filter(|change| change.huge == huge && change.range.end() == range.start.0)
        {
            Some(change) => change.range.len = change.range.len.saturating_add(range.len),
            None => self.changes.push(Change { range, huge }),
        }
    }

    /// The blocks from `block` to the nearest closed one, without that.
    fn gap_to_nearest(&self, block: usize) -> Option<std::ops::Range<usize>> {
        let end = self.blocks as u64;
        let before = self.last_before(block);
        let behind = ranges::runs(&self.bits, block as u64..end).next().map(|run| run.start as usize);
        match (before, behind) {
            (Some(before), Some(behind)) if behind - block < block - before => Some(block..behind),
            (Some(before), _) => Some(before + 1..block + 1),
            (None, Some(behind)) => Some(block..behind),
            (None, None) => None,
        }
    }

    /// The last closed block before `block`.
    fn last_before(&self, block: usize) -> Option<usize> {
        let words = self.bits.get(..block.div_ceil(64))?.iter().enumerate().rev();
        words.into_iter().find_map(|(number, word)| {
            let word = if number == block / 64 { word & ((1 << (block % 64)) - 1) } else { *word };
            word.checked_ilog2().map(|bit| number * 64 + bit as usize)
        })
    }

    /// How many of its two neighbours are closed.
    fn beside(&self, block: usize) -> usize {
        let left = block.checked_sub(1).is_some_and(|left| self.is_closed(left));
        usize::from(left) + usize::from(self.is_closed(block + 1))
    }

    fn is_closed(&self, block: usize) -> bool {
        self.bits.get(block / 64).is_some_and(|word| word & 1 << (block % 64) != 0)
    }

    fn put(&mut self, block: usize, closed: bool) {
        let Some(word) = self.bits.get_mut(block / 64) else { return };
        let bit = 1 << (block % 64);
        if closed { *word |= bit } else { *word &= !bit }
    }

    fn block_of(&self, address: u64) -> Option<usize> {
        let block = (address / BLOCK.0).checked_sub(self.region.start.0 / BLOCK.0)?;
        usize::try_from(block).ok().filter(|block| *block < self.blocks)
    }

    fn address_of(&self, block: usize) -> vm_memory::GuestAddress {
        let first = self.region.start.0 / BLOCK.0;
        vm_memory::GuestAddress(first.saturating_add(block as u64).saturating_mul(BLOCK.0))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    const START: u64 = 1 << 30;

    fn closed(blocks: u64, most_runs: usize) -> Closed {
        Closed::with_runs(Range { start: GuestAddress(START), len: Bytes(blocks * BLOCK.0) }, most_runs)
    }

    fn at(block: u64) -> u64 {
        START + block * BLOCK.0 + 5 * 4096
    }

    fn change(first: u64, count: u64, huge: bool) -> Change {
        Change {
            range: Range { start: GuestAddress(START + first * BLOCK.0), len: Bytes(count * BLOCK.0) },
            huge,
        }
    }

    #[test]
    fn neighbours_are_one_call_and_nothing_is_told_twice() {
        let mut closed = closed(100, MOST_RUNS);
        for block in [3, 3, 4, 9] {
            closed.close(at(block));
        }
        assert_eq!(closed.take_changes(), [change(0, 100, true), change(3, 2, false), change(9, 1, false)]);
        closed.close(at(4));
        closed.open(at(5));
        closed.open(at(3));
        assert_eq!(closed.take_changes(), [change(3, 1, true)]);
        closed.open_all();
        closed.open_all();
        assert_eq!(closed.take_changes(), [change(0, 100, true)]);
        closed.open_all();
        assert_eq!(closed.take_changes(), []);
    }

    #[test]
    fn what_would_be_one_run_too_many_joins_the_nearest() {
        let mut closed = closed(100, 2);
        for block in [10, 20, 17, 90, 2] {
            closed.close(at(block));
        }
        let told = [(10, 1), (20, 1), (17, 3), (21, 70), (2, 8)];
        let told = told.map(|(first, count)| change(first, count, false));
        assert_eq!(closed.take_changes()[1..], told);
        // To open one in the middle would make three runs of two; at an end it would not.
        closed.open(at(50));
        assert_eq!(closed.take_changes(), []);
        closed.open(at(90));
        assert_eq!(closed.take_changes(), [change(90, 1, true)]);
    }

    #[test]
    fn a_host_without_mappings_left_is_asked_for_no_more() {
        let mut closed = closed(100, MOST_RUNS);
        closed.close(at(10));
        assert_eq!(closed.take_changes()[1..], [change(10, 1, false)]);
        closed.close(at(15));
        for refused in closed.take_changes() {
            closed.refused(refused);
        }
        closed.close(at(15));
        assert_eq!(closed.take_changes(), [change(11, 5, false)], "no mapping more than before");
    }

    proptest! {
        #[test]
        fn broken_blocks_are_closed_in_no_more_runs_than_may_be(
            steps in vec((0u64..150, any::<bool>()), 1..300), most in 1usize..8,
        ) {
            let mut closed = closed(140, most);
            closed.advised = true;
            let (mut broken, mut told) = (BTreeSet::new(), BTreeSet::new());
            for (block, close) in steps {
                if close {
                    closed.close(at(block));
                    broken.insert(block);
                } else {
                    closed.open(at(block));
                    broken.remove(&block);
                }
                for Change { range, huge } in closed.take_changes() {
                    prop_assert!(range.start.0 >= START && range.end() <= START + 140 * BLOCK.0);
                    for block in (range.start.0 - START) / BLOCK.0..(range.end() - START) / BLOCK.0 {
                        prop_assert!(if huge { told.remove(&block) } else { told.insert(block) }, "told twice");
                    }
                }
                prop_assert!(broken.iter().filter(|block| **block < 140).all(|block| told.contains(block)));
                let runs = told.iter().filter(|block| !told.contains(&(*block + 1))).count();
                prop_assert_eq!(runs, closed.runs);
                prop_assert!(runs <= most);
            }
        }
    }
}
