//! Signals between this process and a backend.
//!
//! The protocol speaks of eventfds, and both sides of one share whether it waits: a backend could make it wait and
//! fill it, and hold up whoever signals it. Each end of a pipe is its owner's alone. To the backend it is the same:
//! it reads and writes counts of 8 bytes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use vmm_sys_util::eventfd::EventFd;

/// Signals taken at a time; more come back.
const AT_ONCE: usize = 64;

/// Tells the backend of buffers in a queue.
#[derive(Debug)]
pub(super) struct Kick {
    ours: File,
    theirs: EventFd,
}

impl Kick {
    pub(super) fn new() -> io::Result<Self> {
        let (reader, writer) = pipe()?;
        Ok(Self { ours: writer.into(), theirs: as_event(reader) })
    }

    /// What the backend gets.
    pub(super) fn theirs(&self) -> &EventFd {
        &self.theirs
    }

    /// Never waits: where there is no room, thousands of signals are there already.
    pub(super) fn signal(&self) {
        let _ = (&self.ours).write(&1u64.to_ne_bytes());
    }
}

/// Tells of buffers that the backend has used.
#[derive(Debug)]
pub(super) struct Call {
    ours: File,
    theirs: EventFd,
}

impl Call {
    pub(super) fn new() -> io::Result<Self> {
        let (reader, writer) = pipe()?;
        Ok(Self { ours: reader.into(), theirs: as_event(writer) })
    }

    /// What the backend gets.
    pub(super) fn theirs(&self) -> &EventFd {
        &self.theirs
    }

    /// Whether there was a signal. Never waits.
    pub(super) fn take(&self) -> bool {
        (&self.ours).read(&mut [0; 8 * AT_ONCE]).is_ok_and(|count| count > 0)
    }
}

impl AsRawFd for Call {
    fn as_raw_fd(&self) -> RawFd {
        self.ours.as_raw_fd()
    }
}

/// A pipe's ends for reading and for writing, of which neither waits.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the kernel writes two numbers to where there is room for two.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new descriptors that belong to nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// An end of a pipe by the type that the protocol's library takes, which only hands its number on.
fn as_event(end: OwnedFd) -> EventFd {
    // SAFETY: the descriptor's owner goes, and the event becomes its owner.
    unsafe { EventFd::from_raw_fd(end.into_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_go_both_ways_and_none_waits() {
        let (kick, call) = (Kick::new().unwrap(), Call::new().unwrap());
        // More than there is room for.
        for _ in 0..20_000 {
            kick.signal();
        }
        assert_eq!(kick.theirs().read().unwrap(), 1);
        assert!(!call.take());
        call.theirs().write(1).unwrap();
        call.theirs().write(1).unwrap();
        assert!(call.take());
        assert!(!call.take());
    }

    /// What a hostile backend can do to its own end.
    #[test]
    fn a_backend_that_waits_keeps_nobody_else_waiting() {
        let (kick, call) = (Kick::new().unwrap(), Call::new().unwrap());
        for end in [kick.theirs(), call.theirs()] {
            // SAFETY: flags of a descriptor of this test's.
            assert_eq!(unsafe { libc::fcntl(end.as_raw_fd(), libc::F_SETFL, 0) }, 0);
        }
        for _ in 0..20_000 {
            kick.signal();
        }
        assert!(!call.take());
    }
}
