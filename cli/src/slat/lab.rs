//! `ballast slat lab`, and what runs in its hosts.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use api::signals;
use clap::ValueEnum;
use slat::lab::{self, Errand, Findings, Only, Pair, Vendor, Visit, inside, nested::Nested};
use slat::linux::Guests;
use slat::report::{Input, side_by_side};
use slat::run::{self, Clock, Extent, Plan, Run};
use slat::{host, probe};

use super::{Set, save, setups, writable};
use crate::failure::Failure;
use crate::{output, sentence, table};

/// Run with SLAT on and off in throw-away hosts: emulated ones, or with --nested in VMs of this host
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  ballast slat lab --output lab.json                       # about ten minutes on two processors
  ballast slat lab --twice --density --output lab.json     # about half an hour
  ballast slat lab --vendor intel --output intel.json      # the same for EPT
  ballast slat lab --only density --output lab.json        # this part anew, into what lab.json holds
  ballast slat lab --nested --output nested.json           # real time, where this host can nest
")]
pub struct Args {
    /// Whose virtualisation the emulated processors have: AMD's in QEMU, Intel's in Bochs
    #[arg(long, value_enum, default_value = "amd", conflicts_with = "nested")]
    vendor: Vendor,
    /// Directory with `boot` and `lib/modules` of a kernel with kvm-amd (kvm-intel with --vendor intel); with
    /// --nested, of this host's processor
    #[arg(long, default_value = "/")]
    kernel_root: PathBuf,
    /// Measure time, in VMs of this host that are hosts themselves: takes SLAT and nested virtualisation here
    ///
    /// With --output NAME.json it writes NAME.slat-on.json and NAME.slat-off.json, for `report` and `compare`.
    #[arg(long, conflicts_with_all = ["twice", "density", "jobs", "only"])]
    nested: bool,
    /// Do only this part (may be given more than once), and keep what else the file of --output holds
    #[arg(long, value_name = "PART", requires = "output")]
    only: Vec<Part>,
    /// Do everything twice and fail where the counts differ
    #[arg(long)]
    twice: bool,
    /// Also add Linux guests until they answer too late
    #[arg(long)]
    density: bool,
    /// Emulated hosts at a time, each of which keeps a processor busy; as many as there are processors, and two
    /// at most, where it is not given
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
    jobs: Option<u8>,
    /// Minutes one emulated host may take; one that says nothing for five is stopped before
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    limit: u64,
    /// Write the result to this file
    #[arg(long)]
    output: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Payloads and a Linux guest's workloads, counted
    Counting,
    /// KVM's memory, with its older MMU
    Memory,
    /// Page-table work on 1 to 4 vCPUs
    Vcpus,
    /// A Linux guest's exits by reason
    Reasons,
    /// What KVM flushes where VMs take turns
    Switches,
    /// Every memory reference of loads that miss the TLB (--vendor intel)
    Walks,
    /// How many sessions fit
    Density,
}

impl Part {
    const fn errand(self) -> Errand {
        match self {
            Self::Counting => Errand::Count,
            Self::Memory => Errand::Memory,
            Self::Vcpus => Errand::Scale,
            Self::Reasons => Errand::Reasons,
            Self::Switches => Errand::Switches,
            Self::Walks => Errand::Walks,
            Self::Density => Errand::Density,
        }
    }
}

/// The parts to do, and what they are put into.
fn only(args: &Args) -> Result<Option<Only>, Failure> {
    let (false, Some(path)) = (args.only.is_empty(), &args.output) else { return Ok(None) };
    if args.twice && !args.only.contains(&Part::Counting) {
        return Err(Failure::usage(
            "--twice counts again, and --only leaves counting out: add --only counting, or leave out --twice",
        ));
    }
    if args.density && !args.only.contains(&Part::Density) {
        return Err(Failure::usage(
            "--density is not among the parts of --only: add --only density, or leave out --density",
        ));
    }
    if args.vendor != Vendor::Intel && args.only.contains(&Part::Walks) {
        return Err(Failure::usage(
            "the emulator of AMD hosts (QEMU) tells no memory reference of a page walk: add --vendor intel",
        ));
    }
    match Input::read(path) {
        Ok(Input::Lab(before)) if before.vendor() != args.vendor => Err(Failure::usage(format!(
            "{} is of emulated {} hosts: parts of {} hosts go into a file of their own",
            path.display(),
            before.vendor().name(),
            args.vendor.name()
        ))),
        Ok(Input::Lab(before)) => {
            Ok(Some(Only { parts: args.only.iter().map(|part| part.errand()).collect(), before }))
        }
        Ok(Input::Run(_)) => Err(Failure::usage(format!(
            "--only puts parts into what `ballast slat lab --output` wrote before, and {} is of `ballast slat run`",
            path.display()
        ))),
        Err(error) => Err(Failure::usage(format!(
            "--only puts parts into what `ballast slat lab --output` wrote before: {error}"
        ))),
    }
}

