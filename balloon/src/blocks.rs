//! What becomes of the host's transparent huge pages when memory is dropped. Pure.
//!
//! The host drops a huge page that goes whole in one step, and backs the next
//! touch of it with a huge page again. One of which only a part goes is split;
//! its pages are brought in alone then, or by khugepaged, which
//! [`collapse`](crate::collapse) keeps away.

use crate::ranges::Range;
use api::units::Bytes;

/// The size of a transparent huge page of the host (x86-64: one entry of a page directory).
pub const BLOCK: Bytes = Bytes::mib(2);

/// Which blocks of a region have been split.
pub struct Blocks {
    /// All of the region.
    region: Range,
    /// One bit a block.
    broken: Vec<u64>,
}

impl Blocks {
    /// For a region none of whose blocks has been split.
    pub fn new(region: Range) -> Self {
        let blocks = Self::number(region.start.0, region.end().saturating_add(BLOCK.0 - 1));
        // As large as the host's own configuration says: 8 bytes for each 128 MiB.
        Self { region, broken: vec![0; blocks.div_ceil(64)] }
    }

    /// Notes that `range` is dropped in one go, and says of each block, by its start, whether it
    /// went whole. Returns how many did, and how many more are split than before.
    pub fn dropped(&mut self, range: Range, mut went: impl FnMut(u64, bool)) -> (u64, u64) {
        let (mut whole, mut broken) = (0, 0);
        let Some(range) = range.within(&self.region) else { return (0, 0) };
        let first = range.start.0 & !(BLOCK.0 - 1);
        for start in (first..range.end()).step_by(BLOCK.0 as usize) {
            let all = range.start.0 <= start && start.saturating_add(BLOCK.0) <= range.end();
            went(start, all);
            let number = Self::number(self.region.start.0, start);
            let bit = 1u64 << (number % 64);
            let Some(word) = self.broken.get_mut(number / 64) else { continue };
            if all {
                whole += 1;
                *word &= !bit;
            } else if *word & bit == 0 {
                broken += 1;
                *word |= bit;
            }
        }
        (whole, broken)
    }

    /// Blocks from the one that holds `start` to the one that holds `address`.
    fn number(start: u64, address: u64) -> usize {
        let (first, number) = (start / BLOCK.0, address / BLOCK.0);
        usize::try_from(number.saturating_sub(first)).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn range(start: Bytes, len: Bytes) -> Range {
        Range { start: GuestAddress(start.0), len }
    }

    #[test]
    fn blocks_that_go_whole_are_told_from_those_that_split() {
        let gib = Bytes::gib(1);
        let mut blocks = Blocks::new(range(gib, Bytes::mib(200)));
        let mut dropped = |range| blocks.dropped(range, |_, _| ());
        let at = |mib| gib + Bytes::mib(mib);
        assert_eq!(dropped(range(at(0), Bytes::mib(4))), (2, 0));
        // Its second half, the block behind, and a first half.
        assert_eq!(dropped(range(at(5), Bytes::mib(4))), (1, 2));
        // The same halves again are no news; then one of them goes whole.
        assert_eq!(dropped(range(at(5), Bytes::mib(1))), (0, 0));
        assert_eq!(dropped(range(at(4), Bytes::mib(2))), (1, 0));
        assert_eq!(dropped(range(at(4), Bytes::kib(4))), (0, 1));
        // The last block, and what lies behind the region.
        assert_eq!(dropped(range(at(198), Bytes::mib(2))), (1, 0));
        assert_eq!(dropped(range(at(200), Bytes::mib(2))), (0, 0));
        assert_eq!(dropped(range(Bytes::ZERO, gib)), (0, 0));
    }
}
