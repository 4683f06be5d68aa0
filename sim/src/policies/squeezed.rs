//! XenServer's squeezed.
//!
//! Source: xapi-project, `squeezed` design document and `squeeze.ml`: all VMs stand at
//! the same part of the way from their dynamic minimum to their dynamic maximum, chosen
//! by what the host has free; checked every 10 s and when a VM is to start. Memory is
//! freed before it is given. A VM without progress for 5 s is inactive and left out. No
//! signal from within the guest is looked at.

use std::collections::HashMap;
use std::time::Duration;

use api::units::Bytes;

use super::{MemoryPolicy, PolicyInput, VmInput};

/// Without progress for this long a VM is inactive.
const INACTIVE: Duration = Duration::from_secs(5);

/// What each VM had when it last made progress, and when.
#[derive(Debug, Default)]
pub struct Squeezed {
    progress: HashMap<usize, (Duration, Bytes)>,
    next: Duration,
}

impl Squeezed {
    fn is_active(&mut self, now: Duration, vm: &VmInput) -> bool {
        if !vm.driver || !vm.answers {
            return false;
        }
        let (since, had) = self.progress.entry(vm.id).or_insert((now, vm.actual));
        if vm.actual <= vm.target || vm.actual != *had {
            (*since, *had) = (now, vm.actual);
        }
        now.saturating_sub(*since) < INACTIVE
    }
}

impl MemoryPolicy for Squeezed {
    fn cadence(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn is_refused_what_is_not_there(&self) -> bool {
        true
    }

    fn decide(&mut self, view: &PolicyInput, targets: &mut Vec<(usize, Bytes)>) {
        let active: Vec<&VmInput> = view.vms.iter().filter(|vm| self.is_active(view.now, vm)).collect();
        if view.now < self.next && view.reserved == Bytes::ZERO {
            return;
        }
        self.next = view.now + Duration::from_secs(10);
        let held: Bytes = active.iter().map(|vm| vm.actual).sum();
        let others = view.held().saturating_sub(held);
        let capacity = view.budget.saturating_sub(view.reserved).saturating_sub(others);
        let least: Bytes = active.iter().map(|vm| vm.limits.min()).sum();
        let range: Bytes = active.iter().map(|vm| vm.limits.max().saturating_sub(vm.limits.min())).sum();
        let part = (capacity.saturating_sub(least).0 as f64 / range.0.max(1) as f64).min(1.0);
        for vm in active {
            let range = vm.limits.max().saturating_sub(vm.limits.min()).0 as f64;
            targets.push((vm.id, vm.limits.min() + Bytes((range * part) as u64)));
        }
    }
}
