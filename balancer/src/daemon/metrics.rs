//! The daemon's figures as Prometheus reads them.

use std::time::Duration;

use api::metrics::{Kind, Page, Value};
use api::status::Pauser;
use api::units::Bytes;

use super::shared::Shared;
use super::state::{MemoryView, State, VmView};

type MemoryGauge = (&'static str, &'static str, fn(&MemoryView) -> Option<Bytes>);

const OF_MEMORY: [MemoryGauge; 7] = [
    ("vm_used_bytes", "What the guest uses", |m| m.used),
    ("vm_demand_bytes", "Its use with its buffer, within its limits", |m| Some(m.demand)),
    ("vm_entitlement_bytes", "What it may have now", |m| Some(m.entitlement)),
    ("vm_target_bytes", "What it is asked to have", |m| Some(m.target)),
    ("vm_actual_bytes", "What it has", |m| Some(m.actual)),
    ("vm_resident_bytes", "What the host holds for it", |m| m.host_rss),
    ("vm_charge_bytes", "What it is charged", |m| Some(m.charge)),
];

type VmCounter = (&'static str, &'static str, fn(&VmView) -> u64);

const OF_VM: [VmCounter; 3] = [
    ("vm_grows", "Targets raised", |vm| vm.grows),
    ("vm_shrinks", "Targets lowered", |vm| vm.shrinks),
    ("vm_errors", "Requests that the VM did not answer as it should", |vm| vm.errors),
];

/// The answer to `GET /metrics`: the last state. VMs that have gone are in none.
pub fn page(shared: &Shared) -> String {
    let mut page = Page::new("ballast_balancer", None);
    let State { rounds, host, vms, reservations } = &*shared.get();
    let reserved: Bytes = reservations.iter().map(|reservation| reservation.granted).sum();
    for (name, help, value) in [
        ("host_total_bytes", "The host's memory", Value::from(host.total)),
        ("host_available_bytes", "What the host could give without swapping", host.available.into()),
        ("budget_bytes", "What all VMs together may hold", host.budget.into()),
        ("charged_bytes", "What VMs may hold as things stand", host.charged.into()),
        ("free_bytes", "What is left of the budget", host.free.into()),
        ("over_budget_bytes", "How far the charges are over the budget", host.over.into()),
        ("unserved_bytes", "What VMs are entitled to and was not there to give", host.unserved.into()),
        ("host_state", "0 normal, 1 soft, 2 hard, 3 emergency", (host.state as u64).into()),
        ("vms", "VMs that are known", (vms.len() as u64).into()),
        ("reserved_bytes", "What is kept for VMs that are about to start", reserved.into()),
        (
            "host_pressure_ratio",
            "The share of the last ten seconds in which some task on the host waited for memory",
            host.pressure_percent.map(|percent| percent / 100.0).into(),
        ),
    ] {
        page.gauge(name, help, value);
    }
    page.counter("rounds", "Rounds since the daemon started", *rounds);
    let help = "Rounds in which the charges were over the budget";
    page.counter("rounds_over_budget", help, host.rounds_over_budget);
    shared.timings().write(&mut page);

    for (name, help, value) in OF_MEMORY {
        of_vms(&mut page, Kind::Gauge, name, help, vms, |vm| vm.memory.as_ref().and_then(value));
    }
    let help = "How old the guest's last report is";
    of_vms(&mut page, Kind::Gauge, "vm_report_age_seconds", help, vms, |vm| {
        vm.report_age_ms.map(Duration::from_millis)
    });
    let help = "1 while it is paused by the balancer, as memory has run out";
    of_vms(&mut page, Kind::Gauge, "vm_paused_by_balancer", help, vms, |vm| {
        vm.paused_by == Some(Pauser::Balancer)
    });
    let help = "What it wants over what it has: above 1 it is short";
    of_vms(&mut page, Kind::Gauge, "vm_pressure_ratio", help, vms, |vm| {
        let memory = vm.memory.as_ref().filter(|memory| memory.actual.0 > 0)?;
        Some(memory.demand.0 as f64 / memory.actual.0 as f64)
    });
    let history = shared.history();
    let help = "Targets moved the other way than the time before";
    of_vms(&mut page, Kind::Counter, "vm_reversals", help, vms, |vm| history.reversals(&vm.name));
    drop(history);
    for (name, help, value) in OF_VM {
        of_vms(&mut page, Kind::Counter, name, help, vms, value);
    }
    page.finish()
}

/// The same figure of each VM.
fn of_vms<V: Into<Value>>(
    page: &mut Page,
    kind: Kind,
    name: &str,
    help: &str,
    vms: &[VmView],
    value: impl Fn(&VmView) -> V,
) {
    page.family(kind, name, help, "vm", vms.iter().map(|vm| (vm.name.as_str(), value(vm))));
}
