//! How long an interrupt handler finds work at the port: a real line is slow, and a handler relies on that.
//!
//! Linux's 8250 handler goes on while the port has a byte for it, or room for one. A line without
//! a speed would hold it, and its processor, for as long as the other side keeps up. So the port
//! rests after each burst: it shows neither input nor room, the handler ends, and a timer wakes it.

use std::time::{Duration, Instant};

/// Bytes of which a burst consists. Linux's handler takes so many at once, and gives up for good where it has
/// found work twice as often, as it does on a port that has gone mad.
pub(super) const BURST: u32 = 256;

/// Where no byte passes for so long, no handler is at work, and the next byte begins a burst anew.
pub(super) const IDLE: Duration = Duration::from_millis(1);

/// The shortest rest: many times what a handler takes to see that nothing is left.
const SHORTEST_REST: Duration = Duration::from_micros(500);
/// The longest, for hosts that are slow or busy.
const LONGEST_REST: Duration = Duration::from_millis(20);
/// A rest as a part of its burst. A third of the time is left to the guest's programs.
const BURST_TO_REST: u32 = 2;

/// Whether the port is at work for an interrupt handler, or rests.
#[derive(Clone, Copy, Debug)]
pub(super) enum Burst {
    /// Nothing has passed yet.
    New,
    /// Bytes pass.
    Works {
        /// When the first of them passed.
        since: Instant,
        /// When the last did.
        last: Instant,
        /// What is left of the burst, in bytes.
        left: u32,
    },
    /// Nothing passes.
    Rests {
        /// When that ends.
        until: Instant,
    },
}

impl Burst {
    /// A byte passes at `now`.
    pub(super) fn spend(&mut self, now: Instant) {
        let (since, left) = match *self {
            // A driver that has found room fills it.
            Self::Rests { until } if now < until => return,
            Self::Works { since, last, left } if now.saturating_duration_since(last) < IDLE => (since, left),
            _ => (now, BURST),
        };
        *self = if left > 1 {
            Self::Works { since, last: now, left: left - 1 }
        } else {
            let rest = now.saturating_duration_since(since) / BURST_TO_REST;
            Self::Rests { until: now + rest.clamp(SHORTEST_REST, LONGEST_REST) }
        };
    }

    /// When the rest ends that the port takes at `now`, if it takes one.
    pub(super) fn rest(&self, now: Instant) -> Option<Instant> {
        match *self {
            Self::Rests { until } if now < until => Some(until),
            _ => None,
        }
    }
}
