//! `ballast record`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal, Write, stderr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::balancer::daemon;
use api::runtime;
use api::status::MemoryStatus;
use api::units::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use sim::recorded::{LONGEST, OWN_HEADER};
use tokio::time::{Instant, MissedTickBehavior};

use crate::discovery::Discovery;
use crate::failure::Failure;
use crate::{client, duration, sentence};

/// A report older than this, in intervals, says nothing about now.
const STALE: u32 = 3;

/// No report is stale before this: guests report every second by themselves.
const YOUNG: Duration = Duration::from_secs(3);

/// How long a VM waits for its guest to report anew, so that a line tells of its own moment. A guest that runs
/// answers within a few milliseconds.
const ANSWER: Duration = Duration::from_millis(100);

/// The columns behind those that the simulator reads.
const MORE: [&str; 13] = [
    "actual",
    "target",
    "available",
    "free",
    "host_rss",
    "swap_in",
    "swap_out",
    "major_faults",
    "allocation_stalls",
    "direct_reclaims",
    "oom_kills",
    "refaults",
    "stall_us",
];

/// Record what VMs use, second by second, for `ballast sim --trace`
#[derive(clap::Args)]
#[command(after_help = "\
It records all VMs, or those named; ones that start later join, ones that end leave. Ctrl-C ends
it, and what was taken until then is in the file.

The file is CSV: a line an interval and VM. Amounts are bytes; swap, faults, stalls, reclaims, kills
and refaults count from when the guest booted. What the guest does not tell is empty, or 0 for cache
and committed; committed, refaults and stall_us need the guest's agent.

Examples:
  ballast record -o today.csv
  ballast record web db -o evening.csv --for 1h
  ballast sim --trace today.csv --compare")]
pub struct Args {
    /// Which VMs, as `ballast ps` names them [default: all]
    names: Vec<String>,
    /// The file to write; it must not exist yet
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// How often to look
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration::parse)]
    interval: Duration,
    /// How long to record [default: until Ctrl-C]
    #[arg(long = "for", value_name = "TIME", value_parser = duration::parse)]
    length: Option<Duration>,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    for name in &args.names {
        runtime::check_name(name)?;
    }
    let longest = Duration::from_secs(LONGEST);
    if args.interval < Duration::from_millis(100) || args.interval > Duration::from_secs(600) {
        return Err(Failure::usage("--interval is out of range: 100ms to 10m"));
    }
    if args.length.is_some_and(|length| length.is_zero() || length > longest) {
        return Err(Failure::usage("--for is out of range: more than nothing, at most 672h (four weeks)"));
    }
    let directory = runtime::directory()?;
    let mut recording = Recording::create(&args.output)?;
    let bar = progress();
    let discovery = Discovery::new(directory, args.interval).asking_guests(ANSWER.min(args.interval / 2));
    let taken = client::block_on(take(args, discovery, &mut recording, &bar));
    bar.finish_and_clear();
    recording.close(taken)
}

