//! A policy like ESXi's.
//!
//! Source: Waldspurger, "Memory Resource Management in VMware ESX Server" (OSDI 2002):
//! shares for each page with an idle tax of 75 %, active memory by sampling with a slow
//! and a fast average of which the larger counts, nobody held back while there is enough;
//! VMware, "vSphere Resource Management": a part of memory kept free (minFree), sample
//! period 60 s, a balloon of at most 65 % of the VM.
//!
//! Guessed, kindly where in doubt: minFree as 3 % of the budget; what a guest uses is what
//! sampling finds active; shares by size; new targets every 5 s that balloons follow at
//! once, where the real one lets balloons go when the host is not short and pulls them in
//! again when it is.

use std::time::Duration;

use api::units::Bytes;

use super::{MemoryPolicy, PolicyInput};

/// The part of the budget that is kept free, in percent.
const MIN_FREE_PERCENT: u64 = 3;

/// An idle page costs this many times an active one: 1 / (1 - 0.75).
const IDLE_COST: f64 = 4.0;

/// Time constants of the averages of active memory, in seconds.
const AVERAGES: [f64; 2] = [30.0, 120.0];

/// Time between two decisions, in seconds.
const CADENCE: f64 = 5.0;

/// Averages of active memory for each VM.
#[derive(Debug, Default)]
pub struct Esxi {
    active: Vec<[f64; 2]>,
}

impl Esxi {
    fn sample(&mut self, id: usize, used: Bytes) -> f64 {
        if self.active.len() <= id {
            self.active.resize(id + 1, [0.0; 2]);
        }
        let used = used.0 as f64;
        for (average, tau) in self.active[id].iter_mut().zip(AVERAGES) {
            *average = if *average == 0.0 { used } else { used + (*average - used) * (-CADENCE / tau).exp() };
        }
        // Rising use is noticed at once: the newest samples are looked at too.
        self.active[id].iter().copied().fold(used, f64::max)
    }
}

/// What a VM with `shares` may have when a share buys `price` bytes of active memory.
fn worth(price: f64, shares: f64, active: f64) -> f64 {
    let bought = price * shares;
    if bought <= active { bought } else { active + (bought - active) / IDLE_COST }
}

impl MemoryPolicy for Esxi {
    fn cadence(&self) -> Duration {
        Duration::from_secs_f64(CADENCE)
    }

    fn is_refused_what_is_not_there(&self) -> bool {
        true
    }

    fn decide(&mut self, view: &PolicyInput, targets: &mut Vec<(usize, Bytes)>) {
        let min_free = view.budget.percent(MIN_FREE_PERCENT);
        let vms: Vec<_> = view
            .vms
            .iter()
            .map(|vm| {
                let used =
                    vm.report.map_or(vm.resident, |report| report.total.saturating_sub(report.available));
                let active = self.sample(vm.id, used);
                let max = vm.limits.max().0 as f64;
                let least = (vm.limits.min().0 as f64).max(max * 0.35);
                let held = if vm.driver && vm.answers { None } else { Some(vm.held().0 as f64) };
                (active, least, max, held)
            })
            .collect();
        let capacity = view.budget.saturating_sub(view.reserved).saturating_sub(min_free).0 as f64;
        let given = |price: f64| {
            vms.iter().map(move |&(active, least, max, held)| {
                held.unwrap_or_else(|| worth(price, max, active).clamp(least, max))
            })
        };
        let (mut low, mut high) = (0.0, 4.0);
        for _ in 0..40 {
            let middle = (low + high) / 2.0;
            if given(middle).sum::<f64>() <= capacity { low = middle } else { high = middle }
        }
        targets.extend(view.vms.iter().zip(given(low)).map(|(vm, bytes)| (vm.id, Bytes(bytes as u64))));
    }
}
