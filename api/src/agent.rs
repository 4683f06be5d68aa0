//! What the guest's agent says: the words that it, the VM and the balancer share.
//!
//! A report over the balloon's statistics queue waits to be asked for. The
//! agent (`ballast-agent`, optional) speaks up by itself when its guest
//! stalls, and adds what the balloon's driver can't tell. [`wire`] is how its
//! words travel. All of them are the guest's and may be lies.

pub mod wire;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// The name of the virtio-console port that the agent talks on; udev links it
/// as `/dev/virtio-ports/org.ballast.agent.0`.
pub const PORT: &str = "org.ballast.agent.0";

/// What an agent knows of its guest's memory. Each figure is `None` where the
/// guest's kernel does not tell it. Counts go on from when the guest booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentFigures {
    /// What could be had without swapping (`MemAvailable`), at the moment of sending.
    pub available: Option<Bytes>,
    /// What the kernel manages (`MemTotal`).
    pub total: Option<Bytes>,
    /// What processes were promised (`Committed_AS`).
    pub committed: Option<Bytes>,
    /// Microseconds in which some task waited for memory (`/proc/pressure/memory`).
    pub stall_us: Option<u64>,
    /// Microseconds in which all tasks that could have run waited for memory.
    pub full_stall_us: Option<u64>,
    /// Pages that had been evicted and were needed again (`workingset_refault_*`), in bytes.
    pub refaults: Option<Bytes>,
    /// Memory swapped in.
    pub swap_in: Option<Bytes>,
    /// Memory swapped out.
    pub swap_out: Option<Bytes>,
    /// Swap that is not in use.
    pub swap_free: Option<Bytes>,
    /// Allocations that had to reclaim memory themselves (`allocstall_*`).
    pub allocation_stalls: Option<u64>,
    /// Processes killed for lack of memory.
    pub oom_kills: Option<u64>,
    /// Microseconds in which the cgroup that waited most waited for memory.
    pub cgroup_stall_us: Option<u64>,
    /// How often a cgroup came to its own limit, which more memory for the guest does not lift.
    pub cgroup_limited: Option<u64>,
}

/// An agent's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Version {
    /// Changes with what an older VM would misunderstand.
    pub major: u16,
    /// Changes with what is new.
    pub minor: u16,
    /// Changes with what is mended.
    pub patch: u16,
}

impl Version {
    /// The version of this package.
    pub const OWN: Self = Self {
        major: number(env!("CARGO_PKG_VERSION_MAJOR")),
        minor: number(env!("CARGO_PKG_VERSION_MINOR")),
        patch: number(env!("CARGO_PKG_VERSION_PATCH")),
    };
}

/// Reads what cargo sets while this is compiled.
const fn number(digits: &str) -> u16 {
    match u16::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => panic!("a version's parts are numbers"),
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.to_string()
    }
}

impl TryFrom<String> for Version {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut parts = text.split('.').map(str::parse);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch)), None) => Ok(Self { major, minor, patch }),
            _ => Err("a version is three numbers with dots between them".to_owned()),
        }
    }
}

/// The agent of a VM as its VMM knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Whether a program in the guest holds the port open.
    pub connected: bool,
    /// The agent's version, once it has said so.
    pub version: Option<Version>,
    /// Milliseconds since its last word.
    pub age_ms: u64,
    /// Milliseconds since it last said that its guest is in distress.
    pub distress_age_ms: Option<u64>,
    /// What it said last of each figure.
    pub figures: AgentFigures,
    /// What the guest had when the agent last told what is available, as in a report of the balloon's driver;
    /// `None` where it is not known.
    #[serde(default)]
    pub had: Option<Bytes>,
    /// What of that its kernel managed; `None` where it is not known.
    #[serde(default)]
    pub managed: Option<Bytes>,
    /// Words heard.
    pub heard: u64,
    /// Words passed over because there were too many in too short a time.
    pub dropped: u64,
    /// Times that what came made no sense.
    pub malformed: u64,
}

/// What happened, in a line of `GET /memory/events`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The first line: how things stand when the stream begins.
    Subscribed,
    /// The agent has sent its figures.
    Figures,
    /// The agent says that its guest waits for memory now.
    Distress,
    /// The balloon's report shows that the guest waits for memory; this needs no agent.
    Stalls,
    /// The guest took pages back of its balloon rather than run out of memory; this needs no agent.
    DeflatedOnOom,
    /// The agent has gone.
    AgentGone,
    /// The host could not do what the guest asked of a disk, and the VM was paused for it.
    DiskFailed,
}

impl EventKind {
    /// Whether the guest can't wait for the next poll.
    pub const fn is_urgent(self) -> bool {
        matches!(self, Self::Distress | Self::Stalls | Self::DeflatedOnOom)
    }
}

/// One line of `GET /memory/events`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEvent {
    /// Counts the VM's events; a gap is what a reader has missed.
    pub sequence: u64,
    /// What happened.
    pub event: EventKind,
    /// The agent as it is then; `None` where none was ever heard.
    pub agent: Option<AgentStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_they_are_written() {
        let version = Version { major: 0, minor: 10, patch: 65535 };
        assert_eq!(Version::try_from(version.to_string()), Ok(version));
        for wrong in ["", "1", "1.2", "1.2.3.4", "1.2.x", "1.2.65536"] {
            assert!(Version::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
        assert_eq!(Version::OWN.to_string(), env!("CARGO_PKG_VERSION"));
    }
}
