//! Who gets how much: a pure function of what VMs say and what was decided before.
//!
//! No clock and no I/O: `now` is handed in, targets are handed out. The parts in the order
//! in which a decision is made: [`observation`] (what is known), [`demand`] and [`stall`] (what a
//! guest needs), [`entitlement`] (what it may have), [`host_state`] (how hurried the host
//! is), `rest` (who was moved a short time ago), [`vm`] (how far one may be moved), [`moves`]
//! (who is), [`last_resort`] (when nothing is left to move), [`guards`] (what must not
//! happen), [`reason`] (why it happened). [`settings`] is what an operator may change.
//!
//! Grants and payments are two phases. A shrink decided now frees nothing now:
//! a VM is charged the larger of its target and what it has, so memory counts as
//! free only when the guest has really given it up. Only then is it granted.

pub mod demand;
pub mod entitlement;
pub mod guards;
pub mod host_state;
pub mod last_resort;
pub mod moves;
pub mod observation;
pub mod reason;
mod rest;
pub mod settings;
pub mod stall;
pub mod vm;

use std::time::Duration;

use api::units::{Bytes, Pages};

use self::entitlement::{Claim, divide};
use self::host_state::HostState;
use self::last_resort::Margin;
use self::moves::{Granted, Shortage};
pub use self::observation::{HostObservation, Observation, Pressure, Stalls, Vcpus};
use self::reason::{Decision, Rule};
pub use self::settings::{Guards, Settings, SettingsError};
use self::vm::Gap;
pub use self::vm::{DEADBAND, FRESH, STALE_TICKS, Vm};

/// What one round found out about the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    /// What all VMs are charged together.
    pub charged: Bytes,
    /// What is left of the budget.
    pub free: Bytes,
    /// How far the charges are over the budget.
    pub over: Bytes,
    /// What VMs are entitled to and was not there to give.
    pub unserved: Bytes,
    /// How short the host is.
    pub state: HostState,
}

/// The policy, and the little it remembers about the host.
#[derive(Debug, Default)]
pub struct Policy {
    settings: Settings,
    state: HostState,
    /// Since when there is an emergency.
    emergency: Option<Duration>,
    /// Somebody waited for memory at the end of the last round.
    waiting: bool,
    resorted: Option<Duration>,
    claims: Vec<Claim>,
    gaps: Vec<(Gap, usize)>,
    surpluses: Vec<(Bytes, usize)>,
}

