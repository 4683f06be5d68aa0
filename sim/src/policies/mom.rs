//! oVirt's Memory Overcommitment Manager.
//!
//! Source: MoM, `doc/balloon.rules` and its collectors: every 10 s, on averages of the
//! last 10 samples. A guest uses what it has less what is free, so caches count as use.
//! While less than 20 % of the host is free, guests shrink by at most 5 %, to their use
//! and a free part that falls with the host's (below 5 % even into their use); else they
//! grow by 5 %, or at once to their use and 20 %. Changes below 0.25 % are left alone.
//!
//! Guessed: that "host" is the budget, and that what guests have touched is what is not
//! free of it.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use api::units::Bytes;

use super::{MemoryPolicy, PolicyInput};

/// Below this part of free host memory guests shrink.
const PRESSURE: f64 = 0.20;
/// Below this they shrink into what they use.
const CRITICAL: f64 = 0.05;
/// The free part that a guest should have.
const GUEST_FREE: f64 = 0.20;
/// The most by which a guest shrinks, and the least by which it grows.
const CHANGE: f64 = 0.05;
/// Changes below this part are not made.
const LEAST_CHANGE: f64 = 0.0025;
/// Samples in an average.
const SAMPLES: usize = 10;

/// The samples of each guest (what it has, what is free) and of the host's free part.
#[derive(Debug, Default)]
pub struct Mom {
    guests: HashMap<usize, VecDeque<(f64, f64)>>,
    host: VecDeque<f64>,
    ticks: u64,
}

fn push<T>(samples: &mut VecDeque<T>, sample: T) {
    samples.push_back(sample);
    if samples.len() > SAMPLES {
        samples.pop_front();
    }
}

impl MemoryPolicy for Mom {
    /// It samples once a second and decides on each tenth sample.
    fn cadence(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn decide(&mut self, view: &PolicyInput, targets: &mut Vec<(usize, Bytes)>) {
        let touched: Bytes = view.vms.iter().map(|vm| vm.resident).sum();
        let free = view.budget.saturating_sub(view.reserved).saturating_sub(touched);
        push(&mut self.host, free.0 as f64 / view.budget.0.max(1) as f64);
        for vm in view.vms {
            if let Some(report) = vm.report {
                push(self.guests.entry(vm.id).or_default(), (report.total.0 as f64, report.free.0 as f64));
            }
        }
        self.ticks += 1;
        if !self.ticks.is_multiple_of(SAMPLES as u64) {
            return;
        }
        let free = self.host.iter().sum::<f64>() / self.host.len() as f64;
        for vm in view.vms.iter().filter(|vm| vm.driver && vm.answers) {
            let Some(samples) = self.guests.get(&vm.id) else { continue };
            let count = samples.len() as f64;
            let has = samples.iter().map(|sample| sample.0).sum::<f64>() / count;
            let used = samples.iter().map(|sample| sample.0 - sample.1).sum::<f64>() / count;
            let now = vm.actual.0 as f64;
            let new = if free < PRESSURE {
                let part = if free <= CRITICAL { free - CHANGE } else { GUEST_FREE * free / PRESSURE };
                (now * (1.0 - CHANGE)).max(used + part * has).min(now)
            } else {
                (now * (1.0 + CHANGE)).max(used + GUEST_FREE * has)
            };
            if (new - now).abs() > now * LEAST_CHANGE {
                targets.push((vm.id, Bytes(new as u64)));
            }
        }
    }
}
