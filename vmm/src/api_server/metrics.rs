//! One VM's figures as Prometheus reads them.

use std::borrow::Cow;
use std::fmt;

use api::agent::AgentStatus;
use api::report::Report;
use api::status::{DriverState, MemoryStatus, Pauser, PlugStatus, VmState, VmStatus};
use api::units::Bytes;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::http::{Response, Status};

/// The text format's media type; Prometheus understands it since version 2.5.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const DRIVER_STATES: [(&str, DriverState); 4] = [
    ("absent", DriverState::Absent),
    ("active", DriverState::Active),
    ("silent", DriverState::Silent),
    ("broken", DriverState::Broken),
];

/// The answer to `GET /metrics`.
pub fn response(vm: VmStatus, memory: MemoryStatus) -> Response {
    let label = (Cow::Borrowed("vm"), Cow::Owned(vm.name.clone()));
    let mut registry = Registry::with_prefix_and_labels("ballast", [label].into_iter());
    registry.register_collector(Box::new(Snapshot { vm, memory }));
    let mut body = String::new();
    match text::encode(&mut body, &registry) {
        Ok(()) => Response::text(CONTENT_TYPE, body),
        Err(error) => {
            Response::error(Status::InternalError, &format!("the metrics can't be encoded: {error}"))
        }
    }
}

#[derive(Debug)]
struct Snapshot {
    vm: VmStatus,
    memory: MemoryStatus,
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut page = Page(encoder);
        self.vm_figures(&mut page)?;
        self.memory_figures(&mut page)?;
        self.balloon_figures(&mut page)?;
        if let Some(plug) = &self.memory.plug {
            plug_figures(plug, &mut page)?;
        }
        if let Some(report) = &self.memory.report {
            page.gauge("report_age", "Time since the guest's last report.", Some(Unit::Seconds), {
                report.age_ms as f64 / 1000.0
            })?;
            report_figures(&report.statistics, &mut page)?;
        }
        if let Some(agent) = &self.memory.agent {
            agent_figures(agent, &mut page)?;
        }
        Ok(())
    }
}

impl Snapshot {
    fn vm_figures(&self, page: &mut Page<'_>) -> fmt::Result {
        let uptime = self.vm.uptime_ms as f64 / 1000.0;
        page.gauge("uptime", "Time since the VM started.", Some(Unit::Seconds), uptime)?;
        page.gauge("cpus", "The VM's vCPUs.", None, i64::from(self.vm.cpus))?;
        if let Some(console) = self.vm.console {
            let help = "Console output that its reader has taken.";
            page.count("console_written", help, Some(Unit::Bytes), console.written.0)?;
            page.bytes("console_waiting", "Console output that waits for its reader.", console.waiting)?;
            page.count(
                "console_lost",
                "Console output that nobody gets.",
                Some(Unit::Bytes),
                console.lost.0,
            )?;
        }
        page.states(
            "vm_state",
            "1 for the state that the VM is in.",
            self.vm.state,
            &[
                ("created", VmState::Created),
                ("running", VmState::Running),
                ("paused", VmState::Paused { by: Pauser::Operator }),
                ("paused-by-balancer", VmState::Paused { by: Pauser::Balancer }),
                ("stopped", VmState::Stopped),
            ],
        )
    }

    fn memory_figures(&self, page: &mut Page<'_>) -> fmt::Result {
        let limits = &self.memory.limits;
        page.bytes("memory_startup", "Memory that the guest has when it starts.", limits.startup())?;
        page.bytes("memory_min", "Memory that the guest is never shrunk below.", limits.min())?;
        page.bytes("memory_max", "Memory that the guest is never grown above.", limits.max())?;
        page.bytes("memory_target", "Memory that the guest was last asked to have.", self.memory.target)?;
        page.bytes("memory_actual", "Memory that the guest has.", self.memory.actual)?;
        if let Some(host_rss) = self.memory.host_rss {
            page.bytes("memory_host_rss", "Guest memory that the host really holds.", host_rss)?;
        }
        if let Some(huge) = self.memory.host_huge {
            page.bytes("memory_host_huge", "Guest memory that the host holds in huge pages.", huge)?;
        }
        if let Some(used) = self.memory.used() {
            page.bytes("guest_memory_used", "Actual less what the guest says it could spare.", used)?;
        }
        let buffer = f64::from(limits.buffer_percent()) / 100.0;
        let help = "Spare memory on top of the guest's use, as a share of that use.";
        page.gauge("memory_buffer", help, Some(Unit::Ratios), buffer)?;
        let help = "The VM's share when memory is short, relative to the others'.";
        page.gauge("memory_weight", help, None, i64::from(limits.weight()))?;
        page.states(
            "balloon_driver_state",
            "1 for the state that the guest's balloon driver is in.",
            self.memory.driver,
            &DRIVER_STATES,
        )
    }

