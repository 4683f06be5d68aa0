//! What the policy is told: about the host, and by each VM.
//!
//! All of it is measured or said elsewhere and may be missing. What nobody knows
//! is `None` and never guessed: the policy then does without it.
//!
//! A VM's memory has five amounts, each with its own source. What it was *given* is its VMM's word
//! ([`Observation::given`]). What it *has* of that is what its kernel manages ([`Observation::actual`]). What
//! it *used* is its kernel's word, all of one moment ([`GuestMemory`]). What is *resident* is the host's word
//! ([`Observation::host_rss`]). What it is *allowed* is its operator's word, within what its kernel, its
//! control groups and the host allow ([`Observation::limits`]).

use std::time::Duration;

use api::agent::AgentFigures;
use api::guest_memory::GuestMemory;
use api::limits::Limits;
use api::report::Report;
use api::status::{DriverState, MemoryStatus, OomDeflate, Pauser};
use api::units::Bytes;

/// The host as the policy sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostObservation {
    /// What all VMs together may hold.
    pub budget: Bytes,
    /// How much of its recent time the host itself waited for memory, where that is known.
    pub pressure: Option<Pressure>,
    /// What the host could still swap out, where that is known.
    pub swap: Option<Bytes>,
    /// What the host could give without swapping, whoever asks for it, where that is known.
    pub available: Option<Bytes>,
}

impl HostObservation {
    /// A host of which only the budget is known.
    pub const fn of(budget: Bytes) -> Self {
        Self { budget, pressure: None, swap: None, available: None }
    }
}

/// The share of recent time in which some task waited for memory, in hundredths of a
/// percent: the `some avg10` of Linux's `/proc/pressure/memory`
/// (Documentation/accounting/psi.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pressure(u16);

impl Pressure {
    /// No waiting at all.
    pub const NONE: Self = Self(0);

    /// From percent as the kernel prints them, such as `12.34`. What is no share (below 0, not a number)
    /// counts as none, and more than all counts as all.
    pub fn percent(percent: f64) -> Self {
        // `clamp` leaves what is not a number as it is, and the cast takes that as 0.
        Self((percent * 100.0).round().clamp(0.0, 10_000.0) as u16)
    }

    /// In percent.
    pub fn as_percent(self) -> f64 {
        f64::from(self.0) / 100.0
    }
}

/// What a guest says of how it waits for memory: counters since it booted, each `None`
/// where its driver or agent does not send it.
///
/// Only their growth counts, and a guest can lie in all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stalls {
    /// Time in which some task waited for memory: `some total` of the guest's
    /// `/proc/pressure/memory`, which only an agent can tell.
    pub waited: Option<Duration>,
    /// Times an allocation had to wait (`allocstall`).
    pub allocation_stalls: Option<u64>,
    /// Pages that allocations scanned themselves (`pgscan_direct`).
    pub direct_scans: Option<u64>,
    /// Pages that allocations reclaimed themselves (`pgsteal_direct`).
    pub direct_reclaims: Option<u64>,
    /// Memory swapped in.
    pub swap_in: Option<Bytes>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Pages read again that were dropped not long ago (`workingset_refault_file` and
    /// `_anon`), which only an agent can tell.
    pub refaults: Option<u64>,
}

impl Stalls {
    /// Takes over what an agent tells and the balloon's driver does not.
    fn learn(&mut self, agent: &AgentFigures) {
        self.waited = agent.stall_us.map(Duration::from_micros);
        self.refaults = agent.refaults.map(|bytes| bytes.pages().0);
        self.allocation_stalls = self.allocation_stalls.or(agent.allocation_stalls);
        self.swap_in = self.swap_in.or(agent.swap_in);
    }
}

impl From<&Report> for Stalls {
    fn from(report: &Report) -> Self {
        Self {
            waited: None,
            allocation_stalls: report.allocation_stalls,
            direct_scans: report.direct_scans,
            direct_reclaims: report.direct_reclaims,
            swap_in: report.swap_in,
            major_faults: report.major_faults,
            refaults: None,
        }
    }
}

/// What a guest's kernel can't do without beside its own share: its processes, and what it keeps free.
pub const LEAST_BESIDE_KERNEL: Bytes = Bytes::mib(16);

/// What a VM last said about its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// What it is allowed: what the administrator set, no more than its kernel manages, and no less than
    /// that kernel has for itself.
    pub limits: Limits,
    /// How long ago it said so, before the round that looks at it: the figures below were so then.
    pub since: Duration,
    /// What it was last asked to have.
    pub target: Bytes,
    /// What it has: what it was given and its kernel manages.
    pub actual: Bytes,
    /// What it was given beside that, by its guest's word: no balloon can take it, and no honest guest
    /// touches it.
    pub unmanaged: Bytes,
    /// What the host holds for it; `None` where nobody knows.
    pub host_rss: Option<Bytes>,
    /// How its driver is doing.
    pub driver: DriverState,
    /// Whether it has been at a target since its driver started; `None` where its VMM does not tell.
    pub followed: Option<bool>,
    /// Whether it is asked to unplug memory before its balloon takes any.
    pub plugs: bool,
    /// What the guest's kernel said of its memory; `None` where it never did.
    pub guest: Option<GuestMemory>,
    /// That news is that it took pages back of its balloon rather than run out of memory.
    pub ran_out: bool,
    /// What it has above its target because of that: it is no shrink that the guest owes.
    pub taken: Bytes,
    /// How it waits for memory.
    pub stalls: Stalls,
    /// What the guest has promised its programs (`Committed_AS`), where an agent tells: a hint.
    pub committed: Option<Bytes>,
    /// What its vCPUs do.
    pub vcpus: Vcpus,
    /// Whether whoever carries decisions out can pause it and later tell that pause from an operator's.
    pub pausable: bool,
}

