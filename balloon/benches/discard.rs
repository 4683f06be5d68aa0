//! How fast memory goes back to the host: real memory, no KVM.
//!
//! Three ways over the same 1 GiB, one after the other, again and again, in processor time of the
//! one thread that does it, so that what else the machine does hits all of them alike: ballast's (page numbers in chains of 256, as Linux's
//! driver sends them), one system call a page (as most VMMs do it), and the limit, one call over
//! everything. Criterion measures one thing at a time, and so can't tell such ratios on a machine
//! that others use; hence a loop of its own, and medians.
//!
//! `cargo bench -p balloon --bench discard`, or with `-- WORD` only what has that word in its name.

use std::ptr;
use std::time::Duration;

use balloon::discard::{Backing, Discard, Region};
use balloon::ranges::Range;
use balloon::units::{Bytes, PAGE_SIZE};
use vm_memory::GuestAddress;

const MEMORY: usize = 1 << 30;
const PAGES: u32 = (MEMORY as u64 / PAGE_SIZE) as u32;
const HUGE: u64 = 2 << 20;
/// Page numbers in one chain of Linux's driver.
const CHAIN: usize = 256;
const ROUNDS: usize = 5;

fn main() {
    // `cargo test --benches` runs this as well: a benchmark is no test.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    println!("giving back 1 GiB; medians of {ROUNDS} interleaved rounds");
    println!(
        "{:<34} {:>10} {:>13} {:>10} {:>14} {:>10}",
        "", "ballast", "page by page", "one call", "x page by page", "of limit"
    );
    let mut shuffled: Vec<u32> = (0..PAGES).collect();
    shuffle(&mut shuffled);
    for huge in [false, true] {
        let kind = if huge { "THP" } else { "4K" };
        report(&format!("{kind}, sequential"), huge, &Given::Pages((0..PAGES).collect()));
        report(&format!("{kind}, every second page"), huge, &Given::Pages((0..PAGES).step_by(2).collect()));
        report(&format!("{kind}, random order"), huge, &Given::Pages(shuffled.clone()));
    }
    report("THP, reported 2 MiB ranges", true, &Given::Ranges(HUGE));
}

/// What the guest gives.
enum Given {
    /// Page numbers, in this order.
    Pages(Vec<u32>),
    /// All of it, in ranges of so many bytes.
    Ranges(u64),
}

fn report(name: &str, huge: bool, given: &Given) {
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with('-')).peekable();
    if words.peek().is_some() && !words.any(|word| name.contains(&word)) {
        return;
    }
    let (mut ours, mut single, mut limit) = (Vec::new(), Vec::new(), Vec::new());
    // The first round finds caches cold: not counted.
    for round in 0..=ROUNDS {
        // A new mapping for each: where a huge page was split, older kernels never put one again.
        let memory = || Memory::new(huge);
        let times = [memory().ballast(given), memory().page_by_page(given), memory().one_call()];
        if round > 0 {
            ours.push(times[0]);
            single.push(times[1]);
            limit.push(times[2]);
        }
    }
    let [ours, single, limit] = [median(ours), median(single), median(limit)];
    // By the byte: every second page is half of the limit's memory.
    let share = match given {
        Given::Pages(pages) => pages.len() as f64 / f64::from(PAGES),
        Given::Ranges(_) => 1.0,
    };
    println!(
        "{name:<34} {:>7.2} ms {:>10.2} ms {:>7.2} ms {:>14.2} {:>10.2}",
        ours * 1e3,
        single * 1e3,
        limit * 1e3,
        single / ours,
        share * limit / ours,
    );
}

/// What this thread has had of a processor.
fn processor_time() -> Duration {
    // SAFETY: a struct of plain numbers.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills it in.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

struct Memory {
    mapping: *mut u8,
    /// The first multiple of 2 MiB in it.
    start: *mut u8,
}

/// Room to find such a multiple.
const LENGTH: usize = MEMORY + HUGE as usize;

impl Memory {
    fn new(huge: bool) -> Self {
        let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever the kernel likes.
        let mapping = unsafe { libc::mmap(ptr::null_mut(), LENGTH, rights, flags, -1, 0) };
        assert_ne!(mapping, libc::MAP_FAILED);
        let mapping: *mut u8 = mapping.cast();
        // SAFETY: less than 2 MiB further; the mapping has so much more.
        let start = unsafe { mapping.add(mapping.align_offset(HUGE as usize)) };
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: inside the mapping.
        unsafe { libc::madvise(start.cast(), MEMORY, advice) };
        Self { mapping, start }
    }

    /// Times `discard` on memory that is all there.
    fn time(&self, discard: impl FnOnce()) -> Duration {
        // SAFETY: inside the mapping.
        let filled = unsafe { libc::madvise(self.start.cast(), MEMORY, libc::MADV_POPULATE_WRITE) };
        assert_eq!(filled, 0, "1 GiB of memory is needed");
        let start = processor_time();
        discard();
        processor_time().saturating_sub(start)
    }

    fn ballast(&self, given: &Given) -> Duration {
        let region = Region {
            guest: GuestAddress(0),
            host: self.start,
            len: Bytes(MEMORY as u64),
            backing: Backing::Anonymous,
        };
        // SAFETY: the mapping outlives it and is under no reference.
        let mut device = unsafe { Discard::new(vec![region]) };
        match given {
            Given::Pages(pages) => {
                let mut pages = pages.clone();
                self.time(|| {
                    for chain in pages.chunks_mut(CHAIN) {
                        device.give_up_soon(chain);
                    }
                    device.finish();
                })
            }
            Given::Ranges(size) => {
                let range = |start| Range { start: GuestAddress(start), len: Bytes(*size) };
                let mut ranges: Vec<Range> = (0..MEMORY as u64).step_by(*size as usize).map(range).collect();
                // Linux reports 32 at a time.
                self.time(|| {
                    for chain in ranges.chunks_mut(32) {
                        device.drop_free(chain);
                    }
                })
            }
        }
    }

    fn page_by_page(&self, given: &Given) -> Duration {
        let all: Vec<u32>;
        let pages = match given {
            Given::Pages(pages) => pages,
            Given::Ranges(_) => {
                all = (0..PAGES).collect();
                &all
            }
        };
        self.time(|| {
            for page in pages {
                // SAFETY: inside the mapping.
                unsafe {
                    libc::madvise(self.start.add(*page as usize * 4096).cast(), 4096, libc::MADV_DONTNEED)
                };
            }
        })
    }

    fn one_call(&self) -> Duration {
        // SAFETY: all of the mapping.
        self.time(|| unsafe { assert_eq!(libc::madvise(self.start.cast(), MEMORY, libc::MADV_DONTNEED), 0) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody uses it any more.
        unsafe { libc::munmap(self.mapping.cast(), LENGTH) };
    }
}

/// Fisher and Yates, with Knuth's generator: the same order each time.
fn shuffle(pages: &mut [u32]) {
    let mut random = 1u64;
    for last in (1..pages.len()).rev() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        pages.swap(last, (random >> 33) as usize % (last + 1));
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(0.0, Duration::as_secs_f64)
}
