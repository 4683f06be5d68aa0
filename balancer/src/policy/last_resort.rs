//! What is left when nothing is left to move: advice to the host.
//!
//! VMs hold more than the budget, an emergency has lasted, and no guest can give anything
//! more: all are at their entitlement, or don't follow. Then the host is advised to swap
//! from the VM of the least weight, while it has swap for all that is over; and where it has
//! not, or nobody knows, to pause that VM. A paused VM touches nothing more, so it is
//! charged no more than what the host holds for it. One VM always goes on. When there is
//! room again the VM of the most weight is resumed first.
//!
//! None of this is done here: it stands in the decisions, said loudly, and the daemon
//! carries it out only where it was told to.

use std::time::Duration;

use balloon::units::Bytes;

use super::guards::{self, Standing};
use super::host_state::HostState;
use super::reason::{Decision, Rule};
use super::vm::Vm;
use super::{Host, Policy};

/// The time from one advice to the next: it must have had its effect.
pub const PATIENCE: Duration = Duration::from_secs(10);

impl Policy {
    /// Adds at most one advice. `over` is how far the VMs are over the budget with nothing
    /// left to move; `None` where they are not.
    pub(super) fn last_resort(
        &mut self,
        now: Duration,
        host: Host,
        over: Option<Bytes>,
        vms: &mut [Vm],
        decisions: &mut Vec<Decision>,
    ) {
        if self.resorted.is_some_and(|then| now.saturating_sub(then) < PATIENCE) {
            return;
        }
        let chosen = match over {
            Some(over) => victim(vms).map(|index| {
                let swaps = host.swap.is_some_and(|swap| swap >= over);
                (index, if swaps { Rule::Swap } else { Rule::Pause })
            }),
            None if self.state < HostState::Hard => {
                let charged: Bytes = vms.iter().map(Vm::charge).sum();
                resumable(vms, host.budget.saturating_sub(charged)).map(|index| (index, Rule::Resume))
            }
            None => None,
        };
        let Some((index, rule)) = chosen else { return };
        let vm = &mut vms[index];
        if decisions.iter().any(|decision| decision.vm == vm.id) {
            return;
        }
        if rule != Rule::Swap {
            vm.lay_down(rule == Rule::Pause);
        }
        vm.decide(self.state, rule, vm.said.target, decisions);
        self.resorted = Some(now);
    }
}

/// Of the running VMs the one of the least weight, of those the one that holds most.
/// None where it is the last one.
fn victim(vms: &[Vm]) -> Option<usize> {
    let running = |vm: &&Vm| vm.answers && vm.standing() != Standing::Paused;
    if vms.iter().filter(running).count() < 2 {
        return None;
    }
    let of = |vm: &Vm| (vm.said.limits.weight(), u64::MAX - vm.charge().0, vm.id);
    vms.iter().enumerate().filter(|(_, vm)| running(vm)).min_by_key(|(_, vm)| of(vm)).map(|(index, _)| index)
}

/// Of the VMs that were paused on advice the one of the most weight that fits into `free`.
fn resumable(vms: &[Vm], free: Bytes) -> Option<usize> {
    let more = |vm: &Vm| guards::charge(Standing::Following, &vm.said).saturating_sub(vm.charge());
    vms.iter()
        .enumerate()
        .filter(|(_, vm)| vm.is_laid_down() && more(vm) <= free)
        .max_by_key(|(_, vm)| (vm.said.limits.weight(), u64::MAX - vm.id))
        .map(|(index, _)| index)
}
