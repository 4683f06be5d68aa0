//! Who is grown and who is shrunk in one round.

use std::time::Duration;

use api::units::Bytes;

use super::reason::{Decision, Rule};
use super::vm::{PIECE, Round, Vm};
use super::{Observation, Policy};

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
    /// Buffers that nothing was left for.
    pub postponed: Bytes,
}

impl Policy {
    /// Grants what is free: first what can't wait, then buffers, the largest relative gap first.
    pub(super) fn grow(
        &mut self,
        now: Duration,
        free: Bytes,
        vms: &mut [Vm],
        decisions: &mut Vec<Decision>,
    ) -> Granted {
        self.gaps.clear();
        for (index, vm) in vms.iter().enumerate() {
            if !vm.is_decided() && vm.takes_targets() {
                self.gaps.extend(vm.gap(now, &self.settings).map(|gap| (gap, index)));
            }
        }
        self.gaps.sort_unstable_by(|a, b| {
            // Compares gap / target of both without a division.
            let (a_target, b_target) = (vms[a.1].observed.target.0.max(1), vms[b.1].observed.target.0.max(1));
            let of_a = u128::from(a.0.whole.0) * u128::from(b_target);
            let of_b = u128::from(b.0.whole.0) * u128::from(a_target);
            of_b.cmp(&of_a).then(vms[a.1].id.cmp(&vms[b.1].id))
        });
        let mut granted = Granted { left: free, ..Granted::default() };
        self.give_what_is_urgent(&mut granted, vms);
        self.give_buffers(&mut granted, vms);
        for &(gap, index) in &self.gaps {
            let vm = &mut vms[index];
            let Observation { target, limits, .. } = vm.observed;
            let new = target.saturating_add(gap.given).page_floor().min(limits.max());
            if new.saturating_sub(target) < PIECE.min(gap.whole) {
                continue;
            }
            vm.grows(now);
            let rule = if target < limits.min() { Rule::Limits } else { Rule::Grow };
            vm.decide(self.state, rule, new, decisions);
        }
        granted
    }

    fn give_what_is_urgent(&mut self, granted: &mut Granted, vms: &[Vm]) {
        for (gap, index) in &mut self.gaps {
            let vm = &vms[*index];
            // Raising a target that the guest is still above costs nothing.
            let target = vm.observed.target.saturating_add(vm.beside());
            let cost = target.saturating_add(gap.urgent).saturating_sub(vm.charge());
            let paid = if self.settings.guards.payment_comes_first { cost.min(granted.left) } else { cost };
            let missing = cost.saturating_sub(paid);
            granted.left = granted.left.saturating_sub(paid);
            granted.unserved = granted.unserved.saturating_add(missing);
            gap.given = gap.urgent.saturating_sub(missing);
        }
    }

    fn give_buffers(&mut self, granted: &mut Granted, vms: &[Vm]) {
        for (gap, index) in &mut self.gaps {
            let vm = &vms[*index];
            let target = vm.observed.target.saturating_add(vm.beside());
            let from = target.saturating_add(gap.urgent).max(vm.charge());
            let cost = target.saturating_add(gap.whole).saturating_sub(from);
            let mut paid = Bytes::ZERO;
            if gap.given == gap.urgent {
                paid = cost.min(granted.left);
                gap.given = gap.whole.saturating_sub(cost.saturating_sub(paid));
            }
            granted.left = granted.left.saturating_sub(paid);
            granted.postponed = granted.postponed.saturating_add(cost.saturating_sub(paid));
        }
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
        let round = Round { now, state: self.state, paying, lasts, settings: &self.settings };
        self.surpluses.clear();
        let mut total = Bytes::ZERO;
        for (index, vm) in vms.iter_mut().enumerate() {
            let max = vm.observed.limits.max();
            if vm.observed.target > max && vm.takes_targets() {
                vm.decide(self.state, Rule::Limits, max, decisions);
                continue;
            }
            let mut surplus = vm.surplus(&round);
            if !paying {
                surplus = vm.unhurried(&round, surplus);
            }
            if surplus >= PIECE {
                total = total.saturating_add(surplus);
                self.surpluses.push((surplus, index));
            }
        }
        if short == Bytes::ZERO {
            return;
        }
        self.surpluses.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(vms[a.1].id.cmp(&vms[b.1].id)));
        let asked = short;
        for &(surplus, index) in &self.surpluses {
            if short == Bytes::ZERO {
                break;
            }
            let part = u128::from(asked.0) * u128::from(surplus.0) / u128::from(total.0.max(1));
            let part = Bytes(u64::try_from(part).unwrap_or(u64::MAX)).max(PIECE).min(surplus);
            short = short.saturating_sub(part);
            let vm = &mut vms[index];
            let new = vm.observed.limits.clamp(vm.observed.target.saturating_sub(part));
            let rule = if paying { Rule::Pay } else { Rule::Refill };
            vm.shrinks(now, new, paying);
            vm.decide(self.state, rule, new, decisions);
        }
    }
}
