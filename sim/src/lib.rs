//! Simulates memory policies with the same guests, demand and faults.
//!
//! A run is a pure function of a [`trace::Trace`], a [`Setup`] and a policy, without a clock, I/O or
//! randomness of its own. So two runs of the same seed are equal to the bit, and only the policy makes a
//! difference.
//!
//! [`trace`] makes demand, [`recorded`] reads it from files, `guest` models a VM, [`faults`] what goes wrong
//! with it, and [`policies`] decide. [`world`] runs all of them together, `score` judges the run, `bound`
//! tells the best possible score, [`sweep`] makes many runs, and [`plot`] draws them.
//!
//! Ours is [`balancer::policy`] itself, the code that the daemon runs.
//!
//! [`fleet`] is about many hosts: a cluster's placement of VMs over a day.

mod bound;
pub mod faults;
pub mod fleet;
mod guest;
pub mod plot;
pub mod policies;
mod random;
pub mod recorded;
pub mod report;
mod score;
pub mod sweep;
pub mod trace;
mod words;
pub mod world;

use std::time::Duration;

use api::limits::Limits;
use api::units::Bytes;
use serde::{Deserialize, Serialize};

use faults::Fault;

/// The length of one step of the simulated world.
pub const STEP: Duration = Duration::from_millis(250);

/// The simulated host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimulatedHost {
    /// All its memory.
    pub total: Bytes,
    /// What it keeps for itself; the rest is the budget of all VMs.
    pub reserve: Bytes,
}

impl Default for SimulatedHost {
    fn default() -> Self {
        Self { total: Bytes::gib(64), reserve: Bytes::gib(2) }
    }
}

impl SimulatedHost {
    /// What all VMs together may hold.
    pub fn budget(&self) -> Bytes {
        self.total.saturating_sub(self.reserve)
    }
}

/// How fast memory moves, in bytes a second. Read from a file, or [`Speeds::default`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Speeds {
    /// A guest gives up free memory.
    pub inflate: Bytes,
    /// A guest takes memory back.
    pub deflate: Bytes,
    /// Memory is plugged into a guest (virtio-mem).
    pub plug: Bytes,
    /// A guest gives up free memory that was plugged into it.
    pub unplug: Bytes,
    /// A guest drops page cache to give it up.
    pub reclaim: Bytes,
    /// A guest swaps, out or in.
    pub swap: Bytes,
    /// A guest reads files into its page cache.
    pub read: Bytes,
}

/// Guesses for a current server and a balloon of 4 KiB pages: the guest's allocator and the virtqueue limit
/// inflation, an SSD limits swap. Plugging moves whole blocks, and took a fifth to a third of a balloon's
/// time in the lab.
impl Default for Speeds {
    fn default() -> Self {
        Self {
            inflate: Bytes::mib(512),
            deflate: Bytes::gib(1),
            plug: Bytes::gib(4),
            unplug: Bytes::gib(2),
            reclaim: Bytes::mib(256),
            swap: Bytes::mib(100),
            read: Bytes::mib(40),
        }
    }
}

/// How guests grow beyond their startup memory, as with `ballast run --grow`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grow {
    /// They have all of their memory map from the start, and a balloon in it.
    #[default]
    Balloon,
    /// They have their startup memory, and more is plugged in. A balloon takes what goes below that.
    Plug,
}

impl Grow {
    /// How fast a guest of these limits that has `actual` takes more, and gives memory up.
    pub fn speeds(self, speeds: &Speeds, limits: &Limits, actual: Bytes) -> (Bytes, Bytes) {
        let startup = limits.startup();
        match self {
            Self::Balloon => (speeds.deflate, speeds.inflate),
            Self::Plug if actual < startup => (speeds.deflate, speeds.inflate),
            Self::Plug if actual == startup => (speeds.plug, speeds.inflate),
            Self::Plug => (speeds.plug, speeds.unplug),
        }
    }
}

/// When guests report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reports {
    /// When a policy is about to look, as a VM of ballast's asks its guest (`GET /memory?max_age_ms=20`), and
    /// by their own clock. A guest that waits for memory answers late.
    #[default]
    Asked,
    /// By their own clock alone, as with a VMM that can't be told to ask.
    Timed,
}

/// Everything about a run but the demand and the policy.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// The host.
    pub host: SimulatedHost,
    /// How fast memory moves.
    pub speeds: Speeds,
    /// How guests grow.
    pub grow: Grow,
    /// When guests report, to all policies alike.
    pub reports: Reports,
    /// What is wrong with the first VMs, one each.
    pub faults: Vec<Fault>,
}

#[cfg(test)]
mod tests;
