//! A policy like Hyper-V's Dynamic Memory.
//!
//! Source: Microsoft, "Hyper-V Dynamic Memory Overview" and "Hyper-V Dynamic Memory
//! Configuration Guide"; Linux, `drivers/hv/hv_balloon.c` (the guest reports what it
//! committed once a second; its own floor by size). Documented: demand is committed
//! memory; the VM is given it and a buffer of 20 %; memory weight decides who goes
//! short; a VM never goes below its minimum or the guest's floor.
//!
//! Guessed, kindly where in doubt, as Microsoft does not publish it: that memory is given as
//! fast as demand says each second, and taken when another VM needs it and the host has not
//! enough, or else when it was not demanded for five minutes, as its makers have told; that
//! changes below 16 MiB are not made; that when short, everyone gets a part of its demand by
//! weight and size; that what nobody demands stays with the host; and that demand is never
//! taken for less than what the guest uses, as some guests commit little and use much.

use std::collections::BTreeMap;
use std::time::Duration;

use api::units::Bytes;

use super::{MemoryPolicy, PolicyInput, fill};

/// Changes below this are not made.
const LEAST_CHANGE: Bytes = Bytes::mib(16);

/// For so long nobody is asked for what it does not demand while nobody needs it.
const UNNEEDED: Duration = Duration::from_secs(300);

/// What it remembers.
#[derive(Debug, Default)]
pub struct HyperV {
    /// Since when a VM has had more than it demands.
    above: BTreeMap<usize, Duration>,
}

/// The least that the Linux driver leaves a guest of this size (`compute_balloon_floor`).
pub fn floor(size: Bytes) -> Bytes {
    let mib = size.0 >> 20;
    Bytes::mib(match mib {
        0..128 => 8 + mib / 2,
        128..512 => 40 + mib / 4,
        512..2048 => 104 + mib / 8,
        2048..8192 => 232 + mib / 16,
        _ => 488 + mib / 32,
    })
}

impl MemoryPolicy for HyperV {
    fn cadence(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn is_refused_what_is_not_there(&self) -> bool {
        true
    }

    fn decide(&mut self, view: &PolicyInput, targets: &mut Vec<(usize, Bytes)>) {
        let claims: Vec<_> = view
            .vms
            .iter()
            .map(|vm| {
                let limits = vm.limits;
                let Some(report) = vm.report.filter(|_| vm.driver && vm.answers) else {
                    let held = vm.held().max(vm.target);
                    return (held, held, 0);
                };
                let least = limits.clamp(floor(limits.max()));
                let used = report.total.saturating_sub(report.available);
                let wants = report.committed.max(used).percent(100 + u64::from(limits.buffer_percent()));
                (least, limits.clamp(wants).max(least), u64::from(limits.weight()) * limits.max().pages().0)
            })
            .collect();
        let given = fill(view.budget.saturating_sub(view.reserved), &claims);
        let goals = || view.vms.iter().zip(given.iter().zip(&claims)).filter(|(_, (_, claim))| claim.2 > 0);
        let missing: Bytes = goals().map(|(vm, (bytes, _))| bytes.saturating_sub(vm.target)).sum();
        let free = view.budget.saturating_sub(view.reserved).saturating_sub(view.held());
        let is_short = missing > free;
        for (vm, (&bytes, _)) in goals() {
            if bytes >= vm.target {
                self.above.remove(&vm.id);
            }
            if bytes.0.abs_diff(vm.target.0) < LEAST_CHANGE.0 {
                continue;
            }
            let since = *self.above.entry(vm.id).or_insert(view.now);
            if bytes > vm.target || is_short || view.now.saturating_sub(since) >= UNNEEDED {
                self.above.remove(&vm.id);
                targets.push((vm.id, bytes));
            }
        }
    }
}
