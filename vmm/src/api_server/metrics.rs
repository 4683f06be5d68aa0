//! One VM's figures as Prometheus reads them.

use std::time::Duration;

use api::agent::AgentStatus;
use api::metrics::{CONTENT_TYPE, Kind, Page, Value};
use api::report::Report;
use api::status::{
    DiskStatus, DriverState, MemoryStatus, NetStatus, Pauser, PlugStatus, ShareStatus, VmState, VmStatus,
};

use super::http::Response;

const DRIVER_STATES: [(&str, DriverState); 4] = [
    ("absent", DriverState::Absent),
    ("active", DriverState::Active),
    ("silent", DriverState::Silent),
    ("broken", DriverState::Broken),
];

const VM_STATES: [(&str, VmState); 7] = [
    ("created", VmState::Created),
    ("running", VmState::Running),
    ("sleeping", VmState::Sleeping),
    ("paused", VmState::Paused { by: Pauser::Operator }),
    ("paused-by-balancer", VmState::Paused { by: Pauser::Balancer }),
    ("paused-by-disk", VmState::Paused { by: Pauser::Disk }),
    ("stopped", VmState::Stopped),
];

/// The answer to `GET /metrics`.
pub fn response(vm: &VmStatus, memory: &MemoryStatus) -> Response {
    let mut page = Page::new("ballast", Some(("vm", &vm.name)));
    vm_figures(vm, &mut page);
    disk_figures(&vm.disks, &mut page);
    net_figures(&vm.nets, &mut page);
    share_figures(&vm.shares, &mut page);
    memory_figures(memory, &mut page);
    balloon_figures(memory, &mut page);
    if let Some(plug) = &memory.plug {
        plug_figures(plug, &mut page);
    }
    if let Some(report) = &memory.report {
        let age = Duration::from_millis(report.age_ms);
        page.gauge("report_age_seconds", "Time since the guest's last report.", age);
        report_figures(&report.statistics, &mut page);
    }
    if let Some(agent) = &memory.agent {
        agent_figures(agent, &mut page);
    }
    Response::text(CONTENT_TYPE, page.finish())
}

/// 1 for the state that something is in, 0 for the others.
fn states<S: Copy + PartialEq>(page: &mut Page, name: &str, help: &str, now: S, all: &[(&str, S)]) {
    page.family(Kind::Gauge, name, help, "state", all.iter().map(|(word, state)| (*word, *state == now)));
}

fn vm_figures(vm: &VmStatus, page: &mut Page) {
    page.gauge("uptime_seconds", "Time since the VM started.", Duration::from_millis(vm.uptime_ms));
    page.gauge("cpus", "The VM's vCPUs.", u64::from(vm.cpus));
    if let Some(console) = vm.console {
        page.counter("console_written_bytes", "Console output that its reader has taken.", console.written);
        page.gauge("console_waiting_bytes", "Console output that waits for its reader.", console.waiting);
        page.counter("console_lost_bytes", "Console output that nobody gets.", console.lost);
    }
    states(page, "vm_state", "1 for the state that the VM is in.", vm.state, &VM_STATES);
}

fn disk_figures(disks: &[DiskStatus], page: &mut Page) {
    let mut of_each = |kind, name: &str, help: &str, value: fn(&DiskStatus) -> Value| {
        page.family(kind, name, help, "disk", disks.iter().map(|disk| (disk.id.as_str(), value(disk))));
    };
    let help = "Bytes of the disk.";
    of_each(Kind::Gauge, "disk_size_bytes", help, |disk| disk.size.into());
    let help = "1 where requests wait that the host could not do.";
    of_each(Kind::Gauge, "disk_waits", help, |disk| disk.failure.is_some().into());
    of_each(Kind::Counter, "disk_reads", "Reads that were done.", |disk| disk.reads.operations.into());
    of_each(Kind::Counter, "disk_read_bytes", "Bytes that were read.", |disk| disk.reads.bytes.into());
    of_each(Kind::Counter, "disk_writes", "Writes that were done.", |disk| disk.writes.operations.into());
    of_each(Kind::Counter, "disk_written_bytes", "Bytes that were written.", |disk| disk.writes.bytes.into());
    let help = "Discards and writes of zeros that were done.";
    of_each(Kind::Counter, "disk_clears", help, |disk| disk.cleared.operations.into());
    let help = "Bytes that were discarded, or zeroed without being sent.";
    of_each(Kind::Counter, "disk_cleared_bytes", help, |disk| disk.cleared.bytes.into());
    of_each(Kind::Counter, "disk_flushes", "Flushes that were done.", |disk| disk.flushes.into());
    let help = "Times that the host could not do what the guest asked for.";
    of_each(Kind::Counter, "disk_errors", help, |disk| disk.errors.into());
    let help = "Requests that waited for the disk's limits.";
    of_each(Kind::Counter, "disk_limited", help, |disk| disk.limited.into());
    let help = "Time in which some request waited for the disk's limits.";
    of_each(Kind::Counter, "disk_limited_seconds", help, |disk| {
        Duration::from_millis(disk.limited_ms).into()
    });
}

