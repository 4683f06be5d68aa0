//! By which means a guest reaches its target. Pure: no clock, no device here;
//! [`steering`] does what it says.
//!
//! Memory that the guest frees goes back to the host by itself, where the
//! guest reports free pages. Beyond that a guest that plugs has three means:
//!
//! 1. **Plugging** gives it blocks of 2 MiB, which the host need not trust to stay gone before.
//! 2. **Unplugging** takes blocks whole.
//! 3. **The balloon** works page by page, and can squeeze a guest whose free memory lies scattered. It does
//!    not take more at the same time as the guest unplugs: Linux takes the pages for it from the very
//!    blocks that are to go.
//!
//! Plugging takes a guest's time, and its kernel kills a process in less. So a [`cushion`] is plugged
//! beyond the target and lies in the balloon: it costs the host nothing, and a guest
//! that runs out of memory has it at once (deflate-on-OOM). How such a guest is moved is in `cushioned`: its
//! balloon follows each change of the target, and what is plugged follows much later and in large pieces.
//!
//! A guest without a cushion unplugs at once, and its balloon takes what is left: what lies below the boot memory,
//! and what the guest could not unplug once it has made no progress for [`UNPLUG_PATIENCE`].
//!
//! A VM without pluggable memory has the balloon alone.
//!
//! What the guest's kernel does not manage is none of the memory that it is to have. What of its boot memory
//! that is counts as not there; what was plugged and is not on line can be unplugged, and no balloon takes it.

mod cushioned;
pub mod steering;

use std::time::Duration;

use api::status::UNPLUG_PATIENCE;
use api::units::Bytes;

/// A cushion is as large as the target: a guest can come to have twice as much at once. It is at least so much: a
/// second of a program that fills memory at 64 MiB/s,
const CUSHION_LEAST: Bytes = Bytes::mib(64);
/// and at most so much: it is what a guest can have beyond the budget, and each 64 MiB of it cost the guest one.
const CUSHION_MOST: Bytes = Bytes::mib(256);

/// Of a cushion so much is plugged before the balloon holds the rest: meanwhile the guest could use it. The balloon
/// may take as much of other memory before the guest has on line what it plugged: a small one has no more to spare.
const AHEAD: Bytes = Bytes::mib(16);

/// What to keep plugged beyond `target` for a guest that may have `max`. So much less is
/// plugged of it as the target lies below what the guest booted with: the balloon holds that anyway.
pub fn cushion(target: Bytes, max: Bytes) -> Bytes {
    target.clamp(CUSHION_LEAST, CUSHION_MOST).min(max.saturating_sub(target))
}

/// How a guest's memory stands, as far as it matters for what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What it booted with, as far as its kernel manages that.
    pub boot: Bytes,
    /// What memory is plugged in.
    pub block: Bytes,
    /// What it has plugged.
    pub plugged: Bytes,
    /// What of that is not on line.
    pub off_line: Bytes,
    /// Whether it has a driver that could unplug.
    pub driver: bool,
    /// How long ago it last plugged or unplugged, was asked for something new, or had its balloon let go of all.
    pub waited: Duration,
    /// What its balloon was last asked to hold.
    pub held: Bytes,
    /// What its balloon holds, as its driver says.
    pub balloon: Bytes,
    /// The most that it may have, with what lies in the balloon.
    pub max: Bytes,
    /// What to keep plugged beyond the target; `None` for a guest whose balloon would not hold it.
    pub cushion: Option<Bytes>,
    /// What its cushion does.
    pub phase: Phase,
}

/// What the balloon does with a guest's cushion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It holds it.
    Held {
        /// So much more than the cushion is plugged and could not be unplugged when that was last tried.
        stuck: Bytes,
    },
    /// The balloon lets go of all that it holds, so that its pages are not moved one by one, and the guest unplugs.
    Unplugging {
        /// What counts as in the balloon meanwhile.
        let_go: Bytes,
    },
    /// The balloon fills again afterwards.
    Refilling {
        /// What counts as in the balloon meanwhile.
        let_go: Bytes,
        /// As in [`Phase::Held`].
        stuck: Bytes,
    },
}

impl Phase {
    /// The cushion lies in the balloon, and nothing is known of what can't be unplugged.
    pub const CALM: Self = Self::Held { stuck: Bytes::ZERO };

    /// What is out of the balloon and counts as there: the guest may take it as it may take what is there.
    pub fn let_go(self) -> Bytes {
        match self {
            Self::Held { .. } => Bytes::ZERO,
            Self::Unplugging { let_go } | Self::Refilling { let_go, .. } => let_go,
        }
    }
}

/// What to ask of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// What it should have plugged, in whole blocks.
    pub requested: Bytes,
    /// What its balloon should hold.
    pub held: Bytes,
    /// What its cushion does from now on.
    pub phase: Phase,
    /// When to look again if nothing happens until then.
    pub look_again: Option<Duration>,
}

/// What to ask of a guest that shall have `target`, which lies at a whole block above the boot
/// memory, or below it.
pub fn steps(standing: Standing, target: Bytes) -> Steps {
    if let Some(cushion) = standing.cushion {
        return cushioned::steps(standing, target, cushion);
    }
    let requested = standing.blocks_for(target);
    let needed = standing.has().saturating_sub(target);
    let unplugs = standing.plugged > requested && standing.driver && standing.waited < UNPLUG_PATIENCE;
    let held = if unplugs { needed.min(standing.held) } else { needed };
    let look_again = (held < needed).then(|| UNPLUG_PATIENCE.saturating_sub(standing.waited));
    Steps { requested, held, phase: Phase::CALM, look_again }
}

impl Standing {
    /// What it could use if the balloon held nothing.
    fn has(&self) -> Bytes {
        self.boot.saturating_add(self.plugged.saturating_sub(self.off_line))
    }

    /// What is to be plugged for it to have `amount`.
    fn blocks_for(&self, amount: Bytes) -> Bytes {
        let above = amount.saturating_sub(self.boot).0;
        Bytes(above.checked_div(self.block.0).unwrap_or(0).saturating_mul(self.block.0))
    }
}

#[cfg(test)]
mod tests;
