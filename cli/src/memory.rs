//! `ballast memory`.

use std::fmt::Write;

use api::agent::AgentStatus;
use api::limits::Limits;
use api::report::Report;
use api::status::{DriverState, MemoryStatus, PlugStatus};
use api::units::Bytes;

use crate::client;
use crate::failure::Failure;
use crate::output;

/// Show a VM's memory, or change its target or limits
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  ballast memory web
  ballast memory web --target 300M
  ballast memory web --limits 256M,min=128M,max=512M,buffer=30%,weight=200

A target stands until somebody sets another; a balancer that runs will do so soon. The guest
needs time to follow: look at `actual`. max can't exceed what the VM was started with.")]
pub struct Args {
    /// The VM, as `ballast ps` names it
    name: String,
    /// Ask the guest to have this much memory
    #[arg(long, value_name = "SIZE")]
    target: Option<Bytes>,
    /// Set new limits, written as for `ballast run --memory`
    #[arg(long, value_name = "SPEC")]
    limits: Option<Limits>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut vm = client::named(&args.name)?;
    let memory = client::block_on(async {
        // The limits first: the target may lie outside the old ones.
        if let Some(limits) = args.limits {
            vm.set_limits(limits).await?;
        }
        if let Some(target) = args.target {
            vm.set_target(target).await?;
        }
        Ok(vm.memory().await?)
    })?;
    if args.json { output::json(&memory) } else { output::text(&describe(&memory)) }
}

/// How a driver's state reads in a line.
pub const fn driver(state: DriverState) -> &'static str {
    match state {
        DriverState::Absent => "absent",
        DriverState::Active => "active",
        DriverState::Silent => "silent",
        DriverState::Broken => "broken",
    }
}

/// What the host holds of a guest's memory, as far as that is known.
pub fn host_rss(host_rss: Option<Bytes>) -> String {
    host_rss.map_or_else(|| "not known".to_owned(), |bytes| bytes.to_string())
}

/// What to make of a guest whose kernel does not manage `unmanaged` of the memory that it was `given`.
pub fn unmanaged(unmanaged: Bytes, given: Bytes) -> String {
    format!(
        "its kernel manages {unmanaged} less than the {given} that it was given (mem=, crashkernel=, or memory \
         that is not on line)"
    )
}

/// The share of what the host holds that lies in huge pages.
pub fn huge(memory: &MemoryStatus) -> String {
    memory.huge_percent().map_or_else(|| "-".to_owned(), |percent| format!("{percent}%"))
}

fn describe(memory: &MemoryStatus) -> String {
    let limits = &memory.limits;
    let mut lines: Vec<(&str, String)> = vec![
        ("startup", limits.startup().to_string()),
        ("min", limits.min().to_string()),
        ("max", limits.max().to_string()),
        ("buffer", format!("{}%", limits.buffer_percent())),
        ("weight", limits.weight().to_string()),
        ("target", memory.target.to_string()),
        ("actual", memory.actual.to_string()),
        ("host rss", host_rss(memory.host_rss)),
        ("in huge pages", huge(memory)),
        ("driver", driver(memory.driver).to_owned()),
    ];
    if memory.unmanaged() > Bytes::ZERO {
        let given = memory.given.unwrap_or(memory.actual);
        lines.push(("given", format!("{given}: {}", unmanaged(memory.unmanaged(), given))));
    }
    if let Some(plug) = &memory.plug {
        lines.extend(plugged(memory, plug));
    }
    if let Some(deflate) = memory.oom_deflate {
        let ago = deflate.age_ms as f64 / 1000.0;
        let taken = format!("{} above target (ran out of memory {ago:.1} s ago)", deflate.taken);
        lines.push(("taken", taken));
    }
    if let Some(report) = &memory.report {
        lines.push(("report age", format!("{:.1} s", report.age_ms as f64 / 1000.0)));
        lines.extend(memory.used().map(|used| ("guest used", used.to_string())));
        lines.extend(figures(&report.statistics));
    } else {
        lines.push(("report", "none yet".to_owned()));
    }
    lines.extend(memory.agent.iter().flat_map(agent));
    let counters = &memory.counters;
    lines.extend([
        ("inflated", counters.inflated.to_string()),
        ("deflated", counters.deflated.to_string()),
        ("reported free", counters.reported.to_string()),
        ("given to host", counters.discarded.to_string()),
    ]);
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    lines.iter().fold(String::new(), |mut text, (name, value)| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{name:<width$}  {value}");
        text
    })
}

/// What is to be said of a guest that is to plug and has no driver for it.
pub fn lacks_plug(memory: &MemoryStatus) -> String {
    format!(
        "its guest has no working virtio_mem driver and can't have more than {}: load virtio_mem in it (Linux 5.17 or \
         later), or start the VM with --grow balloon",
        memory.ceiling()
    )
}

fn plugged(memory: &MemoryStatus, plug: &PlugStatus) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("booted with", plug.boot.to_string()),
        ("plugged", plug.plugged.to_string()),
        ("plug driver", driver(plug.driver).to_owned()),
    ];
    if plug.plugged > plug.requested {
        lines.push(("to be unplugged", (plug.plugged - plug.requested).to_string()));
    }
    lines.extend(
        memory
            .cushion
            .map(|cushion| ("cushion", format!("{}, with {} in the balloon", cushion.size, cushion.held))),
    );
    if plug.driver != DriverState::Active && memory.ceiling() < memory.limits.max() {
        let has = memory.ceiling();
        lines.push(("can grow to", format!("{has} (no working virtio_mem driver in the guest)")));
        if plug.lacks_driver() {
            lines.push(("to do", lacks_plug(memory)));
        }
    }
    lines
}

fn agent(agent: &AgentStatus) -> Vec<(&'static str, String)> {
    let seconds = |milliseconds: u64| format!("{:.1} s", milliseconds as f64 / 1000.0);
    let version =
        agent.version.map_or_else(|| "of unknown version".to_owned(), |version| version.to_string());
    let gone = if agent.connected { "" } else { ", gone" };
    let mut lines = vec![("agent", format!("{version}{gone}")), ("agent age", seconds(agent.age_ms))];
    let figures = &agent.figures;
    let sizes = [("guest committed", figures.committed), ("refaulted", figures.refaults)];
    lines.extend(sizes.into_iter().filter_map(|(name, size)| Some((name, size?.to_string()))));
    let waits = [("waited for memory", figures.stall_us), ("one cgroup waited", figures.cgroup_stall_us)];
    lines.extend(waits.into_iter().filter_map(|(name, waited)| Some((name, seconds(waited? / 1000)))));
    lines.extend(agent.distress_age_ms.map(|age| ("last in distress", format!("{} ago", seconds(age)))));
    lines
}

fn figures(report: &Report) -> Vec<(&'static str, String)> {
    let sizes = [
        ("guest total", report.total),
        ("guest available", report.available),
        ("guest free", report.free),
        ("guest caches", report.disk_caches),
        ("swapped in", report.swap_in),
        ("swapped out", report.swap_out),
    ];
    let counts = [
        ("major faults", report.major_faults),
        ("minor faults", report.minor_faults),
        ("oom kills", report.oom_kills),
        ("allocation stalls", report.allocation_stalls),
    ];
    let sizes = sizes.into_iter().filter_map(|(name, size)| Some((name, size?.to_string())));
    let counts = counts.into_iter().filter_map(|(name, count)| Some((name, count?.to_string())));
    sizes.chain(counts).collect()
}
