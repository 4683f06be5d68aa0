//! Where a kernel may lie, by the rules of its own decompressor (arch/x86/boot/compressed/kaslr.c).

use std::ops::Range;

use super::IMAGE_SPACE;

/// Addresses to choose from: in each range, every so many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// The first, and how many.
    runs: Vec<(u64, u64)>,
    step: u64,
}

impl Places {
    /// Where a kernel of `size` bytes can lie in memory at `ram`, from `lowest` on, at multiples of `step`, and on
    /// nothing of what is `taken`.
    pub fn in_memory(ram: &[Range<u64>], taken: &[Range<u64>], lowest: u64, size: u64, step: u64) -> Self {
        let mut free: Vec<Range<u64>> = ram.to_vec();
        for taken in taken.iter().filter(|taken| !taken.is_empty()) {
            free = free
                .iter()
                .flat_map(|range| {
                    [range.start..range.end.min(taken.start), range.start.max(taken.end)..range.end]
                })
                .filter(|range| !range.is_empty())
                .collect();
        }
        let runs = free.iter().filter_map(|range| run(range.start.max(lowest)..range.end, size, step));
        Self { runs: runs.collect(), step }
    }

    /// Where a kernel of `size` bytes that is linked for `base` can lie among the kernel's link addresses, as
    /// physical addresses that they stand for.
    pub fn in_link_map(base: u64, size: u64, step: u64) -> Self {
        Self { runs: run(base..IMAGE_SPACE, size, step).into_iter().collect(), step }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.runs.iter().map(|(_, count)| *count).sum()
    }

    /// One of them, by a number from 0 on.
    pub fn get(&self, number: u64) -> Option<u64> {
        let mut left = number;
        for &(first, count) in &self.runs {
            if left < count {
                return left.checked_mul(self.step)?.checked_add(first);
            }
            left -= count;
        }
        None
    }

    /// One of them, each as likely as any other for a `random` number: there are so few that none is favoured by
    /// more than one in 2^40. `None` where there are none.
    pub fn choose(&self, random: u64) -> Option<u64> {
        self.get(random.checked_rem(self.count())?)
    }
}

/// The places in one range: the first, and how many.
fn run(range: Range<u64>, size: u64, step: u64) -> Option<(u64, u64)> {
    let first = range.start.checked_next_multiple_of(step)?;
    let room = range.end.checked_sub(first)?.checked_sub(size)?;
    Some((first, room.checked_div(step)?.saturating_add(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
    use std::collections::BTreeSet;

    const MIB: u64 = 1 << 20;
    const STEP: u64 = 2 * MIB;

    #[test]
    fn every_place_is_reached_and_no_other() {
        let ram = [0..640 << 10, MIB..256 * MIB];
        let places =
            Places::in_memory(&ram, std::slice::from_ref(&(100 * MIB..111 * MIB)), 16 * MIB, 44 * MIB, STEP);
        let expected: BTreeSet<u64> =
            (16..=56).chain(112..=212).filter(|mib| mib % 2 == 0).map(|mib| mib * MIB).collect();
        let virtually = Places::in_link_map(16 * MIB, 44 * MIB, STEP);
        // As the kernel counts: 1 + (KERNEL_IMAGE_SIZE - minimum - size) / CONFIG_PHYSICAL_ALIGN.
        assert_eq!(virtually.count(), 1 + (1024 - 16 - 44) / 2);
        let mut runner =
            TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]));
        let mut seen = [BTreeSet::new(), BTreeSet::new()];
        for _ in 0..20_000 {
            let random = any::<u64>().new_tree(&mut runner).expect("a number").current();
            seen[0].insert(places.choose(random).expect("a place"));
            seen[1].insert(virtually.choose(random).expect("a place"));
        }
        assert_eq!(seen[0], expected);
        assert_eq!(seen[1], (16..=980).step_by(2).map(|mib| mib * MIB).collect());
    }

    #[test]
    fn where_there_is_no_room_there_is_no_place() {
        let places = |taken: Range<u64>, size| {
            Places::in_memory(std::slice::from_ref(&(MIB..64 * MIB)), &[taken], 16 * MIB, size, STEP)
        };
        assert_eq!(places(0..0, 48 * MIB).choose(u64::MAX), Some(16 * MIB));
        assert_eq!(places(0..0, 48 * MIB + 1).choose(0), None);
        assert_eq!(places(40 * MIB..41 * MIB, 25 * MIB).choose(0), None);
        assert_eq!(Places::in_link_map(16 * MIB, IMAGE_SPACE, STEP).choose(0), None);
    }

    proptest! {
        #[test]
        fn places_are_free_memory(
            starts in prop::collection::vec(0..4096u64, 1..4), taken in prop::collection::vec((0..5000u64, 0..300u64), 0..5),
            lowest in 0..64u64, size in 1..200 * MIB, random: u64
        ) {
            let ram: Vec<_> = (0..).zip(&starts).map(|(n, start)| {
                let start = (n * 8192 + start) * MIB;
                start..start + 2048 * MIB
            }).collect();
            let taken: Vec<_> = taken.into_iter().map(|(start, size)| start * MIB..(start + size) * MIB).collect();
            let places = Places::in_memory(&ram, &taken, lowest * MIB, size, STEP);
            prop_assert_eq!(places.get(places.count()), None);
            for number in [0, places.count().saturating_sub(1), random.checked_rem(places.count()).unwrap_or(0)] {
                if let Some(start) = places.get(number) {
                    let end = start + size;
                    prop_assert!(start % STEP == 0 && start >= lowest * MIB);
                    prop_assert!(ram.iter().any(|ram| ram.start <= start && end <= ram.end));
                    prop_assert!(taken.iter().all(|taken| taken.is_empty() || end <= taken.start || taken.end <= start));
                }
            }
            // And what is left out has something in its way.
            let is_free = |start: u64| start >= lowest * MIB
                && ram.iter().any(|ram| ram.start <= start && start + size <= ram.end)
                && taken.iter().all(|taken| taken.is_empty() || start + size <= taken.start || taken.end <= start);
            let free = (0..40_000 / 2).filter(|number| is_free(number * STEP)).count();
            prop_assert_eq!(places.count(), free as u64);
        }
    }
}