    fn balloon_figures(&self, page: &mut Page<'_>) -> fmt::Result {
        let counters = &self.memory.counters;
        for (name, help, bytes) in [
            ("balloon_inflated", "Memory taken from the guest by the balloon.", counters.inflated),
            ("balloon_deflated", "Memory given back to the guest by the balloon.", counters.deflated),
            ("balloon_reported", "Free memory reported by the guest.", counters.reported),
            ("balloon_discarded", "Memory given back to the host.", counters.discarded),
        ] {
            page.count(name, help, Some(Unit::Bytes), bytes.0)?;
        }
        for (name, help, count) in [
            ("balloon_discard_ranges", "Ranges given back to the host.", counters.discard_ranges),
            ("balloon_discard_calls", "System calls that giving back took.", counters.discard_calls),
            ("balloon_discard_failures", "Ranges that the host refused.", counters.discard_failures),
            (
                "balloon_huge_pages_whole",
                "Blocks of 2 MiB given back in one go, so that no huge page was split.",
                counters.huge_pages_whole,
            ),
            (
                "balloon_huge_pages_broken",
                "Blocks of 2 MiB given back in part, so that a huge page there was split.",
                counters.huge_pages_broken,
            ),
            ("balloon_malformed_chains", "Malformed chains handed back to the guest.", counters.malformed),
            ("balloon_statistics_requests", "Requests for a report.", counters.statistics_requests),
            ("balloon_reports", "Reports received.", counters.reports),
        ] {
            page.count(name, help, None, count)?;
        }
        Ok(())
    }
}

fn plug_figures(plug: &PlugStatus, page: &mut Page<'_>) -> fmt::Result {
    page.bytes("memory_boot", "Memory that the guest booted with.", plug.boot)?;
    page.bytes("plug_requested", "Memory that the guest was last asked to have plugged.", plug.requested)?;
    page.bytes("plug_plugged", "Memory that the guest has plugged.", plug.plugged)?;
    let help = "1 for the state that the guest's virtio-mem driver is in.";
    page.states("plug_driver_state", help, plug.driver, &DRIVER_STATES)?;
    let counters = &plug.counters;
    for (name, help, bytes) in [
        ("plug_added", "Memory plugged by the guest.", counters.plugged),
        ("plug_removed", "Memory unplugged by the guest.", counters.unplugged),
        ("plug_discarded", "Unplugged memory given back to the host.", counters.discarded),
    ] {
        page.count(name, help, Some(Unit::Bytes), bytes.0)?;
    }
    for (name, help, count) in [
        ("plug_discard_failures", "Ranges that the host refused.", counters.discard_failures),
        ("plug_refused", "Requests that the host could not carry out.", counters.refused),
        ("plug_malformed_chains", "Malformed chains handed back to the guest.", counters.malformed),
    ] {
        page.count(name, help, None, count)?;
    }
    Ok(())
}