fn net_figures(nets: &[NetStatus], page: &mut Page) {
    let mut of_each = |kind, name: &str, help: &str, value: fn(&NetStatus) -> Value| {
        page.family(kind, name, help, "net", nets.iter().map(|net| (net.id.as_str(), value(net))));
    };
    of_each(Kind::Gauge, "net_up", "1 while there is somebody at the cable's other end.", |net| {
        net.up.into()
    });
    let help = "Frames that came to the guest.";
    of_each(Kind::Counter, "net_received_frames", help, |net| net.received.frames.into());
    of_each(Kind::Counter, "net_received_bytes", "Bytes in them.", |net| net.received.bytes.into());
    let help = "Frames to the guest that were lost: it had no room for them.";
    of_each(Kind::Counter, "net_received_dropped", help, |net| net.received.dropped.into());
    of_each(Kind::Counter, "net_sent_frames", "Frames that the guest sent.", |net| net.sent.frames.into());
    of_each(Kind::Counter, "net_sent_bytes", "Bytes in them.", |net| net.sent.bytes.into());
    let help = "Frames of the guest that were lost: they were none, or the host refused them.";
    of_each(Kind::Counter, "net_sent_dropped", help, |net| net.sent.dropped.into());
    let help = "Times that frames to the guest were held back by the card's limits.";
    of_each(Kind::Counter, "net_received_limited", help, |net| net.received.limited.into());
    let help = "Times that frames of the guest were held back by the card's limits.";
    of_each(Kind::Counter, "net_sent_limited", help, |net| net.sent.limited.into());
    let help = "Time in which frames to the guest were held back by the card's limits.";
    of_each(Kind::Counter, "net_received_limited_seconds", help, |net| {
        Duration::from_millis(net.received.limited_ms).into()
    });
    let help = "Time in which frames of the guest were held back by the card's limits.";
    of_each(Kind::Counter, "net_sent_limited_seconds", help, |net| {
        Duration::from_millis(net.sent.limited_ms).into()
    });
}

fn share_figures(shares: &[ShareStatus], page: &mut Page) {
    let values = shares.iter().map(|share| (share.id.as_str(), Value::from(share.serves)));
    let help = "1 while the process that shares the directory is there.";
    page.family(Kind::Gauge, "share_serves", help, "share", values);
}

fn memory_figures(memory: &MemoryStatus, page: &mut Page) {
    let limits = &memory.limits;
    page.gauge("memory_startup_bytes", "Memory that the guest has when it starts.", limits.startup());
    page.gauge("memory_min_bytes", "Memory that the guest is never shrunk below.", limits.min());
    page.gauge("memory_max_bytes", "Memory that the guest is never grown above.", limits.max());
    page.gauge("memory_target_bytes", "Memory that the guest was last asked to have.", memory.target);
    page.gauge("memory_actual_bytes", "Memory that the guest has.", memory.actual);
    let help = "Memory that the guest was given, whether its kernel manages it or not.";
    page.gauge("memory_given_bytes", help, memory.given);
    page.gauge("memory_host_rss_bytes", "Guest memory that the host really holds.", memory.host_rss);
    let help = "Guest memory that the host holds in huge pages.";
    page.gauge("memory_host_huge_bytes", help, memory.host_huge);
    let help = "What the guest had when it last spoke, less what it could spare then.";
    page.gauge("guest_memory_used_bytes", help, memory.used());
    let buffer = f64::from(limits.buffer_percent()) / 100.0;
    let help = "Spare memory on top of the guest's use, as a share of that use.";
    page.gauge("memory_buffer_ratios", help, buffer);
    let help = "The VM's share when memory is short, relative to the others'.";
    page.gauge("memory_weight", help, u64::from(limits.weight()));
    let help = "Memory that is kept plugged for a guest that runs out of memory.";
    page.gauge("memory_cushion_bytes", help, memory.cushion.map(|cushion| cushion.size));
    let help = "What the balloon holds that the guest can take at once, which may be more.";
    page.gauge("memory_cushion_held_bytes", help, memory.cushion.map(|cushion| cushion.held));
    let help = "Memory that the guest took of its balloon rather than run out of memory, and has still.";
    page.gauge("memory_taken_bytes", help, memory.oom_deflate.map(|deflate| deflate.taken));
    let help = "1 for the state that the guest's balloon driver is in.";
    states(page, "balloon_driver_state", help, memory.driver, &DRIVER_STATES);
}

