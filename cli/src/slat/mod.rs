//! `ballast slat`.

mod all;
mod lab;
mod reload;
mod walk;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::signals;
use api::units::Bytes;
use clap::{Subcommand, ValueEnum};
use slat::host;
use slat::linux::{self, doorbell};
use slat::payload::memory::Backing;
use slat::payload::{Payload, Place, Setup};
use slat::probe::{self, Verdict};
use slat::report::{self, Input, html};
use slat::run::{self, Clock, Extent, Plan, Run};
use slat::walk::PageSize;

use crate::failure::Failure;
use crate::{output, sentence, table};

/// Measure what second-level address translation does on this host
#[derive(clap::Args)]
#[command(after_help = "\
Start with `ballast slat probe`. Figures are tagged: exact (a count, the same each time), real time,
direction only (time under an emulator), not available.

Exit codes: 0 done, 1 failed, 2 not understood, 3 this host can't run guests, 130 stopped by Ctrl-C
(what was measured by then is shown).")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what this host has, what is switched on, and how a guest behaves on it
    Probe(ProbeArgs),
    Walk(walk::Args),
    /// Run payloads in a micro-VM, and natively where they can
    Run(RunArgs),
    Lab(lab::Args),
    All(all::Args),
    /// Hold every claim about SLAT against figures of `run` and `lab`
    Report(ReportArgs),
    /// Set runs of different hosts or settings side by side
    Compare(CompareArgs),
    /// Be the first process of an emulated host
    #[command(hide = true)]
    Inside(lab::InsideArgs),
    /// Be the first process of a Linux guest
    #[command(hide = true)]
    Guest(GuestArgs),
    /// Run a Linux guest with a doorbell
    #[command(hide = true)]
    Vm(VmArgs),
}

#[derive(clap::Args)]
struct GuestArgs {
    /// Words of the kernel's command line
    words: Vec<String>,
}

#[derive(clap::Args)]
struct VmArgs {
    #[arg(long)]
    kernel: String,
    #[arg(long)]
    initrd: String,
    #[arg(long)]
    memory: String,
    /// Read KVM's counters at each ring
    #[arg(long)]
    counting: bool,
    /// Words for the guest's first process
    words: Vec<String>,
}

#[derive(clap::Args)]
struct ProbeArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    #[value(name = "4K")]
    Small,
    #[value(name = "2M")]
    Large,
    #[value(name = "1G")]
    Huge,
}

