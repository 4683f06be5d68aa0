//! Xen's selfballooning.
//!
//! Source: Linux up to 5.2, `drivers/xen/xen-selfballoon.c`: every 5 s the goal is
//! `Committed_AS` and the kernel's reserve; a guest above the goal gives up 1/8 of the
//! way, one below takes the whole way. The guest decides alone; Xen refuses what is not
//! there.
//!
//! Guessed: the reserve and the smallest usable size together as 1/16 of the VM
//! (the source has a piecewise function of the size).

use std::time::Duration;

use api::units::Bytes;

use super::{MemoryPolicy, PolicyInput};

/// The part of the way up and down that is gone at once.
const DOWN: u64 = 8;

/// The policy; it lives in each guest.
#[derive(Debug, Default)]
pub struct Selfballoon;

impl MemoryPolicy for Selfballoon {
    fn cadence(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn is_refused_what_is_not_there(&self) -> bool {
        true
    }

    fn decide(&mut self, view: &PolicyInput, targets: &mut Vec<(usize, Bytes)>) {
        for vm in view.vms.iter().filter(|vm| vm.driver) {
            let Some(report) = vm.report else { continue };
            let goal = vm.limits.clamp(report.committed + Bytes(vm.limits.max().0 / 16));
            let target = if vm.actual > goal { vm.actual - Bytes((vm.actual - goal).0 / DOWN) } else { goal };
            targets.push((vm.id, target));
        }
    }
}