/// Visits the lab.
pub fn run(args: &Args) -> Result<(), Failure> {
    if args.nested {
        return nested(args);
    }
    writable(args.output.as_ref())?;
    let only = only(args)?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let visit = Visit {
        vendor: args.vendor,
        only,
        twice: args.twice,
        density: args.density || args.only.contains(&Part::Density),
        limit: Duration::from_secs(args.limit * 60),
        jobs: args.jobs.map_or(processors.min(2), usize::from),
    };
    // One that can't be written is told of in the end.
    let keep = |so_far: &Findings| drop(save(args.output.as_ref(), so_far));
    let stop = signals::stop_flag();
    let result = visit.run(&args.kernel_root, stop, |what| sentence::progress(what), keep);
    let result = result.map_err(|error| match error {
        lab::Error::Interrupted => Failure::stopped(error),
        error => Failure::new(error),
    })?;
    let saved = save(args.output.as_ref(), &result);
    if args.json {
        output::json(&result)?;
    } else {
        let head = ["PAYLOAD", "EXITS/OP ON", "OFF", "INSTRUCTIONS/OP ON", "OFF", "NOTE"];
        output::text(&table::render(head, &result.rows()))?;
        let head = ["LINUX GUEST", "EXITS/OP ON", "OFF", "INSTRUCTIONS/OP ON", "OFF", "OFF/ON"];
        output::text(&format!("\n{}", table::render(head, &result.linux_rows())))?;
        let misses = result.miss_rows();
        if !misses.is_empty() {
            let head = ["GUEST'S PAGE", "HOST'S PAGE", "REFERENCES OF A MISS ON", "BY THE MODEL", "OFF"];
            output::text(&format!("\n{}", table::render(head, &misses)))?;
        }
        for why in result.failures().chain(&result.mixed()) {
            output::text(&format!("{why}\n"))?;
        }
    }
    saved?;
    if let Some(difference) = result.difference {
        return Err(Failure::new(difference));
    }
    if stop.load(Ordering::SeqCst) {
        return Err(Failure::stopped("stopped; what was found by then is kept"));
    }
    match result.failures().next() {
        Some(_) => Err(Failure::new("not all emulated hosts gave all that they were to: see above")),
        None => Ok(()),
    }
}

/// SLAT on and off in nested hosts, set side by side.
fn nested(args: &Args) -> Result<(), Failure> {
    let file = |name: &str| args.output.as_ref().map(|path| path.with_extension(format!("{name}.json")));
    let (on, off) = (file("slat-on"), file("slat-off"));
    writable(on.as_ref())?;
    writable(off.as_ref())?;
    let nested = Nested::find(&probe::probe()).map_err(Failure::host_cannot)?;
    let limit = Duration::from_secs(args.limit * 60);
    let result = nested.run(&args.kernel_root, limit, signals::stop_flag(), |what| sentence::progress(what));
    let pair = result.map_err(|error| match error {
        lab::Error::Interrupted => Failure::stopped(error),
        error => Failure::new(error),
    })?;
    // A file that can't be written is no reason not to show what was measured.
    let saved = save(on.as_ref(), &pair.on).and(save(off.as_ref(), &pair.off));
    let sides = side_by_side(&pair.on, &pair.off);
    if args.json {
        output::json(&sides)?;
    } else {
        let head = ["PAYLOAD", "EXITS/OP ON", "OFF", "TIME ON", "OFF", "OFF IS"];
        output::text(&format!("{}\n{}", pair.on.heading(), table::render(head, &sides.cells())))?;
    }
    saved?;
    whole(&pair)
}

/// Whether both nested hosts gave all that they were to.
fn whole(pair: &Pair) -> Result<(), Failure> {
    let tell = |(name, run): (&str, &Run)| {
        let faults = run.linux_failure.iter().cloned().chain(run.failed());
        faults.map(|why| format!("with SLAT {name}: {why}")).collect::<Vec<_>>()
    };
    let faults: Vec<_> = [("on", &pair.on), ("off", &pair.off)].into_iter().flat_map(tell).collect();
    if faults.is_empty() { Ok(()) } else { Err(Failure::new(faults.join("; "))) }
}

/// vCPUs of the scaling series in the lab.
const SCALING: u64 = 4;

#[derive(clap::Args)]
pub struct InsideArgs {
    /// The clock counts instructions
    #[arg(long)]
    instructions: bool,
    #[arg(long, default_value = "lab")]
    set: Set,
    /// What Linux guests do
    #[arg(long, default_value = "none")]
    guests: GuestsArg,
    /// Words of the kernel's command line: it hands those that it doesn't know to its first process
    words: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum GuestsArg {
    None,
    Workloads,
    Reasons,
    Density,
}

impl GuestsArg {
    fn guests(self) -> Guests {
        match self {
            Self::None => Guests::None,
            Self::Workloads => Guests::Workloads,
            Self::Reasons => Guests::Reasons,
            Self::Density => Guests::Density,
        }
    }
}

/// What runs in a host of the lab.
pub fn inside(args: &InsideArgs) -> Result<(), Failure> {
    let clock = match (args.instructions, host::is_emulated()) {
        (true, _) => Clock::Instructions,
        (false, true) => Clock::Emulated,
        (false, false) => Clock::Time,
    };
    // The host's memory can be asked for only once its file systems are there.
    let plan = || Plan {
        setups: match args.set {
            // Emulated processors take turns anyway, so that one serves as many vCPUs as several.
            Set::Scaling => run::setups(Extent::Scaling, host::fingerprint().memory, SCALING),
            set => setups(set),
        },
        passes: 1,
        rounds: 3,
        limit: Duration::from_secs(600),
        clock,
        reasons: false,
    };
    inside::main(inside::Job { plan, guests: args.guests.guests() }).map_err(Failure::new)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use slat::payload::{Payload, Place, Setup};

    use super::*;

    #[test]
    fn a_nested_host_whose_linux_guest_died_is_a_failure() {
        let plan = Plan {
            setups: vec![Setup::usual(Payload::WarmTouch).at(Place::Native)],
            passes: 1,
            rounds: 1,
            limit: Duration::from_secs(60),
            clock: Clock::Time,
            reasons: false,
        };
        let run = slat::run::run(&plan, &AtomicBool::new(false), |_, _| {});
        let mut pair = Pair { on: run.clone(), off: run };
        assert!(whole(&pair).is_ok());
        pair.off.linux_failure = Some("it died".into());
        let failure = format!("{:?}", whole(&pair).expect_err("one part is missing"));
        assert!(failure.contains("with SLAT off: it died"), "{failure}");
    }
}
