//! A timer among a device's own events.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

/// Fires at an interval while it is started.
pub(crate) struct Timer {
    fd: TimerFd,
    interval: Duration,
    running: bool,
}

impl Timer {
    pub(crate) fn new(interval: Duration) -> io::Result<Self> {
        let fd = TimerFd::new()?;
        // A reset may disarm it between its expiry and the read of it, which must not wait then.
        // SAFETY: fcntl on a descriptor that we own, with no pointer.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd, interval, running: false })
    }

    /// To be watched for reading.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Starts or stops it; one that is as wanted already goes on undisturbed.
    pub(crate) fn run(&mut self, wanted: bool) -> io::Result<()> {
        if wanted == self.running {
            return Ok(());
        }
        if wanted {
            self.fd.reset(self.interval, Some(self.interval))?;
        } else {
            self.fd.clear()?;
        }
        self.running = wanted;
        Ok(())
    }

    /// Counts its interval from now on, where it runs.
    pub(crate) fn restart(&mut self) -> io::Result<()> {
        if self.running {
            self.fd.reset(self.interval, Some(self.interval))?;
        }
        Ok(())
    }

    /// Fires at another interval from now on.
    pub(crate) fn set_interval(&mut self, interval: Duration) -> io::Result<()> {
        if interval == self.interval {
            return Ok(());
        }
        self.interval = interval;
        let running = std::mem::take(&mut self.running);
        self.run(running)
    }

    /// Reads it empty. Not expired after all where a reset has disarmed it.
    pub(crate) fn read(&mut self) {
        let _ = self.fd.wait();
    }
}
