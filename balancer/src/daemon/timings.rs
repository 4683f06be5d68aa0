//! How long the daemon takes for what it does.

use std::sync::atomic::{AtomicU64, Ordering};

use api::metrics::{Histogram, Page};

/// How long things take, counted as they happen.
#[derive(Debug)]
pub struct Timings {
    /// From the round that finds a guest short of what it wants to its VM taking a target that gives it.
    pub grant: Histogram,
    /// Deciding, for all VMs of one round.
    pub policy: Histogram,
    /// A whole round: asking, deciding, telling.
    pub round: Histogram,
    /// Rounds that began later than they should, by more than a tenth of the interval.
    pub late: AtomicU64,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            grant: Histogram::new(&[
                0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
            ]),
            policy: Histogram::new(&[1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1]),
            round: Histogram::new(&[1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.25, 0.5, 0.75, 1.0, 3.0]),
            late: AtomicU64::new(0),
        }
    }
}

impl Timings {
    /// As Prometheus reads them.
    pub fn write(&self, page: &mut Page) {
        for (name, help, histogram) in [
            (
                "time_to_grant_seconds",
                "From finding a guest short of what it wants to its VM taking a target that gives it",
                &self.grant,
            ),
            ("policy_seconds", "Deciding, for all VMs of one round", &self.policy),
            ("round_seconds", "One round: asking, deciding, telling", &self.round),
        ] {
            page.histogram(name, help, histogram);
        }
        let help = "Rounds that began late by more than a tenth of the interval";
        page.counter("rounds_late", help, self.late.load(Ordering::Relaxed));
    }
}
