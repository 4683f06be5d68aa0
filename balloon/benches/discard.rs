//! How fast memory goes back to the host: real memory, no KVM.
//!
//! Four ways over the same 1 GiB, one after the other, again and again, in processor time of the
//! one thread that does it, so that what else the machine does hits all of them alike: ballast's
//! (page numbers in chains of 256, as Linux's driver sends them); one system call a page (as most
//! VMMs do it); bare calls, the kernel's limit for scattered pages: the ranges that ballast makes of
//! the page numbers, made before the clock starts and given to `process_madvise` as they are; and one
//! call over everything, the limit of all. Criterion measures one thing at a time, and so can't tell
//! such ratios on a machine that others use; hence a loop of its own, and medians.
//!
//! `cargo bench -p balloon --bench discard`, or with `-- WORD` only what has that word in its name.

use std::ptr;
use std::time::Duration;

use api::units::{Bytes, PAGE_SIZE};
use balloon::discard::{Backing, Discard, Region};
use balloon::ranges::{self, Range};
use vm_memory::GuestAddress;

const MEMORY: usize = 1 << 30;
const PAGES: u32 = (MEMORY as u64 / PAGE_SIZE) as u32;
const HUGE: u64 = 2 << 20;
/// Page numbers in one chain of Linux's driver.
const CHAIN: usize = 256;
/// Page numbers that wait for each other at most, in ballast: 256 MiB (`pending::MOST_WAITING`).
const WINDOW: usize = 65_536;
/// Ranges in one call at most (`UIO_MAXIOV`).
const VECTOR: usize = 1024;
const ROUNDS: usize = 5;

fn main() {
    // `cargo test --benches` runs this as well: a benchmark is no test.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    println!("giving back 1 GiB; medians of {ROUNDS} interleaved rounds");
    println!(
        "{:<28} {:>10} {:>13} {:>12} {:>10} {:>14} {:>7} {:>12} {:>10}",
        "",
        "ballast",
        "page by page",
        "bare calls",
        "one call",
        "x page by page",
        "(bare)",
        "of the bare",
        "of limit"
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
    let mut times = [(); 4].map(|()| Vec::new());
    // The first round finds caches cold: not counted.
    for round in 0..=ROUNDS {
        // A new mapping for each: where a huge page was split, older kernels never put one again.
        let memory = || Memory::new(huge);
        let took = [
            Some(memory().ballast(given)),
            Some(memory().page_by_page(given)),
            memory().bare_calls(given),
            Some(memory().one_call()),
        ];
        for (all, one) in times.iter_mut().zip(took) {
            all.extend(one.filter(|_| round > 0));
        }
    }
    let [ours, single, bare, limit] = times.map(median);
    // By the byte: every second page is half of the limit's memory.
    let share = match given {
        Given::Pages(pages) => pages.len() as f64 / f64::from(PAGES),
        Given::Ranges(_) => 1.0,
    };
    println!(
        "{name:<28} {:>7.2} ms {:>10.2} ms {:>9.2} ms {:>7.2} ms {:>14.2} {:>7.2} {:>12.2} {:>10.2}",
        ours * 1e3,
        single * 1e3,
        bare * 1e3,
        limit * 1e3,
        single / ours,
        single / bare,
        bare / ours,
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
            collapses: None,
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

    /// `None` where the kernel takes no `process_madvise` about oneself (Linux 6.13 does).
    fn bare_calls(&self, given: &Given) -> Option<Duration> {
        let ranges: Vec<Range> = match given {
            Given::Pages(pages) => pages
                .clone()
                .chunks_mut(WINDOW)
                .flat_map(|pages| ranges::of_pages(pages).collect::<Vec<_>>())
                .collect(),
            Given::Ranges(size) => (0..MEMORY as u64)
                .step_by(*size as usize)
                .map(|start| Range { start: GuestAddress(start), len: Bytes(*size) })
                .collect(),
        };
        let vectors: Vec<libc::iovec> = ranges
            .iter()
            .map(|range| libc::iovec {
                // SAFETY: inside the mapping.
                iov_base: unsafe { self.start.add(range.start.0 as usize) }.cast(),
                iov_len: range.len.0 as usize,
            })
            .collect();
        // SAFETY: no pointers.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
        let advise = |some: &[libc::iovec]| {
            let (name, advice) = (libc::SYS_process_madvise, libc::MADV_DONTNEED);
            // SAFETY: each range lies inside the mapping.
            unsafe { libc::syscall(name, process, some.as_ptr(), some.len(), advice, 0) }
        };
        let takes_it = advise(&[]) == 0;
        let time = takes_it.then(|| {
            self.time(|| {
                for some in vectors.chunks(VECTOR) {
                    let all: usize = some.iter().map(|range| range.iov_len).sum();
                    assert_eq!(usize::try_from(advise(some)), Ok(all), "the kernel takes every range");
                }
            })
        });
        // SAFETY: opened above.
        unsafe { libc::close(process as libc::c_int) };
        time
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
