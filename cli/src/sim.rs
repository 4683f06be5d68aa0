//! `ballast sim`.

mod fleet;

use std::io::{IsTerminal, stderr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::AtomicBool;

use api::signals;
use api::units::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use sim::faults::Fault;
use sim::policies::PolicyName;
use sim::recorded::Part;
use sim::report::Report;
use sim::sweep::{Source, Sweep, watch};
use sim::trace::Kind;
use sim::world::WARM_UP;
use sim::{Grow, Reports, Setup, SimulatedHost, Speeds, plot, recorded};

use crate::failure::Failure;
use crate::{output, sentence};

/// The most VMs that are simulated at once.
const MOST_VMS: usize = 10_000;

/// The longest run, in hours.
const LONGEST: f64 = recorded::LONGEST as f64 / 3600.0;

/// The most seconds of all VMs of a run together: 8 bytes each, and a run on each processor.
const MOST_SAMPLES: u64 = 200_000_000;

/// Simulate memory policies on one host: ours and others', under equal demand
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Policies: ballast (the one that `ballast balancer` runs), hyper-v, esxi, selfballoon, mom, proxmox,
squeezed, static. Traces: mixed, steady, diurnal, burst, peaks, leak, storm, or a file: a recording
(.csv, .json), Bitbrains GWA-T-12 (a directory, or .csv), Google 2019 InstanceUsage (.jsonl).
Faults: stuck, intermittent, lying, silent, driverless, unresponsive, dying, mem,
crashkernel, off-line, limited, hidden; the first VMs get one each.

The policy was made on seeds 1 to 99, 401 to 424 and 501 to 524: judge it on others.",
    after_long_help = "\
Policies: ballast (the one that `ballast balancer` runs), hyper-v, esxi, selfballoon, mom, proxmox,
squeezed, static. Traces: mixed, steady, diurnal, burst, peaks, leak, storm, or a file: a recording
(.csv, .json), Bitbrains GWA-T-12 (a directory, or .csv), Google 2019 InstanceUsage (.jsonl).
Faults: stuck, intermittent, lying, silent, driverless, unresponsive, dying, mem,
crashkernel, off-line, limited, hidden; the first VMs get one each.

The policy was made on seeds 1 to 99, 401 to 424 and 501 to 524: judge it on others.

Examples:
  ballast sim --compare --plot plots
  ballast sim --vms 14 --trace peaks --faults stuck,lying
  ballast sim --compare --policy ballast,static --vms 8..24 --seeds 201..216 --hours 4 --json"
)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// All policies over a range of VMs: who serves how many
    #[arg(long)]
    compare: bool,
    /// Which policies [default: ballast; with --compare all]
    #[arg(long = "policy", alias = "law", value_name = "POLICY", value_delimiter = ',')]
    policies: Vec<PolicyName>,
    /// What VMs demand: a kind or a file
    #[arg(long, value_name = "KIND|FILE", default_value = "mixed")]
    trace: String,
    /// How many VMs, or from how many to how many [default: 14; with --compare 6..22]
    #[arg(long, value_name = "N|A..B", value_parser = range)]
    vms: Option<RangeInclusive<u64>>,
    /// Which seeds, the last one too [default: 101..108]; a file has none
    #[arg(long, value_name = "N|A..B", value_parser = range)]
    seeds: Option<RangeInclusive<u64>>,
    /// How long each run is
    #[arg(long, value_name = "HOURS", default_value_t = 1.0)]
    hours: f64,
    /// Memory of the host
    #[arg(long, value_name = "SIZE", default_value = "64G")]
    host: Bytes,
    /// What the host keeps for itself
    #[arg(long, value_name = "SIZE", default_value = "2G")]
    host_reserve: Bytes,
    /// What is wrong with the first VMs, one each
    #[arg(long, value_name = "FAULT", value_delimiter = ',')]
    faults: Vec<Fault>,
    /// How fast memory moves: a JSON file with inflate, deflate, plug, unplug, reclaim, swap, read in bytes a
    /// second; `make bench` writes one
    #[arg(long, value_name = "FILE")]
    speeds: Option<PathBuf>,
    /// By what guests grow beyond what they start with
    #[arg(long, value_enum, default_value_t = GrowBy::Balloon)]
    grow: GrowBy,
    /// When guests tell of themselves
    #[arg(long, value_enum, default_value_t = ReportsBy::Asked)]
    reports: ReportsBy,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Draw SVG pictures into this directory
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Command {
    Fleet(fleet::Args),
}

