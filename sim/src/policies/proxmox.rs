//! Proxmox VE's automatic memory allocation.
//!
//! Source: Proxmox VE, `PVE/Service/pvestatd.pm` and `PVE/AutoBalloon.pm`; the
//! administration guide, "Memory". Every 10 s: goal = a set part of the host less what is
//! used; within 10 MiB nothing happens. Each VM should have its minimum and its share of
//! the rest, and moves there by at most 100 MiB a round. Who has less than a quarter of
//! its minimum free is served first, who has more pays first.
//!
//! The part of the host is 80 % by default and can be set. Here it is 97 % of the budget,
//! so that Proxmox has as much to give as the others. And where the comfortable can't pay
//! all, the pressed pay the rest in the same round; the source has them pay only where
//! nobody else could pay anything. Both are kinder than the source.

use std::time::Duration;

use api::units::Bytes;

use super::{MemoryPolicy, PolicyInput, VmInput, fill};

/// The part of the budget that it aims to use, in percent.
const TARGET_PERCENT: u64 = 97;

/// The most by which a VM changes in one round.
const MOST: Bytes = Bytes::mib(100);

/// A goal nearer than this is there.
const NEAR: Bytes = Bytes::mib(10);

/// The policy; it remembers nothing.
#[derive(Debug, Default)]
pub struct Proxmox;

/// Moves `vms` so that together they change by `goal` (up or down); returns what is left of it.
fn change(vms: &[&VmInput], goal: Bytes, up: bool, targets: &mut Vec<(usize, Bytes)>) -> Bytes {
    let above: Bytes = vms.iter().map(|vm| vm.actual.saturating_sub(vm.limits.min())).sum();
    let floors: Bytes = vms.iter().map(|vm| vm.limits.min()).sum();
    let above = if up { above + goal } else { above.saturating_sub(goal) };
    let claims: Vec<_> =
        vms.iter().map(|vm| (vm.limits.min(), vm.limits.max(), u64::from(vm.limits.weight()))).collect();
    let mut rest = goal;
    for (vm, wanted) in vms.iter().zip(fill(floors + above, &claims)) {
        let new = if up {
            wanted.min(vm.actual + MOST).min(vm.actual + rest).max(vm.actual)
        } else {
            wanted.max(vm.actual.saturating_sub(MOST)).max(vm.actual.saturating_sub(rest)).min(vm.actual)
        };
        if new != vm.actual {
            rest = rest.saturating_sub(Bytes(new.0.abs_diff(vm.actual.0)));
            targets.push((vm.id, new));
        }
    }
    rest
}

impl MemoryPolicy for Proxmox {
    fn cadence(&self) -> Duration {
        Duration::from_secs(10)
    }

    fn decide(&mut self, view: &PolicyInput, targets: &mut Vec<(usize, Bytes)>) {
        let used: Bytes = view.vms.iter().map(|vm| vm.resident).sum();
        let used = used + view.reserved;
        let aim = view.budget.percent(TARGET_PERCENT);
        let (comfortable, pressed): (Vec<&VmInput>, Vec<&VmInput>) =
            view.vms.iter().filter(|vm| vm.driver && vm.answers && vm.report.is_some()).partition(|vm| {
                let free = vm.report.map_or(Bytes::ZERO, |report| report.free);
                free > Bytes(vm.limits.min().0 / 4) && vm.actual >= vm.limits.min()
            });
        let (goal, up) = if aim > used { (aim - used, true) } else { (used - aim, false) };
        if goal <= NEAR {
            return;
        }
        let (first, second) = if up { (pressed, comfortable) } else { (comfortable, pressed) };
        let rest = change(&first, goal, up, targets);
        if rest >= goal || (!up && rest > NEAR) {
            change(&second, rest, up, targets);
        }
    }
}
