//! What is proven of ranges: by Kani where it is installed, else for everything within small
//! bounds (`make prove`).

use vm_memory::GuestAddress;

use crate::pending::Pending;
use crate::ranges::{self, PartlyGiven, Range};
use api::units::{Bytes, PAGE_SIZE};

fn pages(first: u64, count: u64) -> Range {
    Range { start: GuestAddress(first.saturating_mul(PAGE_SIZE)), len: Bytes(count * PAGE_SIZE) }
}

fn holds(range: &Range, page: u64) -> bool {
    range.start.0 <= page * PAGE_SIZE && page * PAGE_SIZE < range.end()
}

/// Every page in one range and none but those that were given; sorted, and merged where they touch.
fn ranges_are_the_pages<const N: usize>(given: [u32; N]) {
    let mut pfns = given;
    let (mut total, mut last) = (0, None);
    for range in ranges::of_pages(&mut pfns) {
        assert!(last.is_none_or(|end| end < range.start.0));
        assert!(range.start.0.is_multiple_of(PAGE_SIZE) && range.len.0.is_multiple_of(PAGE_SIZE));
        total += range.len.pages().0;
        last = Some(range.end());
    }
    let distinct = (0..N).filter(|&at| !given[..at].contains(&given[at])).count();
    assert_eq!(total, distinct as u64);
    for page in given {
        let mut pfns = given;
        assert_eq!(ranges::of_pages(&mut pfns).filter(|range| holds(range, page.into())).count(), 1);
    }
}

/// No part of a range reaches past it, and a whole page is whole.
fn parts_stay_inside(range: Range, other: Range, shift: u32) {
    let inside = |part: Range| {
        assert!(part.len > Bytes::ZERO && part.start >= range.start && part.end() <= range.end());
        part.len.0
    };
    let both = range.within(&other).map_or(0, inside);
    if let Some(both) = range.within(&other) {
        assert!(both.start >= other.start && both.end() <= other.end());
    }
    let before = range.before(&other).map_or(0, inside);
    let behind = range.behind(&other).map_or(0, inside);
    if other.len > Bytes::ZERO {
        let len = range.end() - range.start.0;
        assert_eq!(u128::from(both) + u128::from(before) + u128::from(behind), u128::from(len));
    }
    if let Some(whole) = range.whole_pages(Bytes(1 << shift)) {
        inside(whole);
        assert_eq!((whole.start.0 | whole.len.0) & ((1 << shift) - 1), 0);
    }
}

/// After any three steps, exactly those huge pages have gone whose every page is given.
fn huge_pages_go_when_whole(steps: [(bool, u64, u64); 3]) {
    const HUGE: u64 = 2;
    const PAGES: u64 = 5;
    let mut bits = PartlyGiven::new(pages(0, PAGES).len, pages(0, HUGE).len);
    let mut given = [false; PAGES as usize];
    for (give, first, count) in steps {
        let before = given;
        for page in first..(first + count).min(PAGES) {
            given[page as usize] = give;
        }
        if !give {
            bits.take_back(pages(first, count));
            continue;
        }
        let gone = bits.give(pages(first, count));
        for huge in 0..PAGES / HUGE {
            let whole = |pages: &[bool]| (huge * HUGE..(huge + 1) * HUGE).all(|page| pages[page as usize]);
            let goes = gone.iter().any(|range| holds(range, huge * HUGE));
            assert_eq!(goes, whole(&given) && !whole(&before));
        }
        assert!(gone.iter().all(|range| range.end() <= PAGES / HUGE * HUGE * PAGE_SIZE));
    }
}

/// What waits goes once, whole blocks first, and nothing else goes.
fn what_waits_goes_once(pushed: [(u64, u64); 3]) {
    const BLOCK: u64 = 2;
    let mut pending = Pending::new(pages(0, 8), pages(0, BLOCK).len);
    for (first, count) in pushed {
        pending.push(pages(first, count));
    }
    let (mut whole, mut rest) = (Vec::new(), Vec::new());
    pending.take_ready(|range| whole.push(range));
    pending.take_all(|range| rest.push(range));
    assert_eq!(pending.waiting(), Bytes::ZERO);
    for page in 0..8 {
        let given = pushed.iter().any(|(first, count)| (*first..first + count).contains(&page));
        let in_whole = whole.iter().filter(|range| holds(range, page)).count();
        let in_rest = rest.iter().filter(|range| holds(range, page)).count();
        assert_eq!(in_whole + in_rest, usize::from(given));
        let block = page / BLOCK * BLOCK;
        let complete = (block..block + BLOCK)
            .all(|page| pushed.iter().any(|(first, count)| (*first..first + count).contains(&page)));
        assert_eq!(in_whole == 1, complete);
    }
}