impl Policy {
    /// A policy that has decided nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// Goes on with other settings; what is remembered stays.
    pub fn set_settings(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Decides on new targets for `vms`, at `now` (since any fixed moment, never going back).
    ///
    /// Fills `decisions` with at most one for each VM and does not change `observed`:
    /// the caller sets the targets and says next time what became of them. A decision whose
    /// rule is [`Rule::Swap`], [`Rule::Pause`] or [`Rule::Resume`] leaves the target as it is:
    /// it asks the caller for something else or advises it, see [`last_resort`].
    ///
    /// It is called once a tick. It may also be called at any moment in between, when a guest tells that it
    /// is in distress: with all VMs as they were last seen, and the news of that one in its `observed`. All
    /// guards count time, not calls. So such a round serves the VM in need, and otherwise decides nothing
    /// that the next tick would not.
    pub fn decide(
        &mut self,
        now: Duration,
        host: HostObservation,
        vms: &mut [Vm],
        decisions: &mut Vec<Decision>,
    ) -> Balance {
        decisions.clear();
        for vm in vms.iter_mut() {
            if self.state < HostState::Emergency {
                vm.forget_advice();
            }
            if vm.look(now, &self.settings) {
                let actual = vm.let_go();
                vm.decide(self.state, Rule::Stuck, actual, decisions);
            }
        }
        let charged: Bytes = vms.iter().map(Vm::charge).sum();
        let free = host.budget.saturating_sub(charged);
        let over = charged.saturating_sub(host.budget);
        let pool = host.budget.percent(self.settings.pool_percent);
        let slack =
            if self.settings.guards.slack_is_kept { vms.iter().map(Vm::slack).sum() } else { Bytes::ZERO };
        let to_give = free.saturating_sub(slack);
        self.state = self.state.next(to_give, pool, &host);
        let lasts = self.emergency_lasts(now);

        let beside: Bytes = vms.iter().map(Vm::beside).sum();
        let to_share = host.budget.saturating_sub(slack.saturating_add(beside));
        let mut returning = self.entitle(now, to_share, pool.saturating_sub(slack), vms);
        if self.state >= HostState::Hard {
            returning = Bytes::ZERO;
        }
        let Granted { left, unserved, mut postponed } = self.grow(now, to_give, vms, decisions);
        self.waiting = unserved > Bytes::ZERO;
        let owed = self.owed(now, guards::COUNTED_ON, vms);
        // VMs that have more than they may pay for buffers that wait, once nothing presses.
        if self.state > HostState::Normal {
            postponed = Bytes::ZERO;
        }
        let kept = to_keep(pool, host.pressure, postponed, returning);
        let refill = kept.saturating_add(over).saturating_sub(left.saturating_add(slack));
        let short = unserved.saturating_add(refill).saturating_sub(owed);
        let waiting = unserved.saturating_add(postponed).saturating_add(returning);
        self.shrink(now, Shortage { short, waiting, lasts }, vms, decisions);
        let helpless =
            lasts && decisions.is_empty() && over > self.owed(now, self.settings.emergency_dwell, vms);
        let left = left.saturating_sub(Bytes(pool.0 / 2));
        self.last_resort(
            now,
            host,
            if helpless { Margin::Over(over) } else { Margin::Left(left) },
            vms,
            decisions,
        );
        Balance { charged, free, over, unserved, state: self.state }
    }

    /// What all VMs together will have given up within `time` of what they were asked for.
    fn owed(&self, now: Duration, time: Duration, vms: &[Vm]) -> Bytes {
        vms.iter().map(|vm| vm.owes(now, time, &self.settings.guards)).sum()
    }

    /// Whether an emergency has lasted. It does not end at the moment at which a VM has paid a part: that is
    /// granted at once, and the next part would have to wait anew.
    fn emergency_lasts(&mut self, now: Duration) -> bool {
        match (self.state, self.emergency) {
            (HostState::Emergency, None) => self.emergency = Some(now),
            (HostState::Emergency, Some(_)) => {}
            _ if self.waiting => {}
            _ => self.emergency = None,
        }
        self.state == HostState::Emergency
            && self.emergency.is_some_and(|since| now.saturating_sub(since) >= self.settings.emergency_dwell)
    }

    /// What each VM may have.
    ///
    /// If everyone's need fits, each VM has it, and the rest is shared as comfort. If not, the order is: what
    /// can't wait within fair shares; what can't wait beyond them, as far as that is believed
    /// ([`Vm::borrows`]); the buffers of VMs within their shares; and the rest. So buffers are lent to a VM
    /// that uses more than its share, and a VM that only says so for long keeps nobody from a buffer. For
    /// what can't wait the pool is there too.
    ///
    /// Returns the room that is to be made for a VM that was paused. It comes before comfort, and after all
    /// needs of VMs that run.
    fn entitle(&mut self, now: Duration, budget: Bytes, pool: Bytes, vms: &mut [Vm]) -> Bytes {
        let mut returning = Bytes::ZERO;
        let (capacity, all) = (budget.saturating_sub(pool).pages(), budget.pages());
        self.claims.clear();
        self.claims.extend(vms.iter().enumerate().map(|(index, vm)| vm.claim(index)));
        self.find_fair_shares(now, capacity, vms);
        let fits = self.ask(capacity, vms, Vm::want);
        if fits {
            let given: u64 = self.claims.iter().map(|claim| claim.given.0).sum();
            returning = last_resort::room_to_return(vms, Pages(capacity.0.saturating_sub(given)).bytes());
            self.go_on(Pages(capacity.0.saturating_sub(returning.pages().0)), vms, Vm::ample);
        } else if self.settings.guards.fair_comes_first {
            for claim in &mut self.claims {
                claim.floor = claim.floor.max(vms[claim.index].urgent_in_share().pages());
            }
            self.ask(all, vms, Vm::borrows);
            self.go_on(capacity, vms, Vm::in_share);
            self.go_on(all, vms, Vm::urgent);
            self.go_on(capacity, vms, Vm::want);
        } else {
            self.ask(all, vms, Vm::urgent);
            self.go_on(capacity, vms, Vm::want);
        }
        for claim in &self.claims {
            vms[claim.index].entitle(claim.given.bytes(), fits);
        }
        returning
    }

    /// What each would have if all claimed all there is.
    fn find_fair_shares(&mut self, now: Duration, capacity: Pages, vms: &mut [Vm]) {
        self.ask(capacity, vms, |vm| vm.observed.limits.max());
        for claim in &mut self.claims {
            vms[claim.index].share(now, claim.given.bytes());
        }
    }

    /// Divides `capacity` anew, with `what` of each VM as its claim. True where all got that.
    fn ask(&mut self, capacity: Pages, vms: &[Vm], what: impl Fn(&Vm) -> Bytes) -> bool {
        for claim in &mut self.claims {
            claim.want = what(&vms[claim.index]).pages();
        }
        divide(&mut self.claims, capacity)
    }

    /// As [`ask`](Self::ask), on top of what was given already.
    fn go_on(&mut self, capacity: Pages, vms: &[Vm], what: impl Fn(&Vm) -> Bytes) {
        for claim in &mut self.claims {
            claim.floor = claim.given;
        }
        self.ask(capacity, vms, what);
    }
}

/// What is to be free: the pool, and what somebody waits for.
fn to_keep(pool: Bytes, pressure: Option<Pressure>, postponed: Bytes, returning: Bytes) -> Bytes {
    // A host that waits for memory itself has less than its budget says: one more pool is kept.
    let kept = if host_state::is_pressed(pressure) { pool.saturating_add(pool) } else { pool };
    kept.max(pool.saturating_add(postponed.max(returning)))
}

#[cfg(test)]
mod tests;
