//! What a visit to the lab found, and tables of it.

use std::collections::BTreeSet;

use lab::Vendor;
use serde::{Deserialize, Serialize};

use crate::counters::reasons;
use crate::figure::short;
use crate::lab::walks::Miss;
use crate::linux;
use crate::run::{Measurement, Run, cell};

/// SLAT on and off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// `npt=1` or `ept=1`.
    pub on: Run,
    /// `npt=0` or `ept=0`.
    pub off: Run,
}

/// What one visit to the lab found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// Counts and instructions, the same each time.
    pub counted: Pair,
    /// Page-table work on more and more vCPUs, in emulated time.
    #[serde(default)]
    pub scaling: Option<Pair>,
    /// A Linux guest's exits by reason.
    #[serde(default)]
    pub reasons: Option<Pair>,
    /// KVM's memory with SLAT on and `kvm.tdp_mmu=0`.
    #[serde(default)]
    pub old_mmu: Option<Run>,
    /// Laps of a chase with each thing between them, SLAT on.
    #[serde(default)]
    pub switches: Option<Run>,
    /// The same with `vpid=0`.
    #[serde(default)]
    pub untagged: Option<Run>,
    /// What a load reads that misses the TLB.
    #[serde(default)]
    pub walks: Option<Pair>,
    /// How many sessions fit.
    #[serde(default)]
    pub density: Option<Pair>,
    /// Whether everything was counted twice.
    pub twice: bool,
    /// Where two deterministic runs differ; `None` where they are identical or there was only one.
    pub difference: Option<String>,
    /// Whether the user stopped it; what was found by then is kept.
    #[serde(default)]
    pub interrupted: bool,
    /// What was asked for and failed, and why.
    #[serde(default)]
    pub missing: Vec<String>,
}

/// The first measurement in which two deterministic runs differ.
fn difference(first: &Run, second: &Run) -> Option<String> {
    if first == second {
        return None;
    }
    let in_what = |what: String| Some(format!("two deterministic runs differ in {what}"));
    if let Some((a, b)) = first.measurements.iter().zip(&second.measurements).find(|(a, b)| a != b) {
        return in_what(format!(
            "{}: {} and {} exits an operation, {} and {} instructions",
            a.setup.describe(),
            cell(&a.exits),
            cell(&b.exits),
            cell(&a.time),
            cell(&b.time)
        ));
    }
    if let Some((a, b)) = first.linux.iter().zip(&second.linux).find(|(a, b)| a != b) {
        return in_what(format!("a Linux guest: {a:?} and {b:?}"));
    }
    // What both have is the same: one may have more.
    let counts = |run: &Run| (run.measurements.len(), run.linux.len());
    let (a, b) = (counts(first), counts(second));
    if a != b || first.linux_failure != second.linux_failure {
        let tell = |run: &Run, (setups, workloads)| {
            let why = run.linux_failure.as_ref().map_or(String::new(), |why| format!(" ({why})"));
            format!("{setups} setups and {workloads} workloads of a Linux guest{why}")
        };
        return in_what(format!("what there is: {}, and {}", tell(first, a), tell(second, b)));
    }
    in_what("what the host is".into())
}

impl Pair {
    /// The Linux guest's workloads that ran with SLAT on and off, in that order.
    pub fn workloads(&self) -> impl Iterator<Item = (&linux::Workload, &linux::Workload)> {
        let off = |on: &linux::Workload| self.off.linux.iter().find(|off| off.name == on.name);
        self.on.linux.iter().filter_map(move |on| Some((on, off(on)?)))
    }
}

impl Findings {
    /// Whose virtualisation the hosts' processors had.
    pub fn vendor(&self) -> Vendor {
        // Those who wrote no module had AMD's.
        self.counted.on.probe.module.as_deref().and_then(Vendor::of_module).unwrap_or(Vendor::Amd)
    }

    /// A first count, and nothing else yet.
    pub(crate) const fn of(counted: Pair) -> Self {
        Self {
            counted,
            scaling: None,
            reasons: None,
            old_mmu: None,
            switches: None,
            untagged: None,
            walks: None,
            density: None,
            twice: false,
            difference: None,
            interrupted: false,
            missing: Vec::new(),
        }
    }

    /// Notes that all was counted again, and where the two differ.
    pub(super) fn compare(&mut self, again: &Pair) {
        self.twice = true;
        self.difference =
            difference(&self.counted.on, &again.on).or_else(|| difference(&self.counted.off, &again.off));
    }

    /// Whether every part is there that each visit does without being asked.
    pub(super) const fn is_whole(&self) -> bool {
        self.scaling.is_some() && self.reasons.is_some() && self.old_mmu.is_some()
    }

