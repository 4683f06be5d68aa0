//! Many runs: every policy with every number of VMs over every seed, on all cores.
//!
//! Each run is a pure function, and results are added up in a fixed order: the number of cores changes
//! nothing but the time.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use serde::Serialize;

use super::Setup;
use super::policies::PolicyName;
use super::score::{SLO_STALLED_PERMILLE, Score};
use super::trace::{Kind, Trace};
use super::{bound, world};

/// Where demand comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Made by seed.
    Generated(Kind),
    /// Read from a file; a smaller number of VMs takes its first ones.
    Recorded(Trace),
}

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// The policies.
    pub policies: Vec<PolicyName>,
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

/// The runs of one policy with one number of VMs, over all seeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// All runs together.
    pub score: Score,
    /// How many there were.
    pub runs: usize,
}

impl Cell {
    fn add(&mut self, score: &Score) {
        self.score.add(score);
        self.runs += 1;
    }
}

/// The results.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// By policy and number of VMs.
    pub cells: BTreeMap<(PolicyName, usize), Cell>,
    /// What no policy can do better than, by number of VMs.
    pub bounds: BTreeMap<usize, Cell>,
    /// How many VMs were served well in each single run, by policy and seed.
    pub served: BTreeMap<(PolicyName, u64), Option<usize>>,
    /// The same of the bound, by seed.
    pub bound_served: BTreeMap<u64, Option<usize>>,
    /// Whether all runs were done; if not, cells have fewer runs, or are missing.
    pub complete: bool,
}

impl Outcome {
    /// The largest number of VMs such that `policy` met the SLO with it and every smaller number; `None` if
    /// not even with the smallest.
    pub fn most_vms(&self, policy: PolicyName) -> Option<usize> {
        self.capacity(policy).most_vms
    }

    /// How many VMs `policy` serves.
    pub fn capacity(&self, policy: PolicyName) -> Capacity {
        let own = self.cells.iter().filter(|((name, _), _)| *name == policy);
        let runs = self.served.iter().filter(|((name, _), _)| *name == policy).map(|(_, most)| *most);
        Capacity::of(own.map(|((_, vms), cell)| (*vms, cell.score)), runs)
    }

    /// How many VMs could be served at most.
    pub fn bound(&self) -> Capacity {
        let cells = self.bounds.iter().map(|(vms, cell)| (*vms, cell.score));
        Capacity::of(cells, self.bound_served.values().copied())
    }
}

/// How many VMs are served well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Capacity {
    /// The largest number such that all runs together meet the SLO with it and every smaller number; `None`
    /// if even the smallest number was too many.
    pub most_vms: Option<usize>,
    /// Where the stalled share crosses the SLO, on a line between the logarithms of two neighbours. A number
    /// of VMs with kills counts nothing.
    pub interpolated_vms: Option<f64>,
    /// The mean over all runs of the largest number served. A run in which the smallest number is too many
    /// counts one less than that.
    pub mean_vms: Option<f64>,
}

/// The least stalled share that is used, in percent, as zero has no logarithm.
const LEAST_STALLED: f64 = 1e-4;

impl Capacity {
    fn of(cells: impl Iterator<Item = (usize, Score)>, runs: impl Iterator<Item = Option<usize>>) -> Self {
        let cells: Vec<_> = cells.collect();
        let good = cells.iter().take_while(|(_, score)| score.meets_slo()).count();
        let last = good.checked_sub(1).map(|index| cells[index]);
        let interpolated = last.map(|last| crossing(last, cells.get(good).copied()));
        let below = cells.first().map_or(0, |(vms, _)| vms.saturating_sub(1));
        let runs: Vec<usize> = runs.map(|most| most.unwrap_or(below)).collect();
        let mean = runs.iter().sum::<usize>() as f64 / runs.len() as f64;
        Self {
            most_vms: last.map(|(vms, _)| vms),
            interpolated_vms: interpolated,
            mean_vms: (!runs.is_empty()).then_some(mean),
        }
    }
}

