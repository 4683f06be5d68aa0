//! The result of a sweep, as a table for people and as JSON for programs.

use std::fmt::Write;

use api::units::Bytes;
use serde::Serialize;

use super::SimulatedHost;
use super::faults::Fault;
use super::policies::PolicyName;
use super::score::ScoreReport;
use super::sweep::{Capacity, Outcome, Source, Sweep};

/// One row: a policy with a number of VMs over all seeds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The policy.
    #[serde(rename = "law")]
    pub policy: PolicyName,
    /// How many VMs.
    pub vms: usize,
    /// How many runs (seeds).
    pub runs: usize,
    /// Their score together.
    #[serde(flatten)]
    pub score: ScoreReport,
}

/// How many VMs a policy serves.
#[derive(Clone, Debug, Serialize)]
pub struct Served {
    /// The policy.
    #[serde(rename = "law")]
    pub policy: PolicyName,
    /// How many.
    #[serde(flatten)]
    pub capacity: Capacity,
}

/// The bound with so many VMs: no policy that keeps the budget does better.
#[derive(Clone, Debug, Serialize)]
pub struct BoundRow {
    /// How many VMs.
    pub vms: usize,
    /// The least that they wait for memory, in percent of VM-seconds.
    pub stalled_percent: f64,
    /// Whether that meets the SLO.
    pub meets_slo: bool,
}

/// Everything about a sweep.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// False if it was ended early: then figures are of fewer runs.
    pub complete: bool,
    /// The host.
    pub host: SimulatedHost,
    /// Its budget.
    pub budget: Bytes,
    /// Where demand comes from.
    pub trace: String,
    /// The first seed; none where a file was played.
    pub first_seed: Option<u64>,
    /// The last seed.
    pub last_seed: Option<u64>,
    /// The length of each run.
    pub seconds: u64,
    /// How many VMs each policy serves.
    pub served: Vec<Served>,
    /// How many VMs a policy that knew the future could serve at most.
    pub bound: Capacity,
    /// The bound with every number of VMs.
    pub bounds: Vec<BoundRow>,
    /// What is wrong with the first VMs, one each.
    pub faults: Vec<Fault>,
    /// Every policy with every number of VMs.
    pub rows: Vec<Row>,
}

impl Report {
    /// The report of `outcome`.
    pub fn new(sweep: &Sweep, outcome: &Outcome) -> Self {
        let trace = match &sweep.source {
            Source::Generated(kind) => kind.word().to_owned(),
            Source::Recorded(trace) => format!("recorded, {} VMs", trace.vms.len()),
        };
        let is_generated = matches!(sweep.source, Source::Generated(_));
        let rows = outcome.cells.iter().map(|((policy, vms), cell)| Row {
            policy: *policy,
            vms: *vms,
            runs: cell.runs,
            score: ScoreReport::from(&cell.score),
        });
        let served =
            sweep.policies.iter().map(|&policy| Served { policy, capacity: outcome.capacity(policy) });
        let bounds = outcome.bounds.iter().map(|(vms, cell)| BoundRow {
            vms: *vms,
            stalled_percent: cell.score.stalled_percent(),
            meets_slo: cell.score.meets_slo(),
        });
        Self {
            complete: outcome.complete,
            host: sweep.setup.host,
            budget: sweep.setup.host.budget(),
            trace,
            first_seed: is_generated.then_some(*sweep.seeds.start()),
            last_seed: is_generated.then_some(*sweep.seeds.end()),
            seconds: sweep.seconds,
            served: served.collect(),
            bound: outcome.bound(),
            bounds: bounds.collect(),
            faults: sweep.setup.faults.clone(),
            rows: rows.collect(),
        }
    }

    /// What was run, in one line.
    pub fn about(&self) -> String {
        let seeds = match (self.first_seed, self.last_seed) {
            (Some(first), Some(last)) => format!("seeds {first} to {last}, "),
            _ => String::new(),
        };
        format!(
            "{} trace, {seeds}{} h each, host of {} with {} for VMs",
            self.trace,
            self.seconds as f64 / 3600.0,
            self.host.total,
            self.budget
        )
    }

    /// Two tables: VMs at equal service, and every row.
    pub fn table(&self) -> String {
        let mut text = format!("{}\n", self.about());
        if !self.faults.is_empty() {
            let faults: Vec<_> = self.faults.iter().map(ToString::to_string).collect();
            let _ = writeln!(
                text,
                "Faults of the first VMs, whose own stalls are not counted: {}",
                faults.join(", ")
            );
        }
        if !self.complete {
            text.push_str("Ended early: the figures are of the runs that were done.\n");
        }
        if self.rows.iter().any(|row| row.vms != self.rows[0].vms) {
            text.push_str("\nThe most VMs that are served well (stalled at most 0.1 % of their time, nothing killed):\n");
            let _ = writeln!(
                text,
                "  {:16} {:>9} {:>13} {:>12}",
                "policy", "all runs", "interpolated", "mean of runs"
            );
            let largest = self.rows.iter().map(|row| row.vms).max();
            let mut served = self.served.clone();
            served.sort_by_key(|served| std::cmp::Reverse(served.capacity.most_vms));
            text.push_str(&capacity("bound", &self.bound, largest));
            for Served { policy, capacity: own } in served {
                text.push_str(&capacity(policy.title(), &own, largest));
            }
            text.push_str(
                "Bound: no policy that keeps the budget can serve more, even if it knew the future; +: or more than was tried.\n",
            );
        }
        let _ = writeln!(
            text,
            "\n{:16} {:>4}  {:4} {:>9} {:>9} {:>12} {:>9} {:>12}",
            "policy", "VMs", "SLO", "stalled", "killed", "churn", "reversals", "over budget"
        );
        let _ = writeln!(
            text,
            "{:16} {:>4}  {:4} {:>9} {:>9} {:>12} {:>9} {:>12}",
            "", "", "", "% of time", "s", "GiB/VM-hour", "", "s"
        );
        for BoundRow { vms, stalled_percent, meets_slo } in &self.bounds {
            let slo = if *meets_slo { "ok" } else { "-" };
            let _ = writeln!(text, "{:16} {vms:>4}  {slo:4} {stalled_percent:>9.4}", "bound");
        }
        for Row { policy, vms, score, .. } in &self.rows {
            let slo = if score.meets_slo { "ok" } else { "-" };
            let _ = writeln!(
                text,
                "{:16} {vms:>4}  {slo:4} {:>9.4} {:>9.1} {:>12.2} {:>9} {:>12.1}",
                policy.title(),
                score.stalled_percent,
                score.killed_seconds,
                score.churn_gib_per_vm_hour,
                score.reversals,
                score.over_budget_seconds
            );
        }
        text
    }
}

/// One line. A `+` means that even the largest number that was tried is served well.
fn capacity(title: &str, own: &Capacity, largest: Option<usize>) -> String {
    let most = match own.most_vms {
        Some(vms) if Some(vms) == largest => format!("{vms}+"),
        Some(vms) => vms.to_string(),
        None => "none".to_owned(),
    };
    let number = |vms: Option<f64>| vms.map_or("-".to_owned(), |vms| format!("{vms:.2}"));
    let (interpolated, mean) = (number(own.interpolated_vms), number(own.mean_vms));
    format!("  {title:16} {most:>9} {interpolated:>13} {mean:>12}\n")
}
