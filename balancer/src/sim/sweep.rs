//! Many runs: every law with every number of VMs over every seed, on all cores.
//!
//! Each run is a pure function, and results are added up in a fixed order: how
//! many cores there are changes the time it takes and nothing else.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Setup;
use super::laws::Name;
use super::score::Score;
use super::trace::{Kind, Trace};
use super::world;

/// Where demand comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Made by seed.
    Generated(Kind),
    /// Read from a file: the same for every seed; fewer VMs are its first ones.
    Recorded(Trace),
}

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// The laws.
    pub laws: Vec<Name>,
    /// The numbers of VMs.
    pub vms: Vec<usize>,
    /// The seeds.
    pub seeds: RangeInclusive<u64>,
    /// The length of each run in seconds.
    pub seconds: u64,
    /// Where demand comes from.
    pub source: Source,
    /// The host, the speeds and the faults.
    pub setup: Setup,
}

/// The runs of one law with one number of VMs, over all seeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// All runs together.
    pub score: Score,
    /// How many there were.
    pub runs: usize,
}

/// What came out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// By law and number of VMs.
    pub cells: BTreeMap<(Name, usize), Cell>,
    /// Whether all runs were done; if not, cells have fewer runs, or are missing.
    pub complete: bool,
}

impl Outcome {
    /// The largest number of VMs up to which `law` met the SLO with every number that was
    /// run; `None` if not even with the smallest.
    pub fn most_vms(&self, law: Name) -> Option<usize> {
        let own = self.cells.iter().filter(|((name, _), _)| *name == law);
        own.take_while(|(_, cell)| cell.score.meets_slo()).map(|((_, vms), _)| *vms).last()
    }
}

impl Sweep {
    /// How many runs this is.
    pub fn runs(&self) -> usize {
        self.laws.len() * self.vms.len() * self.seeds.clone().count()
    }

    fn trace(&self, seed: u64, vms: usize) -> Trace {
        match &self.source {
            Source::Generated(kind) => Trace::generate(*kind, seed, vms, self.seconds),
            Source::Recorded(trace) => Trace {
                seconds: trace.seconds.min(self.seconds),
                vms: trace.vms.iter().take(vms).cloned().collect(),
            },
        }
    }

    /// Runs all of it. `done` is called after each run from any thread with how many are
    /// done; `stop` ends it early with what there is.
    pub fn run(&self, stop: &AtomicBool, done: &(dyn Fn(usize) + Sync)) -> Outcome {
        // A job is a seed and a number of VMs: its trace is made once for all laws.
        let jobs: Vec<(u64, usize)> =
            self.vms.iter().rev().flat_map(|&vms| self.seeds.clone().map(move |seed| (seed, vms))).collect();
        let (next, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let scores: Mutex<BTreeMap<(Name, usize, u64), Score>> = Mutex::default();
        let work = || {
            while let Some(&(seed, vms)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let trace = self.trace(seed, vms);
                for &law in &self.laws {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let score = world::run(&trace, &self.setup, &mut *law.make(), &mut |_| ());
                    if let Ok(mut scores) = scores.lock() {
                        scores.insert((law, vms, seed), score);
                    }
                    done(finished.fetch_add(1, Ordering::Relaxed) + 1);
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len().max(1));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(work);
            }
        });
        let scores = scores.into_inner().unwrap_or_default();
        let complete = scores.len() == self.runs();
        let mut cells: BTreeMap<(Name, usize), Cell> = BTreeMap::new();
        for ((law, vms, _), score) in scores {
            let cell = cells.entry((law, vms)).or_default();
            cell.score.add(&score);
            cell.runs += 1;
        }
        Outcome { cells, complete }
    }
}

/// One run with what it looked like, for a plot.
pub fn watch(sweep: &Sweep, law: Name, vms: usize, seed: u64) -> (Trace, Vec<world::Moment>) {
    let trace = sweep.trace(seed, vms);
    let mut moments = Vec::new();
    world::run(&trace, &sweep.setup, &mut *law.make(), &mut |moment| moments.push(moment.clone()));
    (trace, moments)
}
