//! Which blocks of the region are plugged: one bit for each.

use std::ops::Range;

use crate::ranges::runs;

/// What a range of blocks is (virtio 1.2, section 5.15.6.4: `VIRTIO_MEM_STATE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// All of them are plugged.
    Plugged,
    /// None of them is.
    Unplugged,
    /// Some are.
    Mixed,
}

/// A bit for each block of the region, set where the block is plugged.
pub struct Blocks {
    words: Vec<u64>,
    count: u64,
    plugged: u64,
}

impl Blocks {
    /// `count` blocks, none of them plugged.
    pub fn new(count: u64) -> Self {
        // As large as the host's own configuration says.
        Self { words: vec![0; usize::try_from(count.div_ceil(64)).unwrap_or(0)], count, plugged: 0 }
    }

    /// How many blocks there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many of them are plugged.
    pub fn plugged(&self) -> u64 {
        self.plugged
    }

    /// What the blocks in `range` are; blocks past the end count as unplugged.
    pub fn state(&self, range: Range<u64>) -> BlockState {
        let wanted = range.end.saturating_sub(range.start);
        let set: u64 = self.masks(range).map(|(word, mask)| u64::from((word & mask).count_ones())).sum();
        match set {
            0 => BlockState::Unplugged,
            set if set == wanted => BlockState::Plugged,
            _ => BlockState::Mixed,
        }
    }

    /// Marks the blocks in `range` as plugged or not; blocks past the end stay out of it.
    pub fn set(&mut self, range: Range<u64>, plugged: bool) {
        for word in words_of(&range, self.count) {
            let mask = mask_of(&range, self.count, word);
            let Some(bits) = usize::try_from(word).ok().and_then(|word| self.words.get_mut(word)) else {
                return;
            };
            self.plugged -= u64::from((*bits & mask).count_ones());
            *bits = if plugged { *bits | mask } else { *bits & !mask };
            self.plugged += u64::from((*bits & mask).count_ones());
        }
    }

    /// The plugged blocks, as runs that don't touch each other, upwards.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        runs(&self.words, 0..self.count)
    }

    fn masks(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        words_of(&range, self.count).map_while(move |word| {
            let bits = self.words.get(usize::try_from(word).ok()?)?;
            Some((*bits, mask_of(&range, self.count, word)))
        })
    }
}

/// The numbers of the words that hold bits of `range`, of `count` bits in all.
fn words_of(range: &Range<u64>, count: u64) -> Range<u64> {
    let end = range.end.min(count);
    if range.start >= end { 0..0 } else { range.start / 64..end.div_ceil(64) }
}

/// The bits of `range`, of `count` bits in all, in the word of this number.
fn mask_of(range: &Range<u64>, count: u64, word: u64) -> u64 {
    let first = word.saturating_mul(64);
    let start = range.start.saturating_sub(first).min(64);
    let end = range.end.min(count).saturating_sub(first).min(64);
    below(end) & !below(start)
}

/// The lowest `bits` bits.
fn below(bits: u64) -> u64 {
    u32::try_from(bits).ok().and_then(|bits| 1u64.checked_shl(bits)).map_or(u64::MAX, |bit| bit - 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the plain model: a set of numbers.
        #[test]
        fn bits_are_as_they_were_set(
            count in 0u64..300,
            steps in vec((any::<bool>(), 0u64..320, 0u64..200), 1..60),
            asked in (0u64..320, 1u64..200),
        ) {
            let mut blocks = Blocks::new(count);
            let mut model = BTreeSet::new();
            for (plugged, start, len) in steps {
                blocks.set(start..start + len, plugged);
                for block in start..(start + len).min(count) {
                    if plugged { model.insert(block); } else { model.remove(&block); }
                }
                prop_assert_eq!(blocks.plugged(), model.len() as u64);
            }
            let runs: Vec<_> = blocks.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "{runs:?}");
            prop_assert!(runs.into_iter().flatten().eq(model.iter().copied()));
            let range = asked.0..asked.0 + asked.1;
            let set = range.clone().filter(|block| model.contains(block)).count() as u64;
            let expected = match set {
                0 => BlockState::Unplugged,
                set if set == asked.1 => BlockState::Plugged,
                _ => BlockState::Mixed,
            };
            prop_assert_eq!(blocks.state(range), expected);
        }
    }
}
