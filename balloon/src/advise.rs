//! How ranges of this process's memory go back to the host: many with one
//! system call where the kernel can do that, one by one where it can't.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use api::units::Bytes;
use devices::sandbox::{Argument, Call};

/// Ranges that wait for one call; the most that it takes (`UIO_MAXIOV`).
const MOST: usize = 1024;

/// The system call by which many ranges go back; [`madvise`](libc::madvise) every process makes.
pub(crate) const CALL: Call = Call {
    number: libc::SYS_process_madvise,
    argument: Some(Argument { index: 3, value: libc::MADV_DONTNEED as u64 }),
};

/// What giving memory back has done so far; monotonic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Memory that went back to the host.
    pub bytes: Bytes,
    /// Merged ranges it was in.
    pub ranges: u64,
    /// System calls it took, without [`advices`](Self::advices).
    pub calls: u64,
    /// System calls that told the host where it may put huge pages together, and where not.
    pub advices: u64,
    /// Ranges that the host refused to take.
    pub failures: u64,
    /// Blocks of 2 MiB that went in one go, so that no huge page had to be split.
    pub huge_pages_whole: u64,
    /// Blocks of 2 MiB of which only a part went, so that a huge page there was split.
    pub huge_pages_broken: u64,
}

/// Ranges that wait to be given back, all with the same advice.
pub(crate) struct Batch {
    /// This process, where the kernel takes `process_madvise(2)` with
    /// `MADV_DONTNEED` from a process about itself (Linux 6.13 or later).
    process: Option<OwnedFd>,
    waiting: Vec<libc::iovec>,
    advice: libc::c_int,
    advice_refused: bool,
    done: Discarded,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self {
            process: own_process().filter(takes_many),
            waiting: Vec::new(),
            advice: libc::MADV_DONTNEED,
            advice_refused: false,
            done: Discarded::default(),
        }
    }

    pub(crate) fn done(&self) -> Discarded {
        self.done
    }

    /// Counts blocks of 2 MiB that go whole, and those that are newly split.
    pub(crate) fn count_blocks(&mut self, whole: u64, broken: u64) {
        self.done.huge_pages_whole += whole;
        self.done.huge_pages_broken += broken;
    }

    /// Tells the host how a range will be used, at once; returns whether it took that. What it
    /// refuses is counted.
    ///
    /// # Safety
    /// The `len` bytes at `start` must be mapped, and `advice` must not change what is in them.
    pub(crate) unsafe fn advise(&mut self, start: *mut u8, len: usize, advice: libc::c_int) -> bool {
        self.done.advices += 1;
        // SAFETY: as the caller says.
        if unsafe { libc::madvise(start.cast(), len, advice) } == 0 {
            return true;
        }
        if !std::mem::replace(&mut self.advice_refused, true) {
            let error = io::Error::last_os_error();
            tracing::warn!(
                "the host may bring back memory that the guest gave up, or leave it in small pages, \
                 as it took no advice: {error}; a larger vm.max_map_count may help"
            );
        }
        false
    }

    /// Puts a range down for [`flush`](Self::flush).
    ///
    /// # Safety
    /// Until then, the `len` bytes at `start` must be memory whose content
    /// may go: mapped, and under no reference.
    pub(crate) unsafe fn push(&mut self, start: *mut u8, len: usize, advice: libc::c_int) {
        if advice != self.advice || self.waiting.len() >= MOST {
            self.flush();
            self.advice = advice;
        }
        self.waiting.push(libc::iovec { iov_base: start.cast(), iov_len: len });
    }

    /// Gives everything that waits back to the host.
    pub(crate) fn flush(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        let whole = self.all_at_once(&waiting);
        for range in waiting.iter().skip(whole) {
            self.one(range);
        }
        self.done.ranges += waiting.len() as u64;
        // Keeps the room for the next batch.
        self.waiting = waiting;
        self.waiting.clear();
    }

    /// Returns how many of `ranges`, from the first on, one call has given back.
    fn all_at_once(&mut self, ranges: &[libc::iovec]) -> usize {
        // Holes in files drop the kernel's lock in the middle of a call: one by one.
        let Some(process) = self.process.as_ref().filter(|_| self.advice == libc::MADV_DONTNEED) else {
            return 0;
        };
        if ranges.len() < 2 {
            return 0;
        }
        self.done.calls += 1;
        // SAFETY: `push`'s callers vouch for each range.
        let advised = unsafe { process_madvise(process, ranges, self.advice) };
        let mut left = advised.unwrap_or(0);
        let mut whole = 0;
        for range in ranges {
            let Some(rest) = left.checked_sub(range.iov_len) else { break };
            left = rest;
            whole += 1;
            self.done.bytes += Bytes(range.iov_len as u64);
        }
        whole
    }

    fn one(&mut self, range: &libc::iovec) {
        self.done.calls += 1;
        // SAFETY: `push`'s callers vouch for the range.
        if unsafe { libc::madvise(range.iov_base, range.iov_len, self.advice) } == 0 {
            self.done.bytes += Bytes(range.iov_len as u64);
            return;
        }
        self.done.failures += 1;
        // The first tells the administrator; a guest must not be able to fill a log.
        if self.done.failures == 1 {
            let error = io::Error::last_os_error();
            let len = Bytes(range.iov_len as u64);
            tracing::warn!("the host did not take {len} of guest memory back: {error}");
        }
    }
}

