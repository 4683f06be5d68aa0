//! What the host holds of a guest's memory, by the kernel's own accounts.
//!
//! `/proc/self/smaps` tells it a mapping at a time (Documentation/filesystems/proc.rst), and the
//! kernel walks the page tables for that: tens of milliseconds for each GiB of small pages on a
//! busy host. So its answer is kept for a time that grows with what it took.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use balloon::units::Bytes;

/// An answer is kept for so many times what it took, so that asking costs at most a tenth of a
/// processor, however often anyone asks.
const KEPT: u32 = 10;

/// No answer is kept for longer: a balancer waits to see what a shrunk guest has given back.
const LONGEST: Duration = Duration::from_secs(2);

/// What the host holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages of the mapping that are there.
    pub resident: Bytes,
    /// Those of them that are parts of huge pages and mapped as such.
    pub huge: Bytes,
}

/// The accounts of a few mappings of this process.
pub struct Accounts {
    mappings: Vec<Range<u64>>,
    last: Mutex<Option<Answer>>,
}

/// An answer, and what it took to get it.
pub(super) struct Answer {
    at: Instant,
    took: Duration,
    held: Held,
}

impl Answer {
    fn is_good(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < self.took.saturating_mul(KEPT).min(LONGEST)
    }
}

impl Accounts {
    /// The accounts of what lies in `mappings`, by this process's addresses.
    pub fn new(mappings: Vec<Range<u64>>) -> Self {
        Self { mappings, last: Mutex::new(None) }
    }

    /// What the host holds, not long ago.
    ///
    /// # Errors
    /// When the kernel's accounts can't be read.
    pub fn held(&self) -> io::Result<Held> {
        // Whoever asks meanwhile waits for the same answer.
        let mut last = self.last();
        if let Some(answer) = last.as_ref().filter(|answer| answer.is_good(Instant::now())) {
            return Ok(answer.held);
        }
        let begun = Instant::now();
        let held = self.ask()?;
        let at = Instant::now();
        *last = Some(Answer { at, took: at.saturating_duration_since(begun), held });
        Ok(held)
    }

    /// The last answer, which a test may take away.
    pub(super) fn last(&self) -> MutexGuard<'_, Option<Answer>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the host holds at this moment.
    ///
    /// # Errors
    /// When the kernel's accounts can't be read.
    pub fn ask(&self) -> io::Result<Held> {
        self.read(BufReader::new(File::open("/proc/self/smaps")?))
    }

    fn read(&self, smaps: impl BufRead) -> io::Result<Held> {
        let mut inside = false;
        let mut held = Held::default();
        for line in smaps.lines() {
            let line = line?;
            if let Some(range) = mapping_line(&line) {
                inside = self.mappings.iter().any(|all| all.start <= range.start && range.end <= all.end);
                continue;
            }
            let Some((field, amount)) = line.split_once(':').filter(|_| inside) else { continue };
            let amount = || Bytes::kib(amount.trim().trim_end_matches(" kB").parse().unwrap_or(0));
            match field {
                "Rss" => held.resident = held.resident.saturating_add(amount()),
                "AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped" => {
                    held.huge = held.huge.saturating_add(amount());
                }
                // Not part of Rss.
                "Shared_Hugetlb" | "Private_Hugetlb" => {
                    held.resident = held.resident.saturating_add(amount());
                    held.huge = held.huge.saturating_add(amount());
                }
                _ => {}
            }
        }
        Ok(held)
    }
}

/// The addresses in the first line of a mapping in smaps, such as `7f00-7f01 rw-p ...`.
fn mapping_line(line: &str) -> Option<Range<u64>> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_mappings_asked_for_count_and_each_kind_of_huge_page_does() {
        let accounts = Accounts::new(vec![0x20_0000..0x40_0000, 0x40_0000..0x80_0000]);
        let smaps = "\
00100000-00200000 rw-p 00000000 00:00 0
Rss:                1024 kB
AnonHugePages:      1024 kB
00200000-00400000 rw-p 00000000 00:00 0
Rss:                3072 kB
AnonHugePages:      2048 kB
ShmemPmdMapped:        0 kB
VmFlags: rd wr mr mw me dc ac sd
00400000-00800000 rw-s 00000000 00:01 7    /memfd:guest-memory (deleted)
Rss:                   0 kB
Shared_Hugetlb:     2048 kB
00800000-00a00000 rw-s 00000000 00:01 7
ShmemPmdMapped:     2048 kB
";
        let held = accounts.read(smaps.as_bytes()).unwrap();
        assert_eq!(held, Held { resident: Bytes::mib(5), huge: Bytes::mib(4) });
    }

    #[test]
    fn an_answer_is_kept_in_proportion_to_what_it_took_and_not_for_long() {
        let now = Instant::now();
        let took = |milliseconds| Answer {
            at: now,
            took: Duration::from_millis(milliseconds),
            held: Held::default(),
        };
        let later = |milliseconds| now + Duration::from_millis(milliseconds);
        assert!(took(10).is_good(later(99)));
        assert!(!took(10).is_good(later(100)));
        assert!(!took(0).is_good(now));
        assert!(took(60_000).is_good(later(1999)));
        assert!(!took(60_000).is_good(later(2000)));
    }

    /// Not a test: what an answer costs for 1 GiB of small and of huge pages.
    ///
    /// `cargo test --release -p vmm -- --ignored --nocapture what_an_answer_costs`
    #[test]
    #[ignore = "measures"]
    fn what_an_answer_costs() {
        use crate::config::MemoryOptions;
        use crate::memory::Ram;
        use vm_memory::{Bytes as _, GuestAddress};

        for thp in [false, true] {
            let ram = Ram::new(Bytes::gib(1), MemoryOptions { thp, ..Default::default() }).unwrap();
            if !thp {
                for region in ram.regions() {
                    // SAFETY: the range is this test's own mapping; the advice takes nothing away.
                    unsafe {
                        libc::madvise(region.host.cast(), region.size.0 as usize, libc::MADV_NOHUGEPAGE)
                    };
                }
            }
            for page in 0..Bytes::gib(1).pages().0 {
                ram.guest().write_obj(1u8, GuestAddress(page * 4096)).unwrap();
            }
            let begun = Instant::now();
            let held = ram.accounts.ask().unwrap();
            println!("{held:?} took {:?}", begun.elapsed());
        }
    }
}
