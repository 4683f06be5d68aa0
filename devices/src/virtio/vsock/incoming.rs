//! Programs on the host that want to speak to the guest.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::connection::Answers;
use super::connections::MOST_CONNECTIONS;

/// As many wait for the device as it could serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MOST_CONNECTIONS} connections wait for the guest's sockets, and no more may: try again")]
pub struct Crowded;

/// A program that wants to speak to a port of the guest.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) port: u32,
    pub(super) stream: UnixStream,
    pub(super) answers: Answers,
}

/// Where programs on the host come, from any thread.
#[derive(Debug)]
pub struct Incoming {
    callers: Mutex<Vec<Caller>>,
    event: EventFd,
}

impl Incoming {
    /// Nobody has come yet.
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Arc::new(Self { callers: Mutex::default(), event }))
    }

    /// Connects `stream`, whose reads and writes must not wait, to the guest's `port`. It is sent one of `answers` first.
    ///
    /// # Errors
    /// [`Crowded`].
    pub fn connect(&self, port: u32, stream: UnixStream, answers: Answers) -> Result<(), Crowded> {
        let mut callers = self.callers.lock();
        if callers.len() >= MOST_CONNECTIONS {
            return Err(Crowded);
        }
        callers.push(Caller { port, stream, answers });
        drop(callers);
        self.wake();
        Ok(())
    }

    /// Has the device look, on its event loop.
    pub(super) fn wake(&self) {
        // The one failure is a full counter, which is readable.
        let _ = self.event.write(1);
    }

    /// Who has come since.
    pub(super) fn take(&self) -> Vec<Caller> {
        let _ = self.event.read();
        std::mem::take(&mut self.callers.lock())
    }
}

impl AsRawFd for Incoming {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
