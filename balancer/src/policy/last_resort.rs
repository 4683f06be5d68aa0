//! What can be done where no memory can be moved any more: swap from VMs, or pause some.
//!
//! It comes to this where VMs hold more than the budget, an emergency has lasted, and no guest can give more
//! in time. While the host has swap for all that is over, it is advised to swap from the VM of the least
//! weight. Where it has not, or nobody knows, a VM is to be paused: the one of the least weight among those
//! that the caller can pause, or among all, as advice, where it can pause none. A VM that keeps what it was
//! asked for comes first, whatever its weight: it is why there is too little.
//!
//! A paused VM touches nothing more, so it is charged what the host holds for it. A VM that has touched all
//! that it may is not paused: that would help nobody. One VM always goes on. An operator's pause is
//! different: it may end at any moment, so that VM stays charged in full.
//!
//! The VM of the most weight is resumed first, among those that there is room for. While all needs fit, room
//! is made for it: it comes before what others have beyond their needs. VMs tell who paused them, so a policy
//! that has just begun resumes a VM that another one had paused. It waits for [`PATIENCE`] first.

use std::time::Duration;

use api::units::Bytes;

use super::host_state::HostState;
use super::reason::{Decision, Rule};
use super::vm::{PIECE, Vm};
use super::{HostObservation, Policy};

/// The time from one decision of this kind to the next: it must have had its effect.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How the host stands once all is moved that can be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Margin {
    /// VMs hold this much too much, an emergency has lasted, and nobody can give any.
    Over(Bytes),
    /// This much may be had by one that is resumed.
    Left(Bytes),
}

impl Policy {
    /// Adds at most one decision.
    pub(super) fn last_resort(
        &mut self,
        now: Duration,
        host: HostObservation,
        margin: Margin,
        vms: &mut [Vm],
        decisions: &mut Vec<Decision>,
    ) {
        // Nobody knows what was decided before the first round.
        let then = *self.resorted.get_or_insert(now);
        if now.saturating_sub(then) < self.settings.patience {
            return;
        }
        let chosen = match margin {
            Margin::Over(over) if host.swap.is_some_and(|swap| swap >= over) => {
                lightest(vms, |_| true).map(|index| (index, Rule::Swap))
            }
            Margin::Over(_) => lightest(vms, |vm| vm.observed.pausable && vm.untouched() >= PIECE)
                .or_else(|| lightest(vms, |vm| !vm.observed.pausable && vm.untouched() >= PIECE))
                .map(|index| (index, Rule::Pause)),
            Margin::Left(left) if self.state < HostState::Hard => {
                resumable(vms, left).map(|index| (index, Rule::Resume))
            }
            Margin::Left(_) => None,
        };
        let Some((index, rule)) = chosen else { return };
        let vm = &mut vms[index];
        if decisions.iter().any(|decision| decision.vm == vm.id) {
            return;
        }
        if rule != Rule::Swap {
            vm.set_paused_by_balancer(rule == Rule::Pause);
        }
        vm.decide(self.state, rule, vm.observed.target, decisions);
        self.resorted = Some(now);
    }
}

/// The running VM to choose, among those for which `counts` is true: one that keeps what it was asked for, if
/// there is any; else the one of the least weight, and among equals the one that holds most. `None` where
/// only one runs.
fn lightest(vms: &[Vm], counts: impl Fn(&Vm) -> bool) -> Option<usize> {
    if vms.iter().filter(|vm| vm.is_running()).count() < 2 {
        return None;
    }
    let of = |vm: &Vm| (!vm.keeps_too_much(), vm.observed.limits.weight(), u64::MAX - vm.charge().0, vm.id);
    let chosen = vms.iter().enumerate().filter(|(_, vm)| vm.is_running() && counts(vm));
    chosen.min_by_key(|(_, vm)| of(vm)).map(|(index, _)| index)
}

/// The VM of the most weight among the paused ones that fit into `free`.
fn resumable(vms: &[Vm], free: Bytes) -> Option<usize> {
    vms.iter()
        .enumerate()
        .filter(|(_, vm)| vm.is_paused_by_balancer() && vm.untouched() <= free)
        .max_by_key(|(_, vm)| (vm.observed.limits.weight(), u64::MAX - vm.id))
        .map(|(index, _)| index)
}

/// What the next VM to be resumed needs, where `spare` is beyond the needs of all others.
pub(super) fn room_to_return(vms: &[Vm], spare: Bytes) -> Bytes {
    resumable(vms, spare).map_or(Bytes::ZERO, |index| vms[index].untouched())
}