/// As `ballast run --grow`.
#[derive(Clone, Copy, clap::ValueEnum)]
enum GrowBy {
    /// A balloon in all of their memory map
    Balloon,
    /// Memory that is plugged in
    Plug,
}

/// See [`Reports`].
#[derive(Clone, Copy, clap::ValueEnum)]
enum ReportsBy {
    /// When a policy is about to look, as ballast's guests do
    Asked,
    /// Once a second by a clock of their own, as other VMMs' guests do
    Timed,
}

fn range(text: &str) -> Result<RangeInclusive<u64>, String> {
    let number = |text: &str| u64::from_str(text).map_err(|_| format!("`{text}` is not a number"));
    let (from, to) = match text.split_once("..") {
        Some((from, to)) => (number(from)?, number(to.strip_prefix('=').unwrap_or(to))?),
        None => (number(text)?, number(text)?),
    };
    if from > to || to - from >= 100_000 {
        return Err(format!(
            "`{text}` is empty or too long: write two numbers, the smaller first, such as 8..24"
        ));
    }
    Ok(from..=to)
}

pub fn run(args: &Args) -> Result<(), Failure> {
    if let Some(Command::Fleet(args)) = &args.command {
        return fleet::run(args);
    }
    let sweep = sweep(args)?;
    let stop = signals::stop_flag();
    let bar = progress(sweep.runs());
    let outcome = sweep.run(stop, &|done| bar.set_position(done as u64));
    bar.finish_and_clear();
    let report = Report::new(&sweep, &outcome);
    if args.json {
        output::json(&report)?;
    } else {
        output::text(&report.table())?;
    }
    if !outcome.complete {
        return Err(Failure::stopped("stopped: what was done until then is above"));
    }
    if let Some(directory) = &args.plot {
        draw(directory, &sweep, &report, &outcome, stop)?;
    }
    Ok(())
}

fn sweep(args: &Args) -> Result<Sweep, Failure> {
    if !(args.hours > 0.0 && args.hours <= LONGEST) {
        return Err(Failure::usage(format!("--hours is out of range: more than 0, at most {LONGEST}")));
    }
    let wanted = (args.hours * 3600.0).ceil() as u64;
    let usual = if args.compare { 6..=22 } else { 14..=14 };
    let most =
        args.vms.as_ref().map_or(*usual.end(), |vms| usize::try_from(*vms.end()).unwrap_or(usize::MAX));
    let source = match args.trace.parse::<Kind>() {
        Ok(kind) => Source::Generated(kind),
        Err(unknown) if matches!(Path::new(&args.trace).try_exists(), Ok(false)) => {
            return Err(Failure::usage(unknown));
        }
        Err(_) => {
            let part = Part { vms: most.min(MOST_VMS), seconds: wanted };
            Source::Recorded(recorded::read(Path::new(&args.trace), part).map_err(Failure::new)?)
        }
    };
    let there = match &source {
        Source::Generated(_) => MOST_VMS,
        Source::Recorded(trace) => trace.vms.len(),
    };
    let vms: Vec<usize> = match &args.vms {
        Some(vms) => vms.clone().filter_map(|vms| usize::try_from(vms).ok()).collect(),
        None => {
            usual.map(|vms| vms.min(there)).collect::<std::collections::BTreeSet<_>>().into_iter().collect()
        }
    };
    if vms.iter().any(|&vms| vms == 0 || vms > there) {
        return Err(Failure::usage(format!("--vms is out of range: 1 to {there}")));
    }
    if let Some(&fewest) = vms.first()
        && args.faults.len() >= fewest
    {
        return Err(Failure::usage(format!(
            "{} --faults leave none of {fewest} VMs to be judged: name fewer, or have more --vms",
            args.faults.len()
        )));
    }
    if args.host_reserve >= args.host {
        return Err(Failure::usage("--host-reserve leaves nothing of --host for VMs"));
    }
    let policies = match (&args.policies[..], args.compare) {
        ([], true) => PolicyName::ALL.to_vec(),
        ([], false) => vec![PolicyName::Ballast],
        (policies, _) => policies.to_vec(),
    };
    let setup = Setup {
        host: SimulatedHost { total: args.host, reserve: args.host_reserve },
        speeds: args.speeds.as_deref().map(speeds).transpose()?.unwrap_or_default(),
        grow: match args.grow {
            GrowBy::Balloon => Grow::Balloon,
            GrowBy::Plug => Grow::Plug,
        },
        reports: match args.reports {
            ReportsBy::Asked => Reports::Asked,
            ReportsBy::Timed => Reports::Timed,
        },
        faults: args.faults.clone(),
    };
    let seeds = match (&source, &args.seeds) {
        (Source::Recorded(_), None) => 0..=0,
        (Source::Recorded(_), Some(_)) => {
            return Err(Failure::usage("a file is the same for every seed: leave --seeds out"));
        }
        (Source::Generated(_), seeds) => seeds.clone().unwrap_or(101..=108),
    };
    let seconds = seconds(wanted, &source)?;
    let most = vms.last().copied().unwrap_or(0);
    if seconds.saturating_mul(most as u64) > MOST_SAMPLES {
        return Err(Failure::usage(format!(
            "{most} VMs over {} hours are too much to hold in memory: have fewer --vms, or fewer --hours",
            args.hours
        )));
    }
    Ok(Sweep { policies, vms, seeds, seconds, source, setup })
}

