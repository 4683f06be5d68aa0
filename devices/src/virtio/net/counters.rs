//! What passes a NIC, counted.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

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
}

/// Counts since the device was made.
#[derive(Debug, Default)]
pub struct Counters {
    received: Way,
    sent: Way,
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
}

impl Counters {
    fn way(&self, direction: Direction) -> &Way {
        match direction {
            Direction::Received => &self.received,
            Direction::Sent => &self.sent,
        }
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

    /// What went one way so far.
    pub fn traffic(&self, direction: Direction) -> Traffic {
        let Way { frames, bytes, dropped } = self.way(direction);
        Traffic { frames: frames.load(Relaxed), bytes: bytes.load(Relaxed), dropped: dropped.load(Relaxed) }
    }
}
