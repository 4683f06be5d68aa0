//! The host's reserved huge pages, for tests that need some.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

const ALL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

fn count(file: &str) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Huge pages of 2 MiB for one test, given back to the host afterwards. Another test waits for them.
pub struct Pool {
    before: u64,
    _lock: File,
}

impl Pool {
    /// Has so many pages more; `None`, with a loud word, where this host has none to give.
    pub fn reserve(pages: u64) -> Option<Self> {
        let refused =
            || eprintln!("SKIPPED: no {pages} huge pages to be had from {ALL} (needs root and free memory)");
        let Ok(lock) = File::open(ALL) else {
            refused();
            return None;
        };
        // SAFETY: a descriptor of our own, and no pointer.
        assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
        let pool = Self { before: count(ALL).unwrap(), _lock: lock };
        let wanted = pool.before + pages;
        if fs::write(ALL, wanted.to_string()).is_err() || count(ALL) < Some(wanted) {
            refused();
            return None;
        }
        Some(pool)
    }

    /// Has the host take so many pages back, as far as nobody has them.
    pub fn shrink(&mut self, pages: u64) {
        fs::write(ALL, (count(ALL).unwrap() - pages).to_string()).unwrap();
    }

    /// Pages that nobody has.
    pub fn free() -> u64 {
        count(FREE).unwrap()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(ALL, self.before.to_string());
    }
}