fn own_process() -> Option<OwnedFd> {
    // SAFETY: no pointers.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    let process = i32::try_from(process).ok().filter(|process| *process >= 0)?;
    // SAFETY: new, and nobody else's.
    Some(unsafe { OwnedFd::from_raw_fd(process) })
}

/// Asks with no ranges: an older kernel refuses the advice all the same.
fn takes_many(process: &OwnedFd) -> bool {
    // SAFETY: there is no range.
    unsafe { process_madvise(process, &[], libc::MADV_DONTNEED) }.is_ok()
}

/// Returns how many bytes the kernel has gone through, from the first range on.
///
/// # Safety
/// As for `madvise` on each range.
unsafe fn process_madvise(
    process: &OwnedFd,
    ranges: &[libc::iovec],
    advice: libc::c_int,
) -> io::Result<usize> {
    let pointer = if ranges.is_empty() { ptr::null() } else { ranges.as_ptr() };
    // SAFETY: the kernel reads `ranges`; the caller vouches for what they name.
    let advised = unsafe {
        libc::syscall(libc::SYS_process_madvise, process.as_raw_fd(), pointer, ranges.len(), advice, 0)
    };
    usize::try_from(advised).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;
    const PAGES: usize = 3000;

    /// Every second page of a mapping full of ones.
    fn drop_every_second(mut batch: Batch) -> Discarded {
        let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: a new mapping, wherever the kernel likes.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), PAGES * PAGE, read_write, private | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        let at: *mut u8 = at.cast();
        // SAFETY: all of a fresh mapping.
        unsafe { ptr::write_bytes(at, 1, PAGES * PAGE) };
        for page in (0..PAGES).step_by(2) {
            // SAFETY: inside the mapping, which is used through pointers alone.
            unsafe { batch.push(at.add(page * PAGE), PAGE, libc::MADV_DONTNEED) };
        }
        batch.flush();
        for page in 0..PAGES {
            // SAFETY: inside the mapping.
            let byte = unsafe { at.add(page * PAGE).read_volatile() };
            assert_eq!(usize::from(byte), page % 2, "page {page}");
        }
        // SAFETY: mapped above.
        unsafe { libc::munmap(at.cast(), PAGES * PAGE) };
        batch.done()
    }

    #[test]
    fn one_by_one_where_the_kernel_knows_no_better() {
        let done = drop_every_second(Batch { process: None, ..Batch::new() });
        let ranges = PAGES as u64 / 2;
        let bytes = Bytes(ranges * PAGE as u64);
        assert_eq!(done, Discarded { bytes, ranges, calls: ranges, ..Discarded::default() });
    }

    #[test]
    fn many_with_one_call_where_the_kernel_can() {
        let batch = Batch::new();
        if batch.process.is_none() {
            eprintln!("SKIPPED: this kernel takes no process_madvise about oneself (Linux 6.13 does)");
            return;
        }
        let ranges = PAGES as u64 / 2;
        let bytes = Bytes(ranges * PAGE as u64);
        assert_eq!(drop_every_second(batch), Discarded { bytes, ranges, calls: 2, ..Discarded::default() });
    }

    #[test]
    fn what_one_call_can_not_do_is_tried_alone() {
        let mut batch = Batch::new();
        let mut page = [0u8; 16];
        for offset in [1, 2] {
            // SAFETY: not on a page boundary, so the kernel refuses it.
            unsafe { batch.push(page.as_mut_ptr().with_addr(0x1000 + offset), 8, libc::MADV_DONTNEED) };
        }
        batch.flush();
        assert_eq!((batch.done().failures, batch.done().bytes), (2, Bytes::ZERO));
    }
}
