//! Input on its way to a guest, beside the port: it can be put down while the port writes output.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::BACKLOG;

/// The line's end at the port. Nobody holds its lock for longer than it takes to move bytes.
pub(super) struct Line {
    backlog: Mutex<Backlog>,
    room: EventFd,
}

struct Backlog {
    bytes: VecDeque<u8>,
    /// Someone was told that there is no room, and waits for [`Line::room`].
    refused: bool,
}

impl Line {
    /// A line on which `bytes` wait.
    pub(super) fn new(bytes: VecDeque<u8>) -> io::Result<Self> {
        Ok(Self {
            backlog: Mutex::new(Backlog { bytes, refused: false }),
            room: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Puts down what there is room for, and returns how much that was.
    pub(super) fn put(&self, input: &[u8]) -> usize {
        let mut backlog = self.backlog();
        let room = BACKLOG.saturating_sub(backlog.bytes.len());
        let (taken, rest) = input.split_at(input.len().min(room));
        backlog.bytes.extend(taken);
        backlog.refused |= !rest.is_empty();
        taken.len()
    }

    /// Hands piece after piece to `sink` until all is gone or it takes none: it returns how much
    /// it took.
    pub(super) fn take(&self, mut sink: impl FnMut(&[u8]) -> usize) {
        let mut backlog = self.backlog();
        loop {
            let (front, _) = backlog.bytes.as_slices();
            if front.is_empty() {
                break;
            }
            let taken = sink(front).min(front.len());
            if taken == 0 {
                break;
            }
            backlog.bytes.drain(..taken);
        }
        if backlog.refused && backlog.bytes.is_empty() {
            backlog.refused = false;
            // The one failure is a full counter, which is readable already.
            let _ = self.room.write(1);
        }
    }

    /// What waits.
    pub(super) fn waiting(&self) -> Vec<u8> {
        self.backlog().bytes.iter().copied().collect()
    }

    /// Readable when all is gone after something was refused.
    pub(super) fn room(&self) -> &EventFd {
        &self.room
    }

    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
