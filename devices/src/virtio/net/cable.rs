//! The cable of a NIC in its owner's hands, who may take it out and put it in again while the guest runs.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Whether it is to be in. It is until somebody says otherwise.
#[derive(Debug)]
pub struct Cable {
    is_out: AtomicBool,
    changed: EventFd,
}

impl Cable {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { is_out: AtomicBool::new(false), changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// Takes it out, or puts it in. The device does so on its event loop, and tells its driver.
    pub fn put(&self, is_in: bool) {
        self.is_out.store(!is_in, Ordering::Release);
        // The one failure is a full counter, which tells as well.
        let _ = self.changed.write(1);
    }

    /// Whether it is to be in.
    pub fn is_in(&self) -> bool {
        !self.is_out.load(Ordering::Acquire)
    }

    /// Takes note that it has changed.
    pub(super) fn take(&self) {
        // Empty where an earlier event has told of it.
        let _ = self.changed.read();
    }
}

impl AsRawFd for Cable {
    fn as_raw_fd(&self) -> RawFd {
        self.changed.as_raw_fd()
    }
}
