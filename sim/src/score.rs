//! The score of a run.

use std::time::Duration;

use api::units::Bytes;
use serde::Serialize;

use super::STEP;

/// The part of its time that a VM may wait for memory, in parts of a thousand: 0.1 %.
pub const SLO_STALLED_PERMILLE: f64 = 1.0;

/// Moves smaller than this are not looked at.
pub const SMALLEST_MOVE: Bytes = Bytes::mib(16);

/// A move against the last one within this time is a reversal, if demand was steady.
pub const REVERSAL: Duration = Duration::from_secs(60);

/// Demand that stayed within this part of itself was steady, in percent.
pub const STEADY_PERCENT: u64 = 3;

/// The score of one run, or of many together. Times are counted in steps of [`STEP`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Score {
    /// VM-steps that were looked at.
    pub steps: u64,
    /// Those in which a VM waited for memory.
    pub stalled: u64,
    /// Those in which programs were killed.
    pub killed: u64,
    /// Steps in which the VMs might hold more than the budget.
    pub over_budget: u64,
    /// The farthest that they were over it.
    pub worst_over: Bytes,
    /// Steps in which they really held more than the host has.
    pub host_full: u64,
    /// VM-steps that a VM waited for its start.
    pub waited: u64,
    /// Memory moved.
    pub churn: Bytes,
    /// Targets that went against the last one within [`REVERSAL`] while the VM's own demand was steady.
    /// Calling back what the guest has not given yet is no reversal, as nothing moved.
    pub reversals: u64,
    pub decisions: u64,
    /// VM-steps of VMs with a fault, stalled or killed; those are not counted above.
    pub faulty_stalled: u64,
}

fn seconds(steps: u64) -> f64 {
    steps as f64 * STEP.as_secs_f64()
}

impl Score {
    /// Takes in another run.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.stalled += other.stalled;
        self.killed += other.killed;
        self.over_budget += other.over_budget;
        self.worst_over = self.worst_over.max(other.worst_over);
        self.host_full += other.host_full;
        self.waited += other.waited;
        self.churn = self.churn.saturating_add(other.churn);
        self.reversals += other.reversals;
        self.decisions += other.decisions;
        self.faulty_stalled += other.faulty_stalled;
    }

    /// Waiting for memory, in percent of VM-seconds.
    pub fn stalled_percent(&self) -> f64 {
        if self.steps == 0 { 0.0 } else { self.stalled as f64 * 100.0 / self.steps as f64 }
    }

    /// Seconds in which programs were killed.
    pub fn killed_seconds(&self) -> f64 {
        seconds(self.killed)
    }

    /// Seconds over the budget.
    pub fn over_seconds(&self) -> f64 {
        seconds(self.over_budget)
    }

    /// GiB moved for each hour of a VM.
    pub fn churn_rate(&self) -> f64 {
        let hours = seconds(self.steps) / 3600.0;
        if hours == 0.0 { 0.0 } else { self.churn.0 as f64 / (1u64 << 30) as f64 / hours }
    }

    /// Whether the service is good enough: at most 0.1 % of VM-seconds stalled, and nothing killed.
    pub fn meets_slo(&self) -> bool {
        self.steps > 0 && self.stalled_percent() * 10.0 <= SLO_STALLED_PERMILLE && self.killed == 0
    }
}

/// A score in JSON, with times in seconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ScoreReport {
    pub meets_slo: bool,
    pub stalled_percent: f64,
    pub killed_seconds: f64,
    pub churn_gib_per_vm_hour: f64,
    pub reversals: u64,
    pub over_budget_seconds: f64,
    pub worst_over_bytes: Bytes,
    pub host_full_seconds: f64,
    pub waited_seconds: f64,
    pub decisions: u64,
    pub vm_seconds: f64,
    pub faulty_stalled_seconds: f64,
}

impl From<&Score> for ScoreReport {
    fn from(score: &Score) -> Self {
        Self {
            meets_slo: score.meets_slo(),
            stalled_percent: score.stalled_percent(),
            killed_seconds: score.killed_seconds(),
            churn_gib_per_vm_hour: score.churn_rate(),
            reversals: score.reversals,
            over_budget_seconds: score.over_seconds(),
            worst_over_bytes: score.worst_over,
            host_full_seconds: seconds(score.host_full),
            waited_seconds: seconds(score.waited),
            decisions: score.decisions,
            vm_seconds: seconds(score.steps),
            faulty_stalled_seconds: seconds(score.faulty_stalled),
        }
    }
}

/// Watches one VM's targets for moves back and forth.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReversalDetector {
    last: Option<(Duration, bool)>,
    least: Bytes,
    most: Bytes,
}

impl ReversalDetector {
    /// Takes in the demand at this moment.
    pub fn demand(&mut self, demand: Bytes) {
        self.least = self.least.min(demand);
        self.most = self.most.max(demand);
    }

    /// Takes in a new target; true if it is a reversal.
    pub fn moved(&mut self, now: Duration, old: Bytes, new: Bytes, demand: Bytes) -> bool {
        if old.0.abs_diff(new.0) < SMALLEST_MOVE.0 {
            return false;
        }
        let up = new > old;
        let steady =
            self.most.saturating_sub(self.least) <= SMALLEST_MOVE.max(self.most.percent(STEADY_PERCENT));
        let turned =
            self.last.is_some_and(|(then, was_up)| was_up != up && now.saturating_sub(then) <= REVERSAL);
        self.last = Some((now, up));
        (self.least, self.most) = (demand, demand);
        turned && steady
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_without_a_reason_is_a_reversal_and_one_with_a_reason_is_none() {
        let at = Duration::from_secs;
        let used = Bytes::gib(1);
        let mut reversals = ReversalDetector::default();
        assert!(!reversals.moved(at(1), Bytes::gib(2), Bytes::gib(1), used));
        reversals.demand(used + Bytes::mib(1));
        assert!(reversals.moved(at(20), Bytes::gib(1), Bytes::gib(2), used), "down and up for nothing");
        reversals.demand(used);
        assert!(!reversals.moved(at(90), Bytes::gib(2), Bytes::gib(1), used), "much later is no reversal");
        reversals.demand(used + Bytes::mib(300));
        assert!(!reversals.moved(at(95), Bytes::gib(1), Bytes::gib(2), used), "demand asked for it");
        assert!(!reversals.moved(at(96), Bytes::gib(2), Bytes::gib(2) - Bytes::mib(3), used), "too small");
    }

    #[test]
    fn the_slo_is_a_thousandth_and_no_kill() {
        let score = Score { steps: 100_000, stalled: 100, ..Score::default() };
        assert!(score.meets_slo());
        assert!(!Score { stalled: 101, ..score }.meets_slo());
        assert!(!Score { killed: 1, ..score }.meets_slo());
        assert!(!Score::default().meets_slo(), "nothing was looked at");
    }
}