impl Size {
    fn page(self) -> PageSize {
        match self {
            Self::Small => PageSize::Size4K,
            Self::Large => PageSize::Size2M,
            Self::Huge => PageSize::Size1G,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Host {
    #[value(name = "4K")]
    Small,
    #[value(name = "thp")]
    Transparent,
    #[value(name = "hugetlb-2M")]
    Hugetlb2M,
    #[value(name = "hugetlb-1G")]
    Hugetlb1G,
}

impl Host {
    fn backing(self) -> Backing {
        match self {
            Self::Small => Backing::Small,
            Self::Transparent => Backing::Transparent,
            Self::Hugetlb2M => Backing::Hugetlb2M,
            Self::Hugetlb1G => Backing::Hugetlb1G,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Set {
    /// One setup of each payload
    Quick,
    /// And series whose counts say something
    Lab,
    /// Page-table work on 1 to N vCPUs
    Scaling,
    /// What KVM's memory depends on
    Memory,
    /// Laps of a chase with each thing between them
    Switches,
    /// Everything
    Full,
    /// Loads that miss the TLB, in the lab
    #[value(hide = true)]
    Walks,
    /// Nothing but Linux guests, in the lab
    #[value(hide = true)]
    Guests,
}

impl Set {
    fn extent(self) -> Extent {
        match self {
            Self::Quick => Extent::Quick,
            Self::Lab => Extent::Lab,
            Self::Scaling => Extent::Scaling,
            Self::Memory => Extent::Memory,
            Self::Switches => Extent::Switches,
            Self::Walks => Extent::Walks,
            Self::Guests => Extent::Guests,
            Self::Full => Extent::Full,
        }
    }
}

#[derive(clap::Args)]
struct RunArgs {
    /// Which setups
    #[arg(long, default_value = "quick")]
    set: Set,
    /// Only these payloads, such as `invlpg` or `chase` (may be given more than once)
    #[arg(long, value_parser = payload)]
    payload: Vec<Payload>,
    /// Page size of the guest's tables over the data, for all setups
    #[arg(long, ignore_case = true)]
    guest_page: Option<Size>,
    /// What backs the guest's data, for all setups
    #[arg(long, ignore_case = true)]
    backing: Option<Host>,
    /// Size of the data, for all setups, such as 64M; `cold-touch` then touches as many pages of it as there are
    #[arg(long)]
    data: Option<Bytes>,
    /// vCPUs, for all setups but native ones
    #[arg(long)]
    vcpus: Option<u64>,
    /// Operations a round, for all setups but `spaces`, whose data and roots say how many
    #[arg(long)]
    operations: Option<u64>,
    /// How often each setup gets a new machine; setups take turns
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    passes: u8,
    /// Measured rounds in each machine
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    rounds: u8,
    /// Seconds one machine may take
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    limit: u64,
    /// Trace in a last pass why guests leave, by the tracepoint kvm:kvm_exit (root; every VM of the host counts)
    #[arg(long)]
    reasons: bool,
    /// Measure a second time with SLAT the other way round, by reloading KVM's module (root, no VM running)
    ///
    /// For real hosts. Refuses where anything is in the way: an emulated host, users of the module, another run
    /// of this kind. Puts the module back with all its parameters in the end, after Ctrl-C too, and asks a guest
    /// whether it is. With --output NAME.json it writes NAME.slat-on.json and NAME.slat-off.json.
    #[arg(long)]
    reload_module: bool,
    /// Reload in an emulated host too: for tests
    #[arg(long, hide = true, requires = "reload_module")]
    even_if_emulated: bool,
    /// Also write the JSON to this file
    #[arg(long)]
    output: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl RunArgs {
    /// A set as it is, with everything else as usual.
    const fn of(set: Set) -> Self {
        Self {
            set,
            payload: Vec::new(),
            guest_page: None,
            backing: None,
            data: None,
            vcpus: None,
            operations: None,
            passes: 3,
            rounds: 3,
            limit: 60,
            reasons: false,
            reload_module: false,
            even_if_emulated: false,
            output: None,
            json: false,
        }
    }
}

#[derive(clap::Args)]
struct ReportArgs {
    /// What `run --output` and `lab --output` wrote
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Write one self-contained HTML page to this file
    #[arg(long)]
    html: Option<PathBuf>,
    /// Write the plot of exits with SLAT on and off to this file
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct CompareArgs {
    /// What `run --output` wrote first
    first: PathBuf,
    /// And what it wrote second, say with SLAT off
    second: PathBuf,
    /// And on further hosts: then each stands beside the first
    further: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn payload(name: &str) -> Result<Payload, String> {
    Payload::ALL.into_iter().chain([Payload::Hang]).find(|p| p.name() == name).ok_or_else(|| {
        let names: Vec<_> = Payload::ALL.iter().map(|p| p.name()).collect();
        format!("there is no payload of this name; there are {}", names.join(", "))
    })
}

pub fn run(args: &Args) -> Result<(), Failure> {
    match &args.command {
        Command::Probe(args) => probe(args),
        Command::Walk(args) => walk::run(args),
        Command::Run(args) if args.reload_module => reload::run(args),
        Command::Run(args) => measure(args),
        Command::Lab(args) => lab::run(args),
        Command::All(args) => all::run(args),
        Command::Report(args) => tell(args),
        Command::Compare(args) => compare(args),
        Command::Guest(args) => linux::guest::guest(&args.words).map_err(Failure::new),
        Command::Vm(args) => {
            let guest = doorbell::Guest {
                kernel: args.kernel.clone(),
                initrd: args.initrd.clone(),
                memory: args.memory.clone(),
                words: args.words.clone(),
                counting: args.counting,
            };
            doorbell::run(&guest).map_err(Failure::new)
        }
        Command::Inside(args) => lab::inside(args),
    }
}

fn probe(args: &ProbeArgs) -> Result<(), Failure> {
    let probe = probe::probe();
    if args.json {
        output::json(&probe)?
    } else {
        output::text(&probe.text())?
    }
    match probe.verdict {
        Verdict::Unknown => Err(Failure::host_cannot(probe.why.unwrap_or_default())),
        _ => Ok(()),
    }
}

fn setups(set: Set) -> Vec<Setup> {
    let host = host::fingerprint();
    run::setups(set.extent(), host.memory, host.cpus as u64)
}

/// A setup as the user wishes it, as far as it leaves a choice.
fn vary(setup: &mut Setup, args: &RunArgs) {
    setup.guest_page = args.guest_page.map_or(setup.guest_page, Size::page);
    setup.backing = args.backing.map_or(setup.backing, Host::backing);
    setup.data = args.data.unwrap_or(setup.data);
    if setup.place != Place::Native {
        setup.vcpus = args.vcpus.unwrap_or(setup.vcpus);
    }
    let usual = match setup.payload {
        Payload::ColdTouch => setup.operations.min(setup.links()),
        _ => setup.operations,
    };
    setup.operations = setup.operations_given().or(args.operations).unwrap_or(usual);
}

fn measure(args: &RunArgs) -> Result<(), Failure> {
    let mut setups = setups(args.set);
    if args.payload.contains(&Payload::Hang) {
        setups.push(Setup::usual(Payload::Hang));
    }
    if !args.payload.is_empty() {
        setups.retain(|s| args.payload.contains(&s.payload));
    }
    setups.iter_mut().for_each(|setup| vary(setup, args));
    let mut seen = std::collections::HashSet::new();
    setups.retain(|s| seen.insert(s.clone()));
    run::possible(&setups).map_err(Failure::usage)?;
    writable(args.output.as_ref())?;
    let plan = Plan {
        setups,
        passes: args.passes.into(),
        rounds: args.rounds.into(),
        limit: Duration::from_secs(args.limit),
        clock: if host::is_emulated() { Clock::Emulated } else { Clock::Time },
        reasons: args.reasons,
    };
    let run = run::run(&plan, signals::stop_flag(), |pass, setup| {
        sentence::progress(format_args!("pass {} of {}: {}", pass + 1, plan.passes, setup.describe()));
    });
    // A file that can't be written is no reason not to show what was measured.
    let saved = save(args.output.as_ref(), &run);
    if args.json {
        output::json(&run)?;
    } else {
        let head = ["PAYLOAD", "EXITS/OP", "TIME", "TIME IS", "WALK CYCLES/OP", "HUGE PAGES", "NOTE"];
        output::text(&format!("{}\n{}", run.heading(), table::render(head, &run.rows())))?;
        let rows = run.reason_rows();
        if !rows.is_empty() {
            output::text(&format!("\n{}", table::render(["PAYLOAD", "WHY IT LEFT, EXITS/OP"], &rows)))?;
        }
        output::text(&format!("\n{}", run.remarks()))?;
    }
    saved?;
    if run.interrupted {
        return Err(Failure::stopped("stopped; what was measured by then is shown"));
    }
    let hung: Vec<_> = run.measurements.iter().filter(|m| m.hung).map(|m| m.setup.describe()).collect();
    if !hung.is_empty() {
        return Err(Failure::new(format!("did not finish within {} s: {}", args.limit, hung.join("; "))));
    }
    if run.probe.verdict == Verdict::Unknown {
        return Err(Failure::host_cannot(run.probe.why.unwrap_or_default()));
    }
    run.failed().map_or(Ok(()), |why| Err(Failure::new(why)))
}

/// Whether a result can go to this file, asked before it is worked for.
fn writable(path: Option<&PathBuf>) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let wrong = |why: &dyn std::fmt::Display| {
        Err(Failure::usage(format!("{} can't be written: {why}; nothing was run", path.display())))
    };
    match fs::metadata(directory) {
        Err(error) => wrong(&format!("{}: {error}", directory.display())),
        Ok(at) if !at.is_dir() => wrong(&format!("{} is no directory", directory.display())),
        Ok(_) => Ok(()),
    }?;
    // Permissions, file systems that take no writing and the like: only trying tells.
    let tried = match fs::metadata(path) {
        Ok(there) if there.is_dir() => return wrong(&"it is a directory"),
        Ok(there) if there.is_file() => fs::OpenOptions::new().append(true).open(path).map(drop),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => tempfile::tempfile_in(directory).map(drop),
        Err(error) => Err(error),
    };
    tried.or_else(|error| wrong(&error))
}

fn save(path: Option<&PathBuf>, value: &impl serde::Serialize) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    output::file(path, &serde_json::to_string_pretty(value).map_err(Failure::new)?)
}

fn tell(args: &ReportArgs) -> Result<(), Failure> {
    let inputs: Result<Vec<_>, _> = args.files.iter().map(|path| Input::read(path)).collect();
    let inputs = inputs.map_err(Failure::new)?;
    let material = report::material(&inputs);
    if let Some(path) = &args.html {
        output::file(path, &html::page(material))?;
    }
    if let Some(path) = &args.svg {
        let plot = html::exits_plot(material);
        let plot =
            plot.ok_or_else(|| Failure::usage("--svg needs what `ballast slat lab --output` wrote"))?;
        output::file(path, &plot)?;
    }
    if args.json { output::json(&report::told(material)) } else { output::text(&report::text(material)) }
}

fn compare(args: &CompareArgs) -> Result<(), Failure> {
    let read = |path: &PathBuf| Input::read_run(path).map_err(Failure::new);
    let (first, second) = (read(&args.first)?, read(&args.second)?);
    if !args.further.is_empty() {
        let further: Result<Vec<_>, _> = args.further.iter().map(read).collect();
        return beside(&[vec![first, second], further?].concat(), args.json);
    }
    let sides = report::side_by_side(&first, &second);
    if args.json {
        return output::json(&sides);
    }
    let head = ["PAYLOAD", "EXITS/OP", "SECOND", "TIME", "SECOND", "SECOND IS"];
    output::text(&format!(
        "{}\n{}\n{}",
        first.heading(),
        second.heading(),
        table::render(head, &sides.cells())
    ))
}

/// Any number of hosts beside the first.
fn beside(runs: &[Run], json: bool) -> Result<(), Failure> {
    let hosts = report::hosts(runs);
    if json {
        return output::json(&hosts);
    }
    let headings = (1..).zip(runs).map(|(number, run)| format!("{number}: {}\n", run.heading()));
    let head = ["PAYLOAD", "HOST", "EXITS/OP", "TIME", "TO THE FIRST"];
    output::text(&format!("{}{}", headings.collect::<String>(), table::render(head, &hosts.cells())))
}
