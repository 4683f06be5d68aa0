//! Pressure stall information: how the agent learns that its guest waits for memory.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

/// The kernel says so once tasks have waited for 10 ms in half a second, the shortest window that
/// it takes (`kernel/sched/psi.c`: WINDOW_MIN_US), and looks ten times in a window.
const TRIGGER: &[u8] = b"some 10000 500000\0";

const PRESSURE: &str = "/proc/pressure/memory";

/// The kernel's word that tasks wait for memory.
pub struct Trigger(File);

impl Trigger {
    /// Asks for it.
    ///
    /// # Errors
    /// Where the kernel has no pressure stall information, or the agent lacks CAP_SYS_RESOURCE.
    pub fn new() -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).open(PRESSURE)?;
        file.write_all(TRIGGER)?;
        Ok(Self(file))
    }
}

impl AsFd for Trigger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Microseconds that `who` (`some` tasks, or all that could run: `full`) have waited in all, out of lines such as
/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` (Documentation/accounting/psi.rst).
pub fn stall_total(text: &str, who: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(who))?;
    line.split_whitespace().find_map(|word| word.strip_prefix("total=")?.parse().ok())
}