fn agent_figures(agent: &AgentStatus, page: &mut Page<'_>) -> fmt::Result {
    let help = "Whether the guest's agent holds its port open.";
    page.gauge("agent_connected", help, None, i64::from(agent.connected))?;
    let age = agent.age_ms as f64 / 1000.0;
    page.gauge("agent_age", "Time since the agent's last word.", Some(Unit::Seconds), age)?;
    for (name, help, count) in [
        ("agent_heard", "Words of the agent that were heard.", agent.heard),
        ("agent_dropped", "Words of the agent that came too soon after others.", agent.dropped),
        ("agent_malformed", "Times that the agent's words made no sense.", agent.malformed),
    ] {
        page.count(name, help, None, count)?;
    }
    if let Some(waited) = agent.figures.stall_us {
        let help = "Time in which some task of the guest waited for memory, as its agent says.";
        let seconds = ConstCounter::new(waited as f64 / 1e6);
        page.write("guest_memory_stalls", help, Some(Unit::Seconds), &seconds)?;
    }
    if let Some(committed) = agent.figures.committed {
        page.bytes("guest_memory_committed", "Memory promised to programs, as the agent says.", committed)?;
    }
    Ok(())
}

fn report_figures(report: &Report, page: &mut Page<'_>) -> fmt::Result {
    for (name, help, value) in [
        ("guest_memory_free", "Memory used for nothing, as the guest says.", report.free),
        ("guest_memory_total", "Memory that the guest's kernel manages, as the guest says.", report.total),
        ("guest_memory_available", "Memory to be had without swapping, as the guest says.", report.available),
        ("guest_disk_caches", "Page cache that could be dropped, as the guest says.", report.disk_caches),
    ] {
        if let Some(bytes) = value {
            page.bytes(name, help, bytes)?;
        }
    }
    for (name, help, value) in [
        ("guest_swap_in", "Memory swapped in, as the guest says.", report.swap_in),
        ("guest_swap_out", "Memory swapped out, as the guest says.", report.swap_out),
    ] {
        if let Some(bytes) = value {
            page.count(name, help, Some(Unit::Bytes), bytes.0)?;
        }
    }
    for (name, help, value) in [
        ("guest_major_faults", "Page faults that needed I/O.", report.major_faults),
        ("guest_minor_faults", "Page faults that needed none.", report.minor_faults),
        ("guest_hugetlb_allocations", "Huge pages allocated.", report.hugetlb_allocations),
        ("guest_hugetlb_failures", "Huge pages that could not be allocated.", report.hugetlb_failures),
        ("guest_oom_kills", "Processes killed for lack of memory.", report.oom_kills),
        ("guest_allocation_stalls", "Allocations that had to wait.", report.allocation_stalls),
        ("guest_async_scans", "Pages scanned in the background.", report.async_scans),
        ("guest_direct_scans", "Pages scanned by allocations.", report.direct_scans),
        ("guest_async_reclaims", "Pages reclaimed in the background.", report.async_reclaims),
        ("guest_direct_reclaims", "Pages reclaimed by allocations.", report.direct_reclaims),
    ] {
        if let Some(count) = value {
            page.count(name, help, None, count)?;
        }
    }
    Ok(())
}

/// The page being written.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn write(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        metric: &impl EncodeMetric,
    ) -> fmt::Result {
        metric.encode(self.0.encode_descriptor(name, help, unit.as_ref(), metric.metric_type())?)
    }

    fn gauge<N>(&mut self, name: &str, help: &str, unit: Option<Unit>, value: N) -> fmt::Result
    where
        ConstGauge<N>: EncodeMetric,
    {
        self.write(name, help, unit, &ConstGauge::new(value))
    }

    fn bytes(&mut self, name: &str, help: &str, bytes: Bytes) -> fmt::Result {
        // A float, because the encoder refuses integers above i64, and a guest may say anything.
        self.gauge(name, help, Some(Unit::Bytes), bytes.0 as f64)
    }

    fn count(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) -> fmt::Result {
        self.write(name, help, unit, &ConstCounter::new(value))
    }

    fn states<S: Copy + PartialEq>(
        &mut self,
        name: &str,
        help: &str,
        now: S,
        all: &[(&str, S)],
    ) -> fmt::Result {
        let kind = ConstGauge::new(0_i64).metric_type();
        let mut family = self.0.encode_descriptor(name, help, None, kind)?;
        for (word, state) in all {
            let labels = [("state", *word)];
            ConstGauge::new(i64::from(*state == now)).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