    /// Says so where its parts, done at different times, are of different kernels or versions of ballast.
    pub fn mixed(&self) -> Option<String> {
        let pairs = [self.scaling.as_ref(), self.reasons.as_ref(), self.density.as_ref()];
        let pairs = pairs.into_iter().flatten().chain([&self.counted]);
        let runs = pairs.flat_map(|pair| [&pair.on, &pair.off]).chain(&self.old_mmu);
        let of = |run: &Run| format!("Linux {}, ballast {}", run.fingerprint.kernel, run.fingerprint.ballast);
        let all: BTreeSet<_> = runs.map(of).collect();
        (all.len() > 1).then(|| {
            let list = all.into_iter().collect::<Vec<_>>().join("; ");
            format!("the parts of the lab are not all of the same software: {list}")
        })
    }

    /// What gave nothing where it should have, and why.
    pub fn failures(&self) -> impl Iterator<Item = &String> {
        let pairs = [Some(&self.counted), self.reasons.as_ref(), self.density.as_ref()];
        let runs = pairs.into_iter().flatten().flat_map(|pair| [&pair.on, &pair.off]);
        runs.filter_map(|run| run.linux_failure.as_ref()).chain(&self.missing)
    }

    /// Rows for a Linux guest's workloads: name, exits on and off, instructions on and off, off over on.
    pub fn linux_rows(&self) -> Vec<[String; 6]> {
        let exits = |w: &linux::Workload| w.exits.map_or("-".into(), short);
        self.counted
            .workloads()
            .map(|(a, b)| {
                let factor = format!("{:.3}", b.ticks / a.ticks.max(1.0));
                [a.name.clone(), exits(a), exits(b), short(a.ticks), short(b.ticks), factor]
            })
            .collect()
    }

    /// Rows for why a Linux guest left: workload, reasons with SLAT on, and off, the most frequent first.
    pub fn reason_rows(&self) -> Vec<[String; 3]> {
        let traced = |(on, off): &(&linux::Workload, &linux::Workload)| {
            !on.reasons.is_empty() || !off.reasons.is_empty()
        };
        let workloads = self.reasons.iter().flat_map(Pair::workloads);
        workloads
            .filter(traced)
            .map(|(on, off)| [on.name.clone(), reasons::list(&on.reasons), reasons::list(&off.reasons)])
            .collect()
    }

    /// Rows for what a miss of the TLB costs: the guest's page size, the host's, memory references with SLAT on, by
    /// the model, and with SLAT off.
    pub fn miss_rows(&self) -> Vec<[String; 5]> {
        let Some(pair) = &self.walks else { return Vec::new() };
        let row = |on: &Miss| {
            let same = |off: &&Miss| (off.guest_page, off.host_page) == (on.guest_page, on.host_page);
            let off =
                pair.off.misses.iter().find(same).map_or("-".into(), |off| off.references().to_string());
            let sizes = [on.guest_page, on.host_page].map(|page| page.to_string());
            let [guest, host] = sizes;
            [guest, host, on.references().to_string(), on.model().references().to_string(), off]
        };
        pair.on.misses.iter().map(row).collect()
    }

    /// Rows for a table: setup, exits on and off, instructions on and off, note.
    pub fn rows(&self) -> Vec<[String; 6]> {
        let on = &self.counted.on.measurements;
        let row = |on: &Measurement| {
            let off = self.counted.off.find(&on.setup)?;
            let note = on.failure.clone().or_else(|| off.failure.clone()).unwrap_or_default();
            let (exits, time) = (|m: &Measurement| cell(&m.exits), |m: &Measurement| cell(&m.time));
            Some([on.setup.describe(), exits(on), exits(off), time(on), time(off), note])
        };
        on.iter().filter_map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{Clock, Plan, run};
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    #[test]
    fn a_part_that_one_of_two_lacks_is_no_difference_of_the_host() {
        let (setups, limit) = (Vec::new(), Duration::from_secs(1));
        let plan = Plan { setups, passes: 1, rounds: 1, limit, clock: Clock::Instructions, reasons: false };
        let first = run(&plan, &AtomicBool::new(true), |_, _| {});
        assert_eq!(difference(&first, &first), None);
        let died = Run { linux_failure: Some("it died".into()), ..first.clone() };
        let why = difference(&first, &died).expect("one died");
        assert!(why.contains("0 workloads of a Linux guest (it died)"), "{why}");
        let mut other = first.clone();
        other.fingerprint.kernel = "0.1".into();
        assert!(difference(&first, &other).is_some_and(|why| why.contains("what the host is")));
    }
}
