//! What passes a NIC, counted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    Received,
    /// From the guest.
    Sent,
}

#[derive(Debug, Default)]
struct Way {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    limited: AtomicU64,
    limited_nanoseconds: AtomicU64,
}

/// Counts since the device was made.
#[derive(Debug, Default)]
pub struct Counters {
    received: Way,
    sent: Way,
    /// The cable is cut: the backend has gone.
    down: AtomicBool,
}

/// What went one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames that passed.
    pub frames: u64,
    /// Their bytes, without virtio's header.
    pub bytes: u64,
    /// Frames that were lost here: the guest had no room for them or sent what is none, or the host refused them.
    pub dropped: u64,
    /// Times that frames were held back by the limits.
    pub limited: u64,
    /// How long that was, up to the last look.
    pub limited_for: Duration,
}

impl Counters {
    fn way(&self, direction: Direction) -> &Way {
        match direction {
            Direction::Received => &self.received,
            Direction::Sent => &self.sent,
        }
    }

    /// Whether there is somebody at the other end.
    pub fn is_up(&self) -> bool {
        !self.down.load(Relaxed)
    }

    /// The backend has gone for good.
    pub(super) fn cut(&self) {
        self.down.store(true, Relaxed);
    }

    /// A frame of so many bytes passed.
    pub(super) fn passed(&self, direction: Direction, bytes: usize) {
        let way = self.way(direction);
        way.frames.fetch_add(1, Relaxed);
        way.bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// A frame was lost.
    pub(super) fn dropped(&self, direction: Direction) {
        self.way(direction).dropped.fetch_add(1, Relaxed);
    }

    /// The limits hold frames back from now on.
    pub(super) fn limited(&self, direction: Direction) {
        self.way(direction).limited.fetch_add(1, Relaxed);
    }

    /// They did so for this time.
    pub(super) fn limited_for(&self, direction: Direction, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.way(direction).limited_nanoseconds.fetch_add(nanoseconds, Relaxed);
    }

    /// What went one way so far.
    pub fn traffic(&self, direction: Direction) -> Traffic {
        let way = self.way(direction);
        Traffic {
            frames: way.frames.load(Relaxed),
            bytes: way.bytes.load(Relaxed),
            dropped: way.dropped.load(Relaxed),
            limited: way.limited.load(Relaxed),
            limited_for: Duration::from_nanos(way.limited_nanoseconds.load(Relaxed)),
        }
    }
}
