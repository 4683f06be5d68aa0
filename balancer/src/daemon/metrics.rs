//! The daemon's figures as Prometheus reads them.

use std::fmt;

use balloon::units::Bytes;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::state::{MemoryView, Shared, State, VmView};

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

/// How long things take, counted as they happen.
#[derive(Clone, Debug)]
pub struct Timings {
    /// From the round that finds a guest short of what it wants to its VM taking a target that gives it.
    pub grant: Histogram,
    /// Deciding, for all VMs of one round.
    pub policy: Histogram,
    /// A whole round: asking, deciding, telling.
    pub round: Histogram,
    /// Rounds that began later than they should, by more than a tenth of the interval.
    pub late: Counter,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            grant: Histogram::new([
                0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
            ]),
            policy: Histogram::new([1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1]),
            round: Histogram::new([1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.25, 0.5, 0.75, 1.0, 3.0]),
            late: Counter::default(),
        }
    }
}

impl Timings {
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, histogram) in [
            (
                "time_to_grant_seconds",
                "From finding a guest short of what it wants to its VM taking a target that gives it",
                &self.grant,
            ),
            ("policy_seconds", "Deciding, for all VMs of one round", &self.policy),
            ("round_seconds", "One round: asking, deciding, telling", &self.round),
        ] {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            histogram.encode(metric)?;
        }
        let help = "Rounds that began late by more than a tenth of the interval";
        let metric = encoder.encode_descriptor("rounds_late", help, None, MetricType::Counter)?;
        self.late.encode(metric)
    }
}

type MemoryGauge = (&'static str, &'static str, fn(&MemoryView) -> Option<u64>);

const OF_MEMORY: [MemoryGauge; 7] = [
    ("vm_used_bytes", "What the guest uses", |m| m.used.map(|used| used.0)),
    ("vm_demand_bytes", "Its use with its buffer, within its limits", |m| Some(m.demand.0)),
    ("vm_entitlement_bytes", "What it may have now", |m| Some(m.entitlement.0)),
    ("vm_target_bytes", "What it is asked to have", |m| Some(m.target.0)),
    ("vm_actual_bytes", "What it has", |m| Some(m.actual.0)),
    ("vm_resident_bytes", "What the host holds for it", |m| Some(m.host_rss.0)),
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
