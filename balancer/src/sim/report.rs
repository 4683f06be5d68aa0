//! What a sweep came to, as a table for people and as JSON for programs.

use std::fmt::Write;

use balloon::units::Bytes;
use serde::Serialize;

use super::Host;
use super::laws::Name;
use super::score::Told;
use super::sweep::{Outcome, Source, Sweep};

/// One row: a law with a number of VMs over all seeds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The law.
    pub law: Name,
    /// How many VMs.
    pub vms: usize,
    /// How many runs (seeds).
    pub runs: usize,
    /// What they came to together.
    #[serde(flatten)]
    pub score: Told,
}

/// How many VMs a law serves.
#[derive(Clone, Debug, Serialize)]
pub struct Served {
    /// The law.
    pub law: Name,
    /// The most VMs at good service; `None` if even the smallest number was too many.
    pub most_vms: Option<usize>,
}

/// Everything about a sweep.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// False if it was ended early: then figures are of fewer runs.
    pub complete: bool,
    /// The host.
    pub host: Host,
    /// Its budget.
    pub budget: Bytes,
    /// Where demand comes from.
    pub trace: String,
    /// The first seed.
    pub first_seed: u64,
    /// The last seed.
    pub last_seed: u64,
    /// The length of each run.
    pub seconds: u64,
    /// How many VMs each law serves.
    pub served: Vec<Served>,
    /// Every law with every number of VMs.
    pub rows: Vec<Row>,
}

impl Report {
    /// The report of `outcome`.
    pub fn new(sweep: &Sweep, outcome: &Outcome) -> Self {
        let trace = match &sweep.source {
            Source::Generated(kind) => kind.name().to_owned(),
            Source::Recorded(trace) => format!("recorded, {} VMs", trace.vms.len()),
        };
        let rows = outcome.cells.iter().map(|((law, vms), cell)| Row {
            law: *law,
            vms: *vms,
            runs: cell.runs,
            score: Told::from(&cell.score),
        });
        let served = sweep.laws.iter().map(|&law| Served { law, most_vms: outcome.most_vms(law) });
        Self {
            complete: outcome.complete,
            host: sweep.setup.host,
            budget: sweep.setup.host.budget(),
            trace,
            first_seed: *sweep.seeds.start(),
            last_seed: *sweep.seeds.end(),
            seconds: sweep.seconds,
            served: served.collect(),
            rows: rows.collect(),
        }
    }

    /// What was run, in one line.
    pub fn about(&self) -> String {
        format!(
            "{} trace, seeds {} to {}, {} h each, host of {} with {} for VMs",
            self.trace,
            self.first_seed,
            self.last_seed,
            self.seconds as f64 / 3600.0,
            self.host.total,
            self.budget
        )
    }

    /// Two tables: VMs at equal service, and every row.
    pub fn table(&self) -> String {
        let mut text = format!("{}\n", self.about());
        if !self.complete {
            text.push_str("Ended early: the figures are of the runs that were done.\n");
        }
        if self.rows.iter().any(|row| row.vms != self.rows[0].vms) {
            text.push_str("\nThe most VMs that are served well (stalled at most 0.1 % of their time, nothing killed):\n");
            let mut served = self.served.clone();
            served.sort_by_key(|served| std::cmp::Reverse(served.most_vms));
            for Served { law, most_vms } in served {
                let most = most_vms.map_or("none of those tried".to_owned(), |vms| vms.to_string());
                let _ = writeln!(text, "  {:16} {most}", law.title());
            }
        }
        let _ = writeln!(
            text,
            "\n{:16} {:>4}  {:4} {:>9} {:>9} {:>12} {:>9} {:>12}",
            "law", "VMs", "SLO", "stalled", "killed", "churn", "reversals", "over budget"
        );
        let _ = writeln!(
            text,
            "{:16} {:>4}  {:4} {:>9} {:>9} {:>12} {:>9} {:>12}",
            "", "", "", "% of time", "s", "GiB/VM-hour", "", "s"
        );
        for Row { law, vms, score, .. } in &self.rows {
            let slo = if score.meets_slo { "ok" } else { "-" };
            let _ = writeln!(
                text,
                "{:16} {vms:>4}  {slo:4} {:>9.4} {:>9.1} {:>12.2} {:>9} {:>12.1}",
                law.title(),
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
