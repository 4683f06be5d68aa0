//! `ballast sim fleet`.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use api::signals;
use api::units::Bytes;
use serde::Serialize;
use sim::fleet::day::{self, Demand, Outcome};
use sim::fleet::{Counting, Setup};
use sim::plot;

use crate::failure::Failure;
use crate::{output, sentence, table};

/// The most hosts, and the most VMs.
const MOST: u64 = 100_000;

/// The longest day, in hours.
const LONGEST: u64 = 168;

/// Simulate a cluster over a day: VMs counted by their sizes, by their floors, and by floors and pressure
#[derive(clap::Args)]
#[command(after_help = "\
Counted by:
  sizes     a VM counts its max, a host its budget
  floors    a VM counts its min, a host its budget, whatever guests demand
  pressure  a VM counts its min, a host what its balancer tells the cluster (`ballast fleet publish`)

VMs come in the first quarter of the time. Each minute the cluster places by a model of Pacemaker's rules; demand is
that of `ballast sim --trace mixed`. SHORT is the time that VMs spent on hosts whose guests used more than there was;
STRANDED is capacity that nobody had while VMs waited. Guests take no time to start, and nobody moves to make room.

Examples:
  ballast sim fleet
  ballast sim fleet --hosts 100 --vms 4000 --losses 3 --plot plots")]
pub struct Args {
    /// How many hosts
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=MOST))]
    hosts: u64,
    /// How many VMs want to run
    #[arg(long, value_name = "N", default_value_t = 40_000, value_parser = clap::value_parser!(u64).range(1..=MOST))]
    vms: u64,
    /// What each host has for VMs
    #[arg(long, value_name = "SIZE", default_value = "126G")]
    budget: Bytes,
    /// How long
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u64).range(1..=LONGEST))]
    hours: u64,
    /// How many hosts are lost meanwhile; each comes back after two hours
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(..=MOST))]
    losses: u64,
    /// Which demand and losses
    #[arg(long, value_name = "N", default_value_t = 201)]
    seed: u64,
    /// By what is counted [default: all three]
    #[arg(long = "count", value_name = "BY", value_delimiter = ',')]
    countings: Vec<Counting>,
    /// Print JSON, with each minute
    #[arg(long)]
    json: bool,
    /// Draw fleet.svg into this directory
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report<'a> {
    setup: &'a Setup,
    outcomes: &'a [Outcome],
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let number = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let setup = Setup {
        hosts: number(args.hosts),
        vms: number(args.vms),
        budget: args.budget,
        minutes: number(args.hours * 60),
        losses: number(args.losses),
        seed: args.seed,
    };
    let stop = signals::stop_flag();
    let is_stopped = || stop.load(Ordering::Relaxed);
    let countings = if args.countings.is_empty() { &Counting::ALL[..] } else { &args.countings };
    let demand = Demand::generate(&setup);
    let outcomes: Option<Vec<Outcome>> =
        countings.iter().map(|counting| day::run(&setup, *counting, &demand, &is_stopped)).collect();
    let outcomes = outcomes.ok_or_else(|| Failure::stopped("stopped before all was simulated"))?;
    if args.json {
        output::json(&Report { setup: &setup, outcomes: &outcomes })?;
    } else {
        output::text(&describe(&outcomes))?;
    }
    let Some(directory) = &args.plot else { return Ok(()) };
    std::fs::create_dir_all(directory)
        .map_err(|error| Failure::new(format!("can't create {}: {error}", directory.display())))?;
    let path = directory.join("fleet.svg");
    output::file(&path, &plot::fleet(&setup, &outcomes).map_err(Failure::new)?)?;
    sentence::progress(format_args!("drew {}", path.display()));
    Ok(())
}

fn describe(outcomes: &[Outcome]) -> String {
    let head = ["COUNTED", "PLACED", "MEMORY USED", "SHORT", "MOVES", "LOST", "RECOVERED", "STRANDED"];
    let rows: Vec<_> = outcomes
        .iter()
        .map(|outcome| {
            [
                outcome.counting.to_string(),
                outcome.placed.to_string(),
                format!("{:.1} %", outcome.used_percent),
                format!("{:.3} %", outcome.short_percent),
                outcome.moves.to_string(),
                outcome.lost.to_string(),
                outcome.recovered.to_string(),
                format!("{:.1} %", outcome.stranded_percent),
            ]
        })
        .collect();
    table::render(head, &rows)
}
