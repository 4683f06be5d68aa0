//! The daemon's figures as Prometheus reads them.

use std::fmt;

use api::status::Pauser;
use api::units::Bytes;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::shared::Shared;
use super::state::{MemoryView, State, VmView};

/// What Prometheus is told the text is.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The answer to `GET /metrics`.
///
/// # Errors
/// Where the text can't be written, which does not happen with one in memory.
pub fn page(shared: Shared) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("ballast_balancer");
    registry.register_collector(Box::new(Metrics(shared)));
    let mut page = String::new();
    text::encode(&mut page, &registry)?;
    Ok(page)
}

/// The last state, as metrics. VMs that have gone are in no scrape.
#[derive(Debug)]
struct Metrics(Shared);

type MemoryGauge = (&'static str, &'static str, fn(&MemoryView) -> Option<u64>);

const OF_MEMORY: [MemoryGauge; 7] = [
    ("vm_used_bytes", "What the guest uses", |m| m.used.map(|used| used.0)),
    ("vm_demand_bytes", "Its use with its buffer, within its limits", |m| Some(m.demand.0)),
    ("vm_entitlement_bytes", "What it may have now", |m| Some(m.entitlement.0)),
    ("vm_target_bytes", "What it is asked to have", |m| Some(m.target.0)),
    ("vm_actual_bytes", "What it has", |m| Some(m.actual.0)),
    ("vm_resident_bytes", "What the host holds for it", |m| m.host_rss.map(|held| held.0)),
    ("vm_charge_bytes", "What it is charged", |m| Some(m.charge.0)),
];

type VmCounter = (&'static str, &'static str, fn(&VmView) -> u64);

const OF_VM: [VmCounter; 3] = [
    ("vm_grows", "Targets raised", |vm| vm.grows),
    ("vm_shrinks", "Targets lowered", |vm| vm.shrinks),
    ("vm_errors", "Requests that the VM did not answer as it should", |vm| vm.errors),
];

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let State { rounds, host, vms, reservations } = &*self.0.get();
        let reserved: Bytes = reservations.iter().map(|reservation| reservation.granted).sum();
        for (name, help, value) in [
            ("host_total_bytes", "The host's memory", host.total.0),
            ("host_available_bytes", "What the host could give without swapping", host.available.0),
            ("budget_bytes", "What all VMs together may hold", host.budget.0),
            ("charged_bytes", "What VMs may hold as things stand", host.charged.0),
            ("free_bytes", "What is left of the budget", host.free.0),
            ("over_budget_bytes", "How far the charges are over the budget", host.over.0),
            ("unserved_bytes", "What VMs are entitled to and was not there to give", host.unserved.0),
            ("host_state", "0 normal, 1 soft, 2 hard, 3 emergency", host.state as u64),
            ("vms", "VMs that are known", vms.len() as u64),
            ("reserved_bytes", "What is kept for VMs that are about to start", reserved.0),
        ] {
            encoder
                .encode_descriptor(name, help, None, MetricType::Gauge)
                .and_then(|metric| ConstGauge::new(signed(value)).encode(metric))?;
        }
        for (name, help, value) in [
            ("rounds", "Rounds since the daemon started", *rounds),
            (
                "rounds_over_budget",
                "Rounds in which the charges were over the budget",
                host.rounds_over_budget,
            ),
        ] {
            encoder
                .encode_descriptor(name, help, None, MetricType::Counter)
                .and_then(|metric| ConstCounter::new(value).encode(metric))?;
        }
        for (name, help, value) in OF_MEMORY {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for vm in vms {
                if let Some(value) = vm.memory.as_ref().and_then(value) {
                    ConstGauge::new(signed(value))
                        .encode(metric.encode_family(&[("vm", vm.name.as_str())])?)?;
                }
            }
        }
        let mut metric = encoder.encode_descriptor(
            "vm_report_age_seconds",
            "How old the guest's last report is",
            None,
            MetricType::Gauge,
        )?;
        for vm in vms {
            if let Some(age) = vm.report_age_ms {
                let labels = [("vm", vm.name.as_str())];
                ConstGauge::new(age as f64 / 1000.0).encode(metric.encode_family(&labels)?)?;
            }
        }
        let help = "1 while it is paused by the balancer, as memory has run out";
        let mut metric = encoder.encode_descriptor("vm_paused_by_balancer", help, None, MetricType::Gauge)?;
        for vm in vms {
            let paused = vm.paused_by == Some(Pauser::Balancer);
            ConstGauge::new(i64::from(paused)).encode(metric.encode_family(&[("vm", vm.name.as_str())])?)?;
        }
        if let Some(percent) = host.pressure_percent {
            let help = "The share of the last ten seconds in which some task on the host waited for memory";
            let metric = encoder.encode_descriptor("host_pressure_ratio", help, None, MetricType::Gauge)?;
            ConstGauge::new(percent / 100.0).encode(metric)?;
        }
        let help = "What it wants over what it has: above 1 it is short";
        let mut metric = encoder.encode_descriptor("vm_pressure_ratio", help, None, MetricType::Gauge)?;
        for vm in vms {
            if let Some(memory) = vm.memory.as_ref().filter(|memory| memory.actual.0 > 0) {
                let pressure = memory.demand.0 as f64 / memory.actual.0 as f64;
                ConstGauge::new(pressure).encode(metric.encode_family(&[("vm", vm.name.as_str())])?)?;
            }
        }
        self.0.timings().encode(&mut encoder)?;
        let help = "Targets moved the other way than the time before";
        let mut metric = encoder.encode_descriptor("vm_reversals", help, None, MetricType::Counter)?;
        let history = self.0.history();
        for vm in vms {
            ConstCounter::new(history.reversals(&vm.name))
                .encode(metric.encode_family(&[("vm", vm.name.as_str())])?)?;
        }
        drop(history);
        for (name, help, value) in OF_VM {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for vm in vms {
                ConstCounter::new(value(vm)).encode(metric.encode_family(&[("vm", vm.name.as_str())])?)?;
            }
        }
        Ok(())
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
