//! Who is grown and who is shrunk in one round.

use std::time::Duration;

use balloon::units::Bytes;

use super::Policy;
use super::reason::{Decision, Rule};
use super::vm::{PIECE, Round, Vm};

/// Free memory above this is ample, in percent of the pool: only from ample memory are
/// guests given their buffers. A host that is near its limit would give them between two
/// bursts and take them back at the next.
pub const AMPLE_PERCENT: u64 = 150;

/// What is to be taken from guests in one round.
#[derive(Clone, Copy)]
pub(super) struct Shortage {
    /// All of it.
    pub short: Bytes,
    /// What others are waiting for.
    pub waiting: Bytes,
    /// Whether an emergency has lasted.
    pub lasts: bool,
}

/// What came of granting.
#[derive(Clone, Copy, Default)]
pub(super) struct Granted {
    /// What is still free.
    pub left: Bytes,
    /// What VMs are waiting for.
    pub unserved: Bytes,
    /// Buffers that wait until there is ample memory.
    pub postponed: Bytes,
}

impl Policy {
    /// Grants what is free, the largest relative gap first.
    pub(super) fn grow(
        &mut self,
        now: Duration,
        free: Bytes,
        ample: bool,
        vms: &mut [Vm],
        decisions: &mut Vec<Decision>,
    ) -> Granted {
        let round = Round { now, state: self.state, ample, lasts: false, settings: &self.settings };
        self.order.clear();
        let mut granted = Granted::default();
        for (index, vm) in vms.iter().enumerate() {
            if vm.is_decided() || !vm.takes_targets() {
                continue;
            }
            let gap = vm.gap(&round);
            granted.postponed = granted.postponed.saturating_add(vm.postponed(&round));
            if gap > Bytes::ZERO {
                self.order.push((gap, index));
            }
        }
        self.order.sort_unstable_by(|a, b| {
            // gap / target of one against the other's, without dividing.
            let (a_target, b_target) = (vms[a.1].said.target.0.max(1), vms[b.1].said.target.0.max(1));
            let (of_a, of_b) =
                (u128::from(a.0.0) * u128::from(b_target), u128::from(b.0.0) * u128::from(a_target));
            of_b.cmp(&of_a).then(vms[a.1].id.cmp(&vms[b.1].id))
        });
        let (mut left, mut unserved) = (free, Bytes::ZERO);
        for &(gap, index) in &self.order {
            let vm = &mut vms[index];
            let (target, limits) = (vm.said.target, vm.said.limits);
            // Raising a target that the guest is still above costs nothing.
            let wanted = target.saturating_add(gap);
            let cost = wanted.saturating_sub(vm.charge());
            let paid = if self.settings.guards.payment_comes_first { cost.min(left) } else { cost };
            let missing = cost.saturating_sub(paid);
            unserved = unserved.saturating_add(missing);
            let new = wanted.saturating_sub(missing).page_floor().min(limits.max());
            if new.saturating_sub(target) < PIECE.min(gap) {
                continue;
            }
            left = left.saturating_sub(paid);
            vm.grows(now);
            let rule = if target < limits.min() { Rule::Limits } else { Rule::Grow };
            vm.decide(self.state, rule, new, decisions);
        }
        Granted { left, unserved, ..granted }
    }

    /// Takes what is short from those that have more than they may, the largest surplus first.
    pub(super) fn shrink(
        &mut self,
        now: Duration,
        shortage: Shortage,
        vms: &mut [Vm],
        decisions: &mut Vec<Decision>,
    ) {
        let Shortage { mut short, waiting, lasts } = shortage;
        let paying = waiting > Bytes::ZERO;
        let round = Round { now, state: self.state, ample: false, lasts, settings: &self.settings };
        self.order.clear();
        let mut total = Bytes::ZERO;
        for (index, vm) in vms.iter_mut().enumerate() {
            let max = vm.said.limits.max();
            if vm.said.target > max && vm.takes_targets() {
                vm.decide(self.state, Rule::Limits, max, decisions);
                continue;
            }
            let mut surplus = vm.surplus(&round);
            if !paying {
                surplus = vm.unhurried(&round, surplus);
            }
            if surplus >= PIECE {
                total = total.saturating_add(surplus);
                self.order.push((surplus, index));
            }
        }
        if short == Bytes::ZERO {
            return;
        }
        self.order.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(vms[a.1].id.cmp(&vms[b.1].id)));
        let asked = short;
        for &(surplus, index) in &self.order {
            if short == Bytes::ZERO {
                break;
            }
            let part = u128::from(asked.0) * u128::from(surplus.0) / u128::from(total.0.max(1));
            let part = Bytes(u64::try_from(part).unwrap_or(u64::MAX)).max(PIECE).min(surplus);
            short = short.saturating_sub(part);
            let vm = &mut vms[index];
            let new = vm.said.limits.clamp(vm.said.target.saturating_sub(part));
            let rule = if paying { Rule::Pay } else { Rule::Refill };
            vm.shrinks(now, paying);
            vm.decide(self.state, rule, new, decisions);
        }
    }
}