/// How long each run is; no longer than what was recorded.
fn seconds(wanted: u64, source: &Source) -> Result<u64, Failure> {
    let there = match source {
        Source::Generated(_) => wanted,
        Source::Recorded(trace) => trace.seconds,
    };
    let judged_from = WARM_UP.as_secs();
    if there.min(wanted) > judged_from {
        return Ok(there.min(wanted));
    }
    Err(Failure::usage(if wanted <= judged_from {
        format!("--hours is too little: a run is judged from its second {judged_from} on")
    } else {
        format!(
            "the recording is {there} s long: a run is judged from its second {judged_from} on, so record more"
        )
    }))
}

fn speeds(path: &Path) -> Result<Speeds, Failure> {
    let wrong = |error: &dyn std::fmt::Display| {
        Failure::new(format!("can't read speeds from {}: {error}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(&error))?;
    serde_json::from_str(&text).map_err(|error| wrong(&error))
}

fn progress(runs: usize) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(runs as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} runs, {eta} left") {
        bar.set_style(style);
    }
    bar
}

fn draw(
    directory: &Path,
    sweep: &Sweep,
    report: &Report,
    outcome: &sim::sweep::Outcome,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    std::fs::create_dir_all(directory)
        .map_err(|error| Failure::new(format!("can't create {}: {error}", directory.display())))?;
    let mut drawn = Vec::new();
    if sweep.vms.len() > 1 {
        let path = directory.join("service.svg");
        let picture = plot::service(outcome, &sweep.policies, &sweep.setup.host, &report.about());
        output::file(&path, &picture.map_err(Failure::new)?)?;
        drawn.push(path);
    }
    // As many VMs as the first policy serves well: the picture of a full host.
    let first = sweep.policies.first().copied().unwrap_or(PolicyName::Ballast);
    let vms = outcome.most_vms(first).or(sweep.vms.first().copied()).unwrap_or(1);
    for &policy in &sweep.policies {
        let path = directory.join(format!("memory-{policy}.svg"));
        let run = watch(sweep, policy, vms, *sweep.seeds.start(), stop);
        let (trace, snapshots) =
            run.ok_or_else(|| Failure::stopped("stopped: not all pictures were drawn"))?;
        let picture = plot::memory(policy, &trace, &snapshots, &sweep.setup.host);
        output::file(&path, &picture.map_err(Failure::new)?)?;
        drawn.push(path);
    }
    for path in drawn {
        sentence::progress(format_args!("drew {}", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_a_number_or_two_in_order() {
        assert_eq!(range("5"), Ok(5..=5));
        assert_eq!(range("5..8"), Ok(5..=8));
        assert_eq!(range("5..=8"), Ok(5..=8));
        for text in ["", "8..5", "a..b", "1..", "-1", "0..100000"] {
            assert!(range(text).is_err(), "{text}");
        }
    }
}