/// The number of VMs between the last that meets the SLO and the first that doesn't.
fn crossing((vms, score): (usize, Score), next: Option<(usize, Score)>) -> f64 {
    let vms_there = vms as f64;
    let Some((more, worse)) = next.filter(|(_, worse)| worse.killed == 0) else { return vms_there };
    let slo = SLO_STALLED_PERMILLE / 10.0;
    let low = score.stalled_percent().max(LEAST_STALLED).ln();
    let high = worse.stalled_percent().ln();
    vms_there + (more - vms) as f64 * ((slo.ln() - low) / (high - low)).clamp(0.0, 1.0)
}

impl Sweep {
    /// How many runs this is.
    pub fn runs(&self) -> usize {
        self.policies.len() * self.vms.len() * self.seeds.clone().count()
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

    /// Makes all runs. `done` is called after each run, from any thread, with the number that are done.
    /// `stop` ends the sweep early with the results so far.
    pub fn run(&self, stop: &AtomicBool, done: &(dyn Fn(usize) + Sync)) -> Outcome {
        // A job is a seed and a number of VMs: its trace is made once for all policies.
        let jobs: Vec<(u64, usize)> =
            self.vms.iter().rev().flat_map(|&vms| self.seeds.clone().map(move |seed| (seed, vms))).collect();
        let (next, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let work = || {
            let (mut scores, mut bounds) = (Vec::new(), Vec::new());
            while let Some(&(seed, vms)) = jobs.get(next.fetch_add(1, Ordering::Relaxed))
                && !stop.load(Ordering::Relaxed)
            {
                let trace = self.trace(seed, vms);
                bounds.push(((vms, seed), bound::bound(&trace, &self.setup)));
                for &policy in &self.policies {
                    let mut policy_made = policy.make();
                    let score = world::run_until(&trace, &self.setup, &mut *policy_made, &mut |_| (), stop);
                    let Some(score) = score else { return (scores, bounds) };
                    scores.push(((policy, vms, seed), score));
                    done(finished.fetch_add(1, Ordering::Relaxed) + 1);
                }
            }
            (scores, bounds)
        };
        let threads = thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
        let (mut scores, mut bounds) = (BTreeMap::new(), BTreeMap::new());
        thread::scope(|scope| {
            // This thread is one of them. Where the kernel gives no more, fewer do it all.
            let more = (1..threads).map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok());
            let workers: Vec<_> = more.collect();
            let own = work();
            let others =
                workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
            for (some_scores, some_bounds) in others.chain([own]) {
                scores.extend(some_scores);
                bounds.extend(some_bounds);
            }
        });
        let complete = scores.len() == self.runs();
        let mut outcome = Outcome { complete, ..Outcome::default() };
        for (&(policy, vms, seed), score) in &scores {
            outcome.cells.entry((policy, vms)).or_default().add(score);
            serve(outcome.served.entry((policy, seed)).or_default(), vms, score, &self.vms);
        }
        for (&(vms, seed), score) in &bounds {
            outcome.bounds.entry(vms).or_default().add(score);
            serve(outcome.bound_served.entry(seed).or_default(), vms, score, &self.vms);
        }
        outcome
    }
}

/// Takes in the `score` of a run with so many VMs. Runs come in the order of their VMs, and one counts only
/// if all with fewer VMs were served well.
fn serve(most: &mut Option<usize>, vms: usize, score: &Score, all: &[usize]) {
    let fewer = all.iter().copied().filter(|&other| other < vms).max();
    if score.meets_slo() && *most == fewer {
        *most = Some(vms);
    }
}

/// One run with its snapshots, for a plot; `None` where `stop` was set before its end.
pub fn watch(
    sweep: &Sweep,
    policy: PolicyName,
    vms: usize,
    seed: u64,
    stop: &AtomicBool,
) -> Option<(Trace, Vec<world::Snapshot>)> {
    let trace = sweep.trace(seed, vms);
    let mut snapshots = Vec::new();
    let mut keep = |snapshot: &world::Snapshot| snapshots.push(snapshot.clone());
    world::run_until(&trace, &sweep.setup, &mut *policy.make(), &mut keep, stop)?;
    Some((trace, snapshots))
}