fn balloon_figures(memory: &MemoryStatus, page: &mut Page) {
    let counters = &memory.counters;
    for (name, help, count) in [
        (
            "balloon_inflated_bytes",
            "Memory taken from the guest by the balloon.",
            Value::from(counters.inflated),
        ),
        (
            "balloon_deflated_bytes",
            "Memory given back to the guest by the balloon.",
            Value::from(counters.deflated),
        ),
        (
            "balloon_oom_deflated_bytes",
            "Memory that the guest took of the balloon rather than run out of memory.",
            Value::from(counters.oom_deflated),
        ),
        ("balloon_reported_bytes", "Free memory reported by the guest.", Value::from(counters.reported)),
        ("balloon_discarded_bytes", "Memory given back to the host.", Value::from(counters.discarded)),
        ("balloon_discard_ranges", "Ranges given back to the host.", counters.discard_ranges.into()),
        ("balloon_discard_calls", "System calls that giving back took.", counters.discard_calls.into()),
        ("balloon_discard_failures", "Ranges that the host refused.", counters.discard_failures.into()),
        (
            "balloon_huge_pages_whole",
            "Blocks of 2 MiB given back in one go, so that no huge page was split.",
            counters.huge_pages_whole.into(),
        ),
        (
            "balloon_huge_pages_broken",
            "Blocks of 2 MiB given back in part, so that a huge page there was split.",
            counters.huge_pages_broken.into(),
        ),
        ("balloon_malformed_chains", "Malformed chains handed back to the guest.", counters.malformed.into()),
        ("balloon_statistics_requests", "Requests for a report.", counters.statistics_requests.into()),
        ("balloon_reports", "Reports received.", counters.reports.into()),
    ] {
        page.counter(name, help, count);
    }
}

fn plug_figures(plug: &PlugStatus, page: &mut Page) {
    page.gauge("memory_boot_bytes", "Memory that the guest booted with.", plug.boot);
    page.gauge(
        "plug_requested_bytes",
        "Memory that the guest was last asked to have plugged.",
        plug.requested,
    );
    page.gauge("plug_plugged_bytes", "Memory that the guest has plugged.", plug.plugged);
    let help = "Time for which the guest has had a balloon driver and no virtio-mem driver.";
    page.gauge("plug_lacks_driver_seconds", help, plug.lacks_driver_ms.map(Duration::from_millis));
    let help = "1 for the state that the guest's virtio-mem driver is in.";
    states(page, "plug_driver_state", help, plug.driver, &DRIVER_STATES);
    let counters = &plug.counters;
    for (name, help, count) in [
        ("plug_added_bytes", "Memory plugged by the guest.", Value::from(counters.plugged)),
        ("plug_removed_bytes", "Memory unplugged by the guest.", Value::from(counters.unplugged)),
        ("plug_discarded_bytes", "Unplugged memory given back to the host.", Value::from(counters.discarded)),
        ("plug_discard_failures", "Ranges that the host refused.", counters.discard_failures.into()),
        ("plug_refused", "Requests that the host could not carry out.", counters.refused.into()),
        ("plug_malformed_chains", "Malformed chains handed back to the guest.", counters.malformed.into()),
    ] {
        page.counter(name, help, count);
    }
}

fn agent_figures(agent: &AgentStatus, page: &mut Page) {
    let help = "Whether the guest's agent holds its port open.";
    page.gauge("agent_connected", help, agent.connected);
    let age = Duration::from_millis(agent.age_ms);
    page.gauge("agent_age_seconds", "Time since the agent's last word.", age);
    for (name, help, count) in [
        ("agent_heard", "Words of the agent that were heard.", agent.heard),
        ("agent_dropped", "Words of the agent that came too soon after others.", agent.dropped),
        ("agent_malformed", "Times that the agent's words made no sense.", agent.malformed),
    ] {
        page.counter(name, help, count);
    }
    let help = "Time in which some task of the guest waited for memory, as its agent says.";
    page.counter("guest_memory_stalls_seconds", help, agent.figures.stall_us.map(Duration::from_micros));
    let help = "Memory promised to programs, as the agent says.";
    page.gauge("guest_memory_committed_bytes", help, agent.figures.committed);
}

fn report_figures(report: &Report, page: &mut Page) {
    for (name, help, value) in [
        ("guest_memory_free_bytes", "Memory used for nothing, as the guest says.", report.free),
        (
            "guest_memory_total_bytes",
            "Memory that the guest's kernel manages, as the guest says.",
            report.total,
        ),
        (
            "guest_memory_available_bytes",
            "Memory to be had without swapping, as the guest says.",
            report.available,
        ),
        (
            "guest_disk_caches_bytes",
            "Page cache that could be dropped, as the guest says.",
            report.disk_caches,
        ),
    ] {
        page.gauge(name, help, value);
    }
    for (name, help, value) in [
        ("guest_swap_in_bytes", "Memory swapped in, as the guest says.", report.swap_in),
        ("guest_swap_out_bytes", "Memory swapped out, as the guest says.", report.swap_out),
    ] {
        page.counter(name, help, value);
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
        page.counter(name, help, value);
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::{control, full_disk, full_memory, full_net};
    use super::*;

    #[test]
    fn prometheus_itself_has_no_remark() {
        let (disks, nets, shares) = (vec![full_disk()], vec![full_net()], vec![ShareStatus::default()]);
        let vm = VmStatus { disks, nets, shares, ..control().status() };
        let response = response(&vm, &full_memory(DriverState::Active));
        let page = String::from_utf8(response.body).unwrap();
        assert!(
            page.contains("\nballast_guest_oom_kills_total{vm=\"test\"} 18446744073709552000\n"),
            "{page}"
        );
        assert!(page.contains("\nballast_disk_waits{vm=\"test\",disk=\"disk0\"} 1\n"), "{page}");
        lab::promtool::check_metrics(&page).unwrap();
    }
}