#[cfg(kani)]
mod kani_proofs {
    use super::*;

    #[kani::proof]
    #[kani::unwind(8)]
    fn ranges_of_any_four_pages() {
        ranges_are_the_pages::<4>(kani::any());
    }

    #[kani::proof]
    fn parts_of_any_ranges() {
        let range = || Range { start: GuestAddress(kani::any()), len: Bytes(kani::any()) };
        let shift: u32 = kani::any();
        kani::assume(shift < 48);
        parts_stay_inside(range(), range(), shift);
    }

    #[kani::proof]
    #[kani::unwind(12)]
    fn huge_pages_after_any_three_steps() {
        let step = || {
            let (first, count) = (kani::any(), kani::any());
            kani::assume(first < 6 && count < 6);
            (kani::any(), first, count)
        };
        huge_pages_go_when_whole([step(), step(), step()]);
    }

    #[kani::proof]
    #[kani::unwind(12)]
    fn any_three_ranges_that_wait() {
        let push = || {
            let (first, count): (u64, u64) = (kani::any(), kani::any());
            kani::assume(first < 6 && count > 0 && count < 3);
            (first, count)
        };
        what_waits_goes_once([push(), push(), push()]);
    }
}

#[cfg(test)]
mod bounded {
    use super::*;

    fn say(count: u64, of: &str) {
        println!("checked exhaustively, not proven: {count} {of}");
    }

    /// Every way to choose `N` of `from`, in any order and with repeats.
    fn every<T: Copy, const N: usize>(from: &[T], mut check: impl FnMut([T; N])) -> u64 {
        let total = from.len().pow(N as u32);
        for number in 0..total {
            check(std::array::from_fn(|place| from[number / from.len().pow(place as u32) % from.len()]));
        }
        total as u64
    }

    #[test]
    fn ranges_are_the_pages_for_all_short_lists() {
        let choice = [0, 1, 2, 3, 4, 7, u32::MAX - 1, u32::MAX];
        let mut count = every(&choice, ranges_are_the_pages::<1>);
        count += every(&choice, ranges_are_the_pages::<2>);
        count += every(&choice, ranges_are_the_pages::<3>);
        count += every(&choice, ranges_are_the_pages::<4>);
        count += every(&choice, ranges_are_the_pages::<5>);
        say(count, "lists of up to 5 page numbers from 0 to 4, 7 and the last two");
    }

    #[test]
    fn parts_stay_inside_for_all_small_ranges() {
        let mut edges: Vec<u64> = (0..9).collect();
        edges.extend(u64::MAX - 8..=u64::MAX);
        let mut count = 0;
        for shift in 0..4 {
            count += every(&edges, |[a, b, c, d]: [u64; 4]| {
                let range = |start, len| Range { start: GuestAddress(start), len: Bytes(len) };
                parts_stay_inside(range(a, b), range(c, d), shift);
            });
        }
        say(
            count,
            "pairs of ranges with starts and lengths within 8 of 0 and of 2^64, pages of 1 to 8 bytes",
        );
    }

    #[test]
    fn huge_pages_go_when_whole_for_all_short_stories() {
        let mut steps = Vec::new();
        for give in [false, true] {
            steps.extend((0..6).flat_map(|first| (0..6).map(move |count| (give, first, count))));
        }
        say(
            every(&steps, huge_pages_go_when_whole),
            "stories of 3 steps over 2 huge pages of 2 pages and a tail",
        );
    }

    #[test]
    fn what_waits_goes_once_for_all_short_stories() {
        let pushes: Vec<_> = (0..6).flat_map(|first| [(first, 1), (first, 2)]).collect();
        say(every(&pushes, what_waits_goes_once), "ways to let 3 ranges of up to 2 pages wait");
    }
}
