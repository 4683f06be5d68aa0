//! `ballast fleet publish`: what ocf:ballast:node runs now and then.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::runtime;
use balancer::daemon::State;
use balancer::daemon::client::{Client, Error};
use balancer::fleet::{Memory, Sample, Told, above_placed};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::cluster::{FLOORS, MEMORY, PRESSURE};

use super::pacemaker::{self, ask};
use crate::failure::Failure;
use crate::{client, duration, output};

/// How long the balancer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is asked again that has not looked at its host yet.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// The largest file of what was seen before that is read, in bytes: 300 samples have a tenth of it.
const LARGEST_MEMORY: u64 = 1 << 20;

/// What a host of whose balancer nothing is known tells.
const NOT_KNOWN: u64 = 100;

/// Tell the cluster what this host may hold, and how pressed it is
///
/// The resource ocf:ballast:node runs this now and then. It asks the balancer, and tells the cluster only what has
/// changed by much for a while; a pressure that rises it tells at once.
#[derive(clap::Args)]
#[command(after_help = "\
Told are:
  ballast_memory    (utilization) what floors this host may hold, in MiB: its budget less what VMs
                    wanted above their floors, for 95 % of the last ten minutes; never less than the
                    floors that are placed here, where they fit
  ballast_pressure  (node attribute) 0 normal, 40 soft, 90 hard, 100 emergency or not known
  ballast_floors    (node attribute) the floors of the VMs that the balancer knows, in MiB

Examples:
  ballast fleet publish --dry-run
  ballast fleet publish --node host1 --state /run/resource-agents/ballast-node.json")]
pub struct Args {
    /// This host's name in the cluster [default: as `crm_node --name` says]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Where to keep what was seen before; without it each figure is told as it is now
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// How long a change has to last before it is told
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration::parse)]
    hold: Duration,
    /// Print what would be told, as JSON, and tell nothing
    #[arg(long)]
    dry_run: bool,
}

/// What `--dry-run` prints.
#[derive(Serialize)]
struct Plan {
    seen: Sample,
    told_before: Told,
    told_now: Told,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let state = look()?;
    let mut memory = args.state.as_deref().map_or_else(Memory::default, read);
    let sample = match state {
        Ok(state) => Sample::of(&state),
        Err(error) if args.dry_run => return Err(error.into()),
        Err(error) => {
            // Nobody knows how it is: it gets no newcomer, and keeps its capacity, so that it loses nobody.
            let told = Told { pressure: Some(NOT_KNOWN), ..memory.told };
            tell(args, &mut memory, told)?;
            return Err(error.into());
        }
    };
    let now = clock_gettime(ClockId::Boottime);
    let now = Duration::try_from(now).unwrap_or_default();
    let before = memory.told;
    let mut told = memory.look(now, sample, args.hold);
    if let (Some(capacity), true) = (told.capacity, told.capacity != before.capacity && !args.dry_run) {
        // The cluster may have placed what the balancer has not met yet.
        let node = node(args)?;
        let placed = pacemaker::cluster()?.placed(&node);
        told.capacity = Some(above_placed(capacity, sample.budget, placed));
    }
    if args.dry_run {
        return output::json(&Plan { seen: sample, told_before: before, told_now: told });
    }
    tell(args, &mut memory, told)
}

/// What the balancer says once it has looked at its host: before that, all its figures are zero.
///
/// # Errors
/// This process gets no event loop, or there is no runtime directory. Else what the balancer answered.
fn look() -> Result<Result<State, Error>, Failure> {
    let mut balancer = Client::new(&runtime::directory()?, PATIENCE);
    client::block_on(async {
        let until = Instant::now() + PATIENCE;
        loop {
            match balancer.state().await {
                Ok(state) if state.rounds == 0 && Instant::now() < until => sleep(ASK_AGAIN).await,
                Ok(state) if state.rounds == 0 => return Ok(Err(Error::NotAnswering)),
                answer => return Ok(answer),
            }
        }
    })
}

/// Tells it, and notes that it was told.
fn tell(args: &Args, memory: &mut Memory, told: Told) -> Result<(), Failure> {
    if let Some(capacity) = told.capacity.filter(|capacity| memory.told.capacity != Some(*capacity)) {
        let (node, value) = (node(args)?, capacity.to_string());
        ask("crm_attribute", &["--utilization", "--node", &node, "--name", MEMORY, "--update", &value])?;
        memory.was_told(Told { capacity: told.capacity, ..memory.told });
    }
    // Attributes each time: the cluster forgets a host's where it lost sight of the host, and writes down only what is
    // new to it.
    for (name, value) in [(FLOORS, told.floors), (PRESSURE, told.pressure)] {
        if let Some(value) = value {
            ask("attrd_updater", &["--name", name, "--update", &value.to_string()])?;
        }
    }
    memory.was_told(told);
    args.state.as_deref().map_or(Ok(()), |file| write(file, memory))
}

fn node(args: &Args) -> Result<String, Failure> {
    match &args.node {
        Some(node) => Ok(node.clone()),
        None => Ok(ask("crm_node", &["--name"])?.trim().to_owned()),
    }
}

/// What was seen before. What can't be read or understood is as if nothing had been.
fn read(file: &Path) -> Memory {
    let small = fs::metadata(file).is_ok_and(|file| file.is_file() && file.len() <= LARGEST_MEMORY);
    let text = if small { fs::read(file).ok() } else { None };
    text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

fn write(file: &Path, memory: &Memory) -> Result<(), Failure> {
    if let Some(parent) = file.parent()
        && let Err(error) = fs::create_dir_all(parent)
        && error.kind() != ErrorKind::AlreadyExists
    {
        return Err(Failure::new(format!("cannot make {}: {error}", parent.display())));
    }
    output::file(file, &serde_json::to_string(memory).map_err(Failure::new)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_that_is_damaged_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("new/state.json");
        let mut memory = Memory::default();
        let sample = Sample { budget: 1000, floors: 10, wanted: 0, pressure: 0 };
        let told = memory.look(Duration::from_secs(1), sample, Duration::ZERO);
        memory.was_told(told);
        write(&file, &memory).unwrap();
        assert_eq!(read(&file), memory);
        for damaged in ["", "{", "[]", "{\"samples\":[[1]]}", "\0\0"] {
            fs::write(&file, damaged).unwrap();
            assert_eq!(read(&file), Memory::default(), "{damaged:?}");
        }
        assert_eq!(read(directory.path()), Memory::default());
    }
}