/// Sample by sample, until it has been long enough or a signal ends it.
async fn take(
    args: &Args,
    mut discovery: Discovery,
    recording: &mut Recording,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let stop = daemon::signals::stop_signal().map_err(Failure::new)?;
    tokio::pin!(stop);
    let begun = Instant::now();
    let length = args.length.unwrap_or(Duration::from_secs(LONGEST));
    let mut ticks = tokio::time::interval(args.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let wanted = |name: &str| args.names.is_empty() || args.names.iter().any(|one| one == name);
    let patience = YOUNG.max(args.interval * STALE);
    loop {
        tokio::select! {
            biased;
            () = &mut stop => return Ok(()),
            _ = ticks.tick() => {}
        }
        let at = begun.elapsed();
        if at >= length {
            return Ok(());
        }
        let answers = tokio::select! {
            biased;
            () = &mut stop => return Ok(()),
            answers = discovery.ask(wanted) => answers?,
        };
        for answer in answers {
            let fresh = answer.memory.as_ref().ok().filter(|memory| is_fresh(memory, patience));
            match fresh.and_then(|memory| row(at, &answer.name, memory)) {
                Some(row) => recording.add(answer.name, &row)?,
                None => recording.missed += 1,
            }
        }
        recording.flush()?;
        bar.set_message(recording.progress(at, args.length));
        bar.tick();
    }
}

fn is_fresh(memory: &MemoryStatus, patience: Duration) -> bool {
    memory.guest().is_some_and(|said| said.age <= patience)
}

/// One line of the file; nothing where the guest does not say what it uses.
fn row(at: Duration, name: &str, memory: &MemoryStatus) -> Option<String> {
    let used = memory.used()?;
    let bytes = |amount: Option<Bytes>| amount.map(|amount| amount.0);
    let report = memory.report.as_ref().map(|report| report.statistics.clone()).unwrap_or_default();
    let agent = memory.agent.as_ref().map(|agent| agent.figures).unwrap_or_default();
    let cache = report.disk_caches.unwrap_or_default();
    let committed = agent.committed.unwrap_or_default();
    let limits = &memory.limits;
    let read = [limits.min(), limits.max(), used, cache, committed].map(|amount| Some(amount.0));
    let more = [
        Some(memory.actual.0),
        Some(memory.target.0),
        bytes(report.available.or(agent.available)),
        bytes(report.free),
        bytes(memory.host_rss),
        bytes(report.swap_in.or(agent.swap_in)),
        bytes(report.swap_out.or(agent.swap_out)),
        report.major_faults,
        report.allocation_stalls.or(agent.allocation_stalls),
        report.direct_reclaims,
        report.oom_kills.or(agent.oom_kills),
        bytes(agent.refaults),
        agent.stall_us,
    ];
    let figures = read.into_iter().chain(more).map(|figure: Option<u64>| match figure {
        Some(figure) => format!(",{figure}"),
        None => ",".to_owned(),
    });
    let figures: String = figures.collect();
    Some(format!("{:.3},{name}{figures}\n", at.as_secs_f64()))
}

/// The file, and what is in it so far.
struct Recording {
    path: PathBuf,
    file: BufWriter<File>,
    samples: u64,
    missed: u64,
    vms: BTreeSet<String>,
}

impl Recording {
    fn create(path: &Path) -> Result<Self, Failure> {
        let file = File::options().write(true).create_new(true).open(path).map_err(|error| {
            if error.kind() == io::ErrorKind::AlreadyExists {
                Failure::new(format!("{} exists already: choose another name, or remove it", path.display()))
            } else {
                cannot_write(path, &error)
            }
        })?;
        let mut recording = Self {
            path: path.to_owned(),
            file: BufWriter::new(file),
            samples: 0,
            missed: 0,
            vms: BTreeSet::new(),
        };
        recording.write(&format!("{OWN_HEADER},{}\n", MORE.join(",")))?;
        Ok(recording)
    }

    fn add(&mut self, vm: String, row: &str) -> Result<(), Failure> {
        self.write(row)?;
        self.samples += 1;
        self.vms.insert(vm);
        Ok(())
    }

    fn write(&mut self, text: &str) -> Result<(), Failure> {
        self.file.write_all(text.as_bytes()).map_err(|error| cannot_write(&self.path, &error))
    }

    /// So that nothing is lost, whatever ends this process.
    fn flush(&mut self) -> Result<(), Failure> {
        self.file.flush().map_err(|error| cannot_write(&self.path, &error))
    }

    fn progress(&self, at: Duration, length: Option<Duration>) -> String {
        let of = length.map(|length| format!(" of {}", clock(length))).unwrap_or_default();
        format!("{}{of}: {} samples of {}", clock(at), self.samples, vms(self.vms.len()))
    }

    /// Says what is in the file; one with nothing in it goes again.
    fn close(mut self, taken: Result<(), Failure>) -> Result<(), Failure> {
        let flushed = self.flush();
        if self.samples == 0 {
            let _ = fs::remove_file(&self.path);
            taken.and(flushed)?;
            return Err(Failure::new(match self.missed {
                0 => "nothing was recorded: no VM was there (`ballast ps` lists them)".to_owned(),
                _ => "nothing was recorded: no VM's guest reported what it uses (`ballast ps` says how \
                      its driver does)"
                    .to_owned(),
            }));
        }
        let missed = match self.missed {
            0 => String::new(),
            missed => format!(" ({missed} more were not to be had: no answer, or no fresh report)"),
        };
        let (path, samples) = (self.path.display(), self.samples);
        sentence::say(format_args!(
            "{samples} samples of {} are in {path}{missed}; `ballast sim --trace {path}` plays them",
            vms(self.vms.len())
        ));
        taken.and(flushed)
    }
}

fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("cannot write {}: {error}", path.display()))
}

fn vms(count: usize) -> String {
    if count == 1 { "1 VM".to_owned() } else { format!("{count} VMs") }
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn progress() -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}, Ctrl-C ends it") {
        bar.set_style(style);
    }
    bar
}
