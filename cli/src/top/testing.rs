//! VMs and hosts to draw, for tests.

use api::limits::Limits;
use api::units::Bytes;
use balancer::policy::guards::Standing;
use balancer::policy::host_state::HostState;
use balancer::policy::reason::{Reason, Rule};

use super::snapshot::{Budget, Condition, Host, Memory, Snapshot, Source, Vm};

/// A VM that uses `used` MiB of the `actual` MiB it has.
pub fn vm(name: &str, used: u64, actual: u64) -> Vm {
    let (used, actual) = (Bytes::mib(used), Bytes::mib(actual));
    let memory = Memory {
        limits: Limits::new(Bytes::mib(256), Bytes::mib(128), Bytes::gib(8), 20, 100).unwrap(),
        used: Some(used),
        demand: Some(used.percent(120)),
        entitlement: Some(used.percent(120)),
        target: actual,
        actual,
        host_rss: Some(actual.percent(90)),
        huge_percent: Some(50),
        report_age_ms: Some(400),
    };
    let reason = Reason {
        used: Some(used),
        demand: used.percent(120),
        entitlement: used.percent(120),
        state: HostState::Soft,
        rule: Rule::Grow,
        old: Bytes::mib(128),
        new: actual,
    };
    Vm {
        name: name.to_owned(),
        condition: Condition::Balanced(Standing::Following),
        memory: Some(memory),
        reason: Some(reason),
    }
}

/// A host of 64 GiB whose balancer looks after `vms`.
pub fn balanced(vms: Vec<Vm>) -> Snapshot {
    let budget = Budget {
        whole: Bytes::gib(62),
        charged: Bytes::gib(31),
        free: Bytes::gib(31),
        over: Bytes::ZERO,
        unserved: Bytes::ZERO,
        state: HostState::Normal,
    };
    let host = Host { total: Bytes::gib(64), available: Bytes::gib(32), budget: Some(budget) };
    Snapshot { source: Source::Balancer { rounds: 7 }, host, vms }
}

/// `count` VMs named `vm-000` and on, each using a little more than the one before.
pub fn many(count: usize) -> Vec<Vm> {
    (0..count).map(|n| vm(&format!("vm-{n:03}"), 100 + n as u64, 512)).collect()
}
