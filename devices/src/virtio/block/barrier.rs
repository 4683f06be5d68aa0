//! What makes writes last, and goes on failing once it can't.
//!
//! When the host can't write out what its page cache holds, it says so once and takes the pages for clean: the
//! next `fdatasync(2)` succeeds, and what was written is lost. So a failure stays where the cache has a part.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether writes to one file can still be made to last.
#[derive(Debug)]
pub struct Barrier {
    /// Some of what was written may wait in the host's page cache.
    cached: AtomicBool,
    failed: AtomicBool,
}

impl Barrier {
    /// Of a file that is written past the page cache, unless `cached`.
    pub fn new(cached: bool) -> Self {
        Self { cached: AtomicBool::new(cached), failed: AtomicBool::new(false) }
    }

    /// Something is written through the page cache after all.
    pub fn note_cached(&self) {
        self.cached.store(true, Ordering::Relaxed);
    }

    /// Has `sync` make last what was written before.
    ///
    /// # Errors
    /// As `sync`; and for ever, once that has failed and the page cache had a part.
    pub fn run(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "the host could not write out its page cache before, so data is lost: end the VM, mend the \
                 host's storage, and check the disk",
            ));
        }
        sync().inspect_err(|_| {
            if self.cached.load(Ordering::Relaxed) {
                self.failed.store(true, Ordering::Release);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_stays_where_the_page_cache_had_a_part() {
        let fail = || Err(io::Error::from_raw_os_error(libc::EIO));
        let barrier = Barrier::new(false);
        assert!(barrier.run(fail).is_err());
        assert!(barrier.run(|| Ok(())).is_ok());
        barrier.note_cached();
        assert!(barrier.run(fail).is_err());
        let error = barrier.run(|| Ok(())).expect_err("it is lost").to_string();
        assert!(error.contains("lost"), "{error}");
    }
}
