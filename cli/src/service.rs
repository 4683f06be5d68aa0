//! `ballast enable`, `disable`, `start` and `logs`: VMs that systemd runs, each the unit `ballast@NAME` of a file.

mod journalctl;
mod scope;
mod systemctl;

use std::path::Path;

use api::runtime;

pub use self::scope::Scope;
use self::systemctl::{Systemctl, Unit};
use crate::failure::Failure;
use crate::output;
use crate::vm_file;

/// Have systemd start a VM with this host, from its file
#[derive(clap::Args)]
#[command(after_help = "\
The file is /etc/ballast/vms/NAME.toml for root, and ~/.config/ballast/vms/NAME.toml for everybody else. It has to be in
order, as `ballast check FILE` says.

Examples:
  ballast enable web
  ballast enable web --now")]
pub struct EnableArgs {
    /// The VM: the name of its file without .toml
    name: String,
    /// Start it as well
    #[arg(long)]
    now: bool,
}

/// Have systemd no longer start a VM with this host
#[derive(clap::Args)]
#[command(after_help = "\
Its file stays.

Examples:
  ballast disable web
  ballast disable web --now")]
pub struct DisableArgs {
    /// The VM: the name of its file without .toml
    name: String,
    /// Stop it as well: by its power button, and after 90 s by force
    #[arg(long)]
    now: bool,
}

/// Have systemd start a VM from its file, and wait until its guest runs
#[derive(clap::Args)]
#[command(after_help = "\
The file is where `ballast enable --help` says. `ballast stop NAME` stops it.

Examples:
  ballast start web")]
pub struct StartArgs {
    /// The VM: the name of its file without .toml
    name: String,
}

/// Show the log of a VM that systemd runs: its console, what befell it, what the balancer says of it
#[derive(clap::Args)]
#[command(after_help = "\
It is read from systemd's journal. What ballast says of a VM has the fields BALLAST_VM and, where something befell it,
BALLAST_EVENT: started, ended, starts-again, left-off, disk-failed, network-lost.

Examples:
  ballast logs web
  ballast logs web -f
  ballast logs web --events --since yesterday
  ballast logs web --json --lines 100")]
pub struct LogsArgs {
    /// The VM: the name of its file without .toml
    name: String,
    /// Go on with what comes
    #[arg(short, long)]
    follow: bool,
    /// Leave out the console, and what systemd says
    #[arg(long)]
    events: bool,
    /// The last so many lines alone
    #[arg(short = 'n', long, value_name = "N")]
    lines: Option<u32>,
    /// From this time on, as journalctl takes it: yesterday, \"2026-01-31 12:00\", -1h
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    since: Option<String>,
    /// Print a JSON object for each line, with all fields
    #[arg(long)]
    json: bool,
}

pub fn enable(args: &EnableArgs) -> Result<(), Failure> {
    let scope = Scope::own();
    let systemctl = ready(&scope, &args.name)?;
    systemctl.run("enable", &args.name)?;
    let starts = match scope.lingers() {
        Some(false) => "when you log in; to have it start with this host: loginctl enable-linger",
        Some(true) | None => "with this host",
    };
    tell(&format!("{} starts {starts}", args.name))?;
    if args.now { start_ready(&systemctl, &args.name) } else { Ok(()) }
}

pub fn disable(args: &DisableArgs) -> Result<(), Failure> {
    runtime::check_name(&args.name)?;
    let systemctl = Systemctl::of(Scope::own())?;
    systemctl.run("disable", &args.name)?;
    if args.now {
        systemctl.run("stop", &args.name)?;
    }
    let still =
        systemctl.unit(&args.name)?.runs().then_some(", and runs on till then: `ballast stop` stops it");
    tell(&format!("{} no longer starts by itself{}", args.name, still.unwrap_or_default()))
}

pub fn start(args: &StartArgs) -> Result<(), Failure> {
    start_ready(&ready(&Scope::own(), &args.name)?, &args.name)
}

pub fn logs(args: &LogsArgs) -> Result<(), Failure> {
    runtime::check_name(&args.name)?;
    journalctl::show(&Scope::own(), args)
}

/// Stops a VM that has no socket and that systemd would start again: one that reboots or has just failed. False where
/// there is no such VM.
///
/// # Errors
/// systemd could not.
pub fn stop_between_starts(name: &str) -> Result<bool, Failure> {
    // Where systemd can't be asked, there is none.
    let Ok(systemctl) = Systemctl::of(Scope::own()) else { return Ok(false) };
    if !systemctl.unit(name).is_ok_and(|unit| unit.runs()) {
        return Ok(false);
    }
    systemctl.run("stop", name).map(|()| true)
}

/// What is there before a VM can be a service: its file, in order, systemd, and the unit.
fn ready(scope: &Scope, name: &str) -> Result<Systemctl, Failure> {
    runtime::check_name(name)?;
    let file = scope.file(name)?;
    in_order(name, &file)?;
    let systemctl = Systemctl::of(scope.clone()).map_err(|why| why.or_run(name, &file))?;
    match systemctl.unit(name)? {
        Unit { is_there: true, .. } => Ok(systemctl),
        Unit { .. } => Err(Failure::new(scope.no_unit())),
    }
}

fn in_order(name: &str, file: &Path) -> Result<(), Failure> {
    match file.try_exists() {
        Ok(true) => vm_file::check(file),
        Ok(false) => Err(Failure::usage(format!(
            "there is no {file}: write it, with the options of `ballast run` as keys such as kernel = \"vmlinuz\" and \
             memory = \"512M\" (`man ballast-vm.toml`), then `ballast check {file}` and `ballast enable {name}`",
            file = file.display(),
        ))),
        Err(error) => Err(Failure::new(format!("cannot look for {}: {error}", file.display()))),
    }
}

fn start_ready(systemctl: &Systemctl, name: &str) -> Result<(), Failure> {
    if systemctl.unit(name)?.is_active() {
        return tell(&format!("{name} runs already"));
    }
    // Ten starts in two minutes are its end otherwise, and this one was asked for.
    let _ = systemctl.run("reset-failed", name);
    if systemctl.run("start", name).is_ok() {
        return tell(&format!("{name} runs"));
    }
    let said = journalctl::last_line(systemctl.scope(), name);
    let why = said.map_or_else(String::new, |line| format!(": {}", line.trim_start_matches("ballast: ")));
    Err(Failure::new(format!("{name} did not start{why} (`ballast logs {name}` has all of its log)")))
}

fn tell(sentence: &str) -> Result<(), Failure> {
    output::text(&format!("{sentence}\n"))
}
