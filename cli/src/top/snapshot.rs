//! The host and its VMs at one moment, wherever that was learnt.

use std::fmt;

use api::limits::Limits;
use api::status::{DriverState, MemoryStatus, Pauser};
use api::units::Bytes;
use balancer::daemon::{State, VmView};
use balancer::policy::guards::Standing;
use balancer::policy::host_state::HostState;
use balancer::policy::reason::Reason;
use serde::{Serialize, Serializer};

/// What there is to show.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// Who told it.
    pub source: Source,
    /// The host.
    pub host: Host,
    /// Its VMs.
    pub vms: Vec<Vm>,
}

/// Who told it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "from", rename_all = "kebab-case")]
pub enum Source {
    /// The balancer.
    Balancer {
        /// Rounds since it started.
        rounds: u64,
    },
    /// Each VM for itself.
    Vms {
        /// Why not the balancer.
        because: String,
    },
}

/// The host's side.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Host {
    /// What its kernel manages.
    pub total: Bytes,
    /// What could be had without swapping.
    pub available: Bytes,
    /// How the balancer deals it out.
    pub budget: Option<Budget>,
}

/// The balancer's accounts.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Budget {
    /// What all VMs together may hold.
    pub whole: Bytes,
    /// What they may hold as things stand.
    pub charged: Bytes,
    /// What is left of it.
    pub free: Bytes,
    /// How far they are over it.
    pub over: Bytes,
    /// What VMs are entitled to and was not there to give.
    pub unserved: Bytes,
    /// How short the host is.
    pub state: HostState,
}

/// One VM.
#[derive(Clone, Debug, Serialize)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// How it does.
    pub condition: Condition,
    /// What is known of its memory; absent where it does not answer.
    pub memory: Option<Memory>,
    /// The last decision about it.
    pub reason: Option<Reason>,
}

/// The memory of one VM.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// What the administrator set.
    pub limits: Limits,
    /// What the guest uses, as far as it ever said.
    pub used: Option<Bytes>,
    /// Its use with its buffer; the balancer's finding.
    pub demand: Option<Bytes>,
    /// What it may have; the balancer's finding.
    pub entitlement: Option<Bytes>,
    /// What it is asked to have.
    pub target: Bytes,
    /// What it has.
    pub actual: Bytes,
    /// What the host holds for it, where that is known.
    pub host_rss: Option<Bytes>,
    /// The share of that in huge pages, in percent, where it is known.
    pub huge_percent: Option<u8>,
    /// How old its guest's last report is.
    pub report_age_ms: Option<u64>,
}

/// How a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// As the balancer sees it.
    Balanced(Standing),
    /// The balancer paused it, and it waits for room.
    WaitsForRoom,
    /// It is paused; nobody balances it.
    Paused,
    /// It paused itself, as the host failed one of its disks.
    PausedByDisk,
    /// It answers; nobody balances it.
    Alone(DriverState),
    /// It answers something else.
    Unreadable,
    /// It does not answer.
    NotAnswering,
    /// Its process is gone; its socket is still there.
    Dead,
}

impl Condition {
    /// Whether somebody should look after it.
    pub const fn is_trouble(self) -> bool {
        match self {
            Self::Balanced(standing) => {
                use Standing::{Booting, Following, Leaving, Static};
                !matches!(standing, Following | Static | Booting | Leaving)
            }
            Self::Alone(driver) => !matches!(driver, DriverState::Active),
            Self::WaitsForRoom
            | Self::Paused
            | Self::PausedByDisk
            | Self::Unreadable
            | Self::NotAnswering
            | Self::Dead => true,
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Balanced(standing) => return standing.fmt(f),
            Self::WaitsForRoom => "paused, waits",
            Self::Paused => "paused",
            Self::PausedByDisk => "paused by disk",
            Self::Alone(DriverState::Active) => "not balanced",
            Self::Alone(DriverState::Absent) => "no driver",
            Self::Alone(DriverState::Silent) => "no reports",
            Self::Alone(DriverState::Broken) => "driver broken",
            Self::Unreadable => "unreadable",
            Self::NotAnswering => "not answering",
            Self::Dead => "dead",
        })
    }
}

impl Serialize for Condition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Snapshot {
    /// What the balancer told.
    pub fn of_balancer(state: State) -> Self {
        let host = state.host;
        Self {
            source: Source::Balancer { rounds: state.rounds },
            host: Host {
                total: host.total,
                available: host.available,
                budget: Some(Budget {
                    whole: host.budget,
                    charged: host.charged,
                    free: host.free,
                    over: host.over,
                    unserved: host.unserved,
                    state: host.state,
                }),
            },
            vms: state.vms.into_iter().map(Vm::of_balancer).collect(),
        }
    }
}

impl Vm {
    fn of_balancer(vm: VmView) -> Self {
        let report_age_ms = vm.report_age_ms;
        let memory = vm.memory.map(|memory| Memory {
            limits: memory.limits,
            used: memory.used,
            demand: Some(memory.demand),
            entitlement: Some(memory.entitlement),
            target: memory.target,
            actual: memory.actual,
            host_rss: memory.host_rss,
            huge_percent: memory.huge_percent,
            report_age_ms,
        });
        let condition = match (vm.standing, vm.paused_by) {
            (Standing::Paused, Some(Pauser::Balancer)) => Condition::WaitsForRoom,
            (Standing::Paused, Some(Pauser::Disk)) => Condition::PausedByDisk,
            (standing, _) => Condition::Balanced(standing),
        };
        Self { name: vm.name, condition, memory, reason: vm.last_reason }
    }

    /// What the VM itself told.
    pub fn alone(name: String, status: &MemoryStatus) -> Self {
        let memory = Memory {
            limits: status.limits,
            used: status.used(),
            demand: None,
            entitlement: None,
            target: status.target,
            actual: status.actual,
            host_rss: status.host_rss,
            huge_percent: status.huge_percent(),
            report_age_ms: status.report.as_ref().map(|report| report.age_ms),
        };
        let condition = match status.paused_by {
            Some(Pauser::Balancer) => Condition::WaitsForRoom,
            Some(Pauser::Disk) => Condition::PausedByDisk,
            Some(Pauser::Operator) => Condition::Paused,
            None => Condition::Alone(status.driver),
        };
        Self { name, condition, memory: Some(memory), reason: None }
    }

    /// One that told nothing.
    pub const fn mute(name: String, condition: Condition) -> Self {
        Self { name, condition, memory: None, reason: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_the_balancer_paused_is_told_from_one_that_somebody_else_did() {
        for (standing, paused_by, word) in [
            (Standing::Paused, Some(Pauser::Balancer), "paused, waits"),
            (Standing::Paused, Some(Pauser::Operator), "paused"),
            (Standing::Paused, Some(Pauser::Disk), "paused by disk"),
            (Standing::NotAnswering, Some(Pauser::Balancer), "not answering"),
        ] {
            let view = VmView {
                name: "web".to_owned(),
                vmm: balancer::driver::Kind::Ballast,
                standing,
                paused_by,
                memory: None,
                held: None,
                report_age_ms: None,
                last_reason: None,
                grows: 0,
                shrinks: 0,
                errors: 0,
            };
            let vm = Vm::of_balancer(view);
            assert_eq!(vm.condition.to_string(), word);
            assert!(vm.condition.is_trouble());
        }
    }
}