/// What a VM's vCPUs do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vcpus {
    /// They run, or nobody tells that they don't.
    #[default]
    Run,
    /// They stand still: the VM then follows no target and its use stays what it is.
    Paused(Pauser),
    /// There are none: room is kept for a VM that is about to start.
    NotYet,
}

impl Vcpus {
    /// Who paused them; `None` where they are not paused.
    pub const fn paused_by(self) -> Option<Pauser> {
        match self {
            Self::Paused(by) => Some(by),
            Self::Run | Self::NotYet => None,
        }
    }
}

impl From<Option<Pauser>> for Vcpus {
    fn from(paused_by: Option<Pauser>) -> Self {
        paused_by.map_or(Self::Run, Self::Paused)
    }
}

impl Observation {
    /// What it was given, and could touch.
    pub fn given(&self) -> Bytes {
        self.actual.saturating_add(self.unmanaged)
    }

    /// A VM with these limits that has just started and whose guest has said nothing.
    pub fn of(limits: Limits) -> Self {
        let startup = limits.startup();
        Self {
            limits,
            since: Duration::ZERO,
            target: startup,
            actual: startup,
            unmanaged: Bytes::ZERO,
            host_rss: Some(Bytes::ZERO),
            driver: DriverState::Absent,
            followed: None,
            plugs: false,
            guest: None,
            ran_out: false,
            taken: Bytes::ZERO,
            stalls: Stalls::default(),
            committed: None,
            vcpus: Vcpus::Run,
            pausable: false,
        }
    }
}

impl Observation {
    /// What it was asked to give up and still has, and not because it ran out of memory.
    pub fn pending(&self) -> Bytes {
        self.actual.saturating_sub(self.target).saturating_sub(self.taken)
    }
}

impl From<&MemoryStatus> for Observation {
    fn from(status: &MemoryStatus) -> Self {
        let statistics = status.report.as_ref().map(|aged| &aged.statistics);
        let mut stalls = statistics.map(Stalls::from).unwrap_or_default();
        let agent = status.agent.as_ref().map(|agent| &agent.figures);
        if let Some(agent) = agent {
            stalls.learn(agent);
        }
        let mut guest = status.guest();
        // Not more than its guest has the kernel and the drivers for, and not less than it can do with.
        let kernel = guest.and_then(|guest| guest.kernel());
        let floor = kernel.map_or(Bytes::ZERO, |kernel| kernel.saturating_add(LEAST_BESIDE_KERNEL));
        let limits = status.limits.capped(status.ceiling()).raised(floor);
        let age = |deflate: &OomDeflate| Duration::from_millis(deflate.age_ms);
        let newest = |deflate: &OomDeflate| guest.is_none_or(|guest| age(deflate) <= guest.age);
        let ran_out = status.oom_deflate.filter(newest);
        if let Some(deflate) = ran_out {
            let (age, had, spare) = (age(&deflate), Some(deflate.had), Bytes::ZERO);
            guest = Some(GuestMemory { age, had, spare, managed: None });
        }
        Self {
            target: status.target,
            actual: status.actual,
            unmanaged: status.unmanaged(),
            host_rss: status.host_rss,
            driver: status.driver,
            followed: status.followed,
            plugs: status.plug.is_some(),
            guest,
            ran_out: ran_out.is_some(),
            taken: status.oom_deflate.map_or(Bytes::ZERO, |deflated| deflated.taken),
            stalls,
            committed: agent.and_then(|agent| agent.committed),
            vcpus: status.paused_by.into(),
            ..Self::of(limits)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pressure_is_a_share_whatever_it_is_made_of() {
        assert_eq!(Pressure::percent(12.34).as_percent(), 12.34);
        assert_eq!(Pressure::percent(-1.0), Pressure::NONE);
        assert_eq!(Pressure::percent(f64::NAN), Pressure::NONE);
        assert_eq!(Pressure::percent(f64::INFINITY).as_percent(), 100.0);
        assert!(Pressure::percent(0.5) < Pressure::percent(1.0));
    }

    #[test]
    fn a_report_tells_of_stalls_what_it_can() {
        let report = Report { direct_scans: Some(7), swap_in: Some(Bytes::mib(1)), ..Report::default() };
        let stalls = Stalls::from(&report);
        assert_eq!((stalls.direct_scans, stalls.swap_in), (Some(7), Some(Bytes::mib(1))));
        assert_eq!((stalls.waited, stalls.allocation_stalls), (None, None));
    }
}
