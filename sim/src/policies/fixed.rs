//! Static memory: the budget divided by the sizes of the VMs, once, as an
//! administrator does who knows the sizes and nothing else.

use std::time::Duration;

use api::units::Bytes;

use super::{MemoryPolicy, PolicyInput, fill};

/// Divides once for each set of VMs.
#[derive(Debug, Default)]
pub struct Static {
    vms: Vec<usize>,
}

impl MemoryPolicy for Static {
    fn cadence(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn decide(&mut self, view: &PolicyInput, targets: &mut Vec<(usize, Bytes)>) {
        let vms: Vec<usize> = view.vms.iter().map(|vm| vm.id).collect();
        if vms == self.vms && view.reserved == Bytes::ZERO {
            return;
        }
        self.vms = vms;
        let claims: Vec<_> =
            view.vms.iter().map(|vm| (vm.limits.min(), vm.limits.max(), vm.limits.max().pages().0)).collect();
        let given = fill(view.budget.saturating_sub(view.reserved), &claims);
        targets.extend(view.vms.iter().zip(given).map(|(vm, bytes)| (vm.id, bytes)));
    }
}
