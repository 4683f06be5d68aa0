//! Who gets how much: a pure function of what VMs say and what was decided before.
//!
//! No clock and no I/O: `now` is handed in, targets are handed out. The parts in
//! the order in which a decision is made: [`said`] (what is known), [`demand`] (what a guest needs),
//! [`entitlement`] (what it may have), [`host_state`] (how hurried the host is),
//! [`guards`] (what must not happen), [`reason`] (why it happened). [`settings`] is what
//! an operator may change.
//!
//! Grants and payments are two phases. A shrink decided now frees nothing now:
//! a VM is charged the larger of its target and what it has, so memory counts as
//! free only when the guest has really given it up. Only then is it granted.

pub mod demand;
pub mod entitlement;
pub mod guards;
pub mod host_state;
pub mod reason;
pub mod said;
pub mod settings;

use std::time::Duration;

use balloon::status::DriverState;
use balloon::units::{Bytes, Pages};

use self::demand::Demand;
use self::entitlement::{Claim, divide};
use self::guards::{Standing, Watch};
use self::host_state::HostState;
use self::reason::{Decision, Reason, Rule};
pub use self::said::{Host, Pressure, Said, Stalls};
pub use self::settings::{Guards, Settings};

/// Changes smaller than this are not worth the guest's trouble (Proxmox VE: 10 MiB).
pub const DEADBAND: Bytes = Bytes::mib(16);

/// As [`DEADBAND`], in percent of the target; the larger counts.
pub const DEADBAND_PERCENT: u64 = 1;

/// A target this much above the entitlement counts as too high, in percent; a
/// shrink ends in the middle of this band, so that it is no reason to grow again.
pub const BAND_PERCENT: u64 = 3;

/// Pieces smaller than this are not granted or taken one by one.
pub const PIECE: Bytes = Bytes::mib(4);

/// A report older than this many ticks is stale.
pub const STALE_TICKS: u32 = 3;

/// A report younger than this is fresh however short the tick is: guests are
/// asked for statistics once a second.
pub const FRESH: Duration = Duration::from_secs(3);

/// One VM: what it says, and what is remembered of it.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Tells VMs apart and breaks ties; unique.
    pub id: u64,
    /// How long it has run.
    pub uptime: Duration,
    /// Whether it answered this tick; if not, `said` is what it said last.
    pub answers: bool,
    /// What it said.
    pub said: Said,
    memory: Memory,
}

/// What the policy remembers of one VM between ticks.
#[derive(Clone, Debug, Default)]
struct Memory {
    demand: Demand,
    watch: Watch,
    grown: Option<Moved>,
    shrunk: Option<Moved>,
    refilled_from: Option<Duration>,
    /// Found stuck in this very round, which has its decision already.
    just_stuck: bool,
    standing: Standing,
    charge: Bytes,
    need: Bytes,
    entitlement: Bytes,
}

/// When a target was last moved one way, and what the guest was held to use then.
#[derive(Clone, Copy, Debug)]
struct Moved {
    at: Duration,
    held: Bytes,
}

impl Vm {
    /// A VM that was just found.
    pub fn new(id: u64, uptime: Duration, said: Said) -> Self {
        Self { id, uptime, answers: true, said, memory: Memory::default() }
    }

    /// How it stood at the last decision.
    pub fn standing(&self) -> Standing {
        self.memory.standing
    }

    /// What it was charged at the last decision.
    pub fn charge(&self) -> Bytes {
        self.memory.charge
    }

    /// What its guest uses, as far as it ever said.
    pub fn used(&self) -> Option<Bytes> {
        self.memory.demand.used()
    }

    /// Its use with its buffer, within its limits, at the last decision.
    pub fn demand(&self) -> Bytes {
        self.memory.need
    }

    /// What it might have had at the last decision.
    pub fn entitlement(&self) -> Bytes {
        self.memory.entitlement
    }

    /// Takes in what it said, and tells how it stands. True if it was just found stuck.
    fn look(&mut self, now: Duration, settings: &Settings) -> bool {
        let Settings { tick, guards, .. } = settings;
        let said = &self.said;
        let memory = &mut self.memory;
        memory.just_stuck = false;
        if !self.answers {
            memory.standing = Standing::NotAnswering;
            memory.charge = guards::charge(memory.standing, said);
            return false;
        }
        memory.demand.has(now, said.actual);
        let mut fresh = false;
        if let Some((age, spare)) = said.spare {
            fresh = age <= FRESH.max(*tick * STALE_TICKS);
            if fresh {
                memory.demand.report(now, now.saturating_sub(age), spare, guards.demand_is_held);
            }
        }
        let stuck = memory.watch.look(now, said) && guards.stuck_are_left_alone;
        memory.standing = if !said.limits.is_dynamic() {
            Standing::Static
        } else if said.driver == DriverState::Absent {
            if self.uptime < guards::BOOT { Standing::Booting } else { Standing::NoDriver }
        } else if stuck || (memory.watch.is_resting(now) && guards.stuck_are_left_alone) {
            Standing::Stuck
        } else if !memory.watch.is_settled() && self.uptime < guards::BOOT {
            Standing::Booting
        } else if (fresh && said.driver == DriverState::Active) || !guards.stale_are_held {
            Standing::Following
        } else {
            Standing::Stale
        };
        memory.just_stuck = stuck && memory.standing == Standing::Stuck;
        memory.charge = guards::charge(memory.standing, said);
        memory.need = memory.demand.need(&said.limits);
        memory.just_stuck
    }

    /// Whether it must have at least its charge in any sharing: it can't or must not be shrunk.
    fn is_held(&self) -> bool {
        self.memory.standing != Standing::Following
    }

    /// Whether a new target can reach the guest.
    fn takes_targets(&self) -> bool {
        self.memory.standing.is_movable() && self.said.driver != DriverState::Absent
    }

    fn claim(&self, index: usize) -> Claim {
        let limits = &self.said.limits;
        let floor = if self.is_held() { self.memory.charge } else { limits.min() };
        let want = if self.used().is_some() { self.memory.need } else { self.said.target };
        let range = limits.max().saturating_sub(limits.min()).pages();
        Claim {
            id: self.id,
            index,
            floor: floor.pages(),
            want: want.pages(),
            share: if self.takes_targets() { u128::from(range.0) * u128::from(limits.weight()) } else { 0 },
            given: Pages::default(),
        }
    }

    /// Whether it was shrunk a short time ago and its use has not risen since.
    fn rests_shrunk(&self, now: Duration, rest: Duration) -> bool {
        self.memory.shrunk.is_some_and(|moved| {
            now.saturating_sub(moved.at) < rest
                && self.memory.demand.held() <= moved.held.percent(100 + guards::STEADY_PERCENT)
        })
    }

    /// Whether it was grown a short time ago and its use has not fallen since.
    fn rests_grown(&self, now: Duration, rest: Duration) -> bool {
        self.memory.grown.is_some_and(|moved| {
            now.saturating_sub(moved.at) < rest
                && self.memory.demand.held() >= moved.held.percent(100 - guards::STEADY_PERCENT)
        })
    }

    /// How far the target lies below what it may have, where that is worth moving.
    fn gap(&self, now: Duration, settings: &Settings) -> Bytes {
        let Said { target, limits, .. } = self.said;
        let mut may = self.memory.entitlement;
        if self.is_held() {
            // It is entitled to what it holds, which is no reason to call a shrink under way back.
            may = may.min(self.memory.need);
        }
        if settings.guards.moves_rest && self.rests_shrunk(now, settings.rest) {
            may = may.min(self.memory.demand.bare(&limits));
        }
        let gap = may.saturating_sub(target);
        // Use is capped by what the guest has: one with little left must not wait for a wide gap.
        let used = self.used().unwrap_or_default();
        let half_the_buffer = Bytes(self.memory.need.saturating_sub(used).0 / 2);
        let pressed = target < used.saturating_add(half_the_buffer) && gap >= PIECE;
        if target < limits.min() || pressed || gap > deadband(target) { gap } else { Bytes::ZERO }
    }

    /// How far it may be shrunk, by the band and the floors.
    fn surplus(&self, now: Duration, state: HostState, dwelt: bool, settings: &Settings) -> Bytes {
        let guards = &settings.guards;
        let Said { target, limits, .. } = self.said;
        if guards.moves_rest && state < HostState::Hard && self.rests_grown(now, settings.rest) {
            return Bytes::ZERO;
        }
        if self.is_held() || self.used().is_none() {
            return Bytes::ZERO;
        }
        let band = DEADBAND.max(target.percent(BAND_PERCENT));
        let most = self.memory.entitlement;
        if target <= most.saturating_add(band) {
            return Bytes::ZERO;
        }
        let used = self.used().unwrap_or(target);
        let floor =
            if guards.use_is_spared { guards::floor(state, dwelt, used, target) } else { Bytes::ZERO };
        let lowest = limits.clamp(most.saturating_add(Bytes(band.0 / 2)).max(floor));
        target.saturating_sub(lowest).min(guards::step(&self.said)).page_floor()
    }

    /// What it was asked to give up and still has.
    fn owes(&self) -> Bytes {
        match self.memory.standing {
            Standing::Following | Standing::Stale => self.said.actual.saturating_sub(self.said.target),
            _ => Bytes::ZERO,
        }
    }

    fn decide(&mut self, state: HostState, rule: Rule, new: Bytes, decisions: &mut Vec<Decision>) {
        let old = self.said.target;
        let reason = Reason {
            used: self.used(),
            demand: self.memory.need,
            entitlement: self.memory.entitlement,
            state,
            rule,
            old,
            new,
        };
        decisions.push(Decision { vm: self.id, reason });
    }
}

fn deadband(target: Bytes) -> Bytes {
    DEADBAND.max(target.percent(DEADBAND_PERCENT))
}

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

/// The law, and the little it remembers about the host.
#[derive(Debug, Default)]
pub struct Policy {
    settings: Settings,
    state: HostState,
    emergency: Option<Duration>,
    claims: Vec<Claim>,
    order: Vec<(Bytes, usize)>,
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
    /// Fills `decisions` with at most one for each VM and does not change `said`:
    /// the caller sets the targets and says next time what became of them.
    ///
    /// It is called once a tick, and may be called at any moment in between, when a guest
    /// pushes that it is in distress: with all VMs as they were last seen, and that one's
    /// news in its `said`. All guards count time, not calls, so that such a round serves
    /// who is in need and otherwise decides nothing that the next tick would not.
    pub fn decide(
        &mut self,
        now: Duration,
        host: Host,
        vms: &mut [Vm],
        decisions: &mut Vec<Decision>,
    ) -> Balance {
        decisions.clear();
        for vm in vms.iter_mut() {
            if vm.look(now, &self.settings) {
                let actual = vm.said.limits.clamp(vm.said.actual);
                vm.memory.watch.let_go();
                vm.memory.entitlement = actual;
                vm.decide(self.state, Rule::Stuck, actual, decisions);
            }
        }
        let charged: Bytes = vms.iter().map(Vm::charge).sum();
        let free = host.budget.saturating_sub(charged);
        let pool = host.budget.percent(self.settings.pool_percent);
        self.state = self.state.next(free, pool);
        if self.state != HostState::Emergency {
            self.emergency = None;
        }
        let since = *self.emergency.get_or_insert(now);
        let dwelt =
            self.state == HostState::Emergency && now.saturating_sub(since) >= guards::EMERGENCY_DWELL;

        self.entitle(host.budget.saturating_sub(pool), vms);
        let (left, unserved) = self.grow(now, free, vms, decisions);
        let owed: Bytes = vms.iter().map(Vm::owes).sum();
        let over = charged.saturating_sub(host.budget);
        let refill = pool.saturating_add(over).saturating_sub(left);
        let short = unserved.saturating_add(refill).saturating_sub(owed);
        self.shrink(now, Shortage { short, unserved, dwelt }, vms, decisions);
        Balance { charged, free, over, unserved, state: self.state }
    }

    /// What each VM may have: first what everyone needs, then, if all of that fits, their comfort.
    fn entitle(&mut self, capacity: Bytes, vms: &mut [Vm]) {
        self.claims.clear();
        self.claims.extend(vms.iter().enumerate().map(|(index, vm)| vm.claim(index)));
        if divide(&mut self.claims, capacity.pages()) {
            for claim in &mut self.claims {
                let vm = &vms[claim.index];
                claim.floor = claim.given;
                if vm.used().is_some() && !vm.is_held() {
                    claim.want = vm.memory.demand.comfort(&vm.said.limits).pages();
                }
            }
            divide(&mut self.claims, capacity.pages());
        }
        for claim in &self.claims {
            vms[claim.index].memory.entitlement = claim.given.bytes();
        }
    }

    /// Grants what is free, the largest relative gap first. Returns what is left and what was not served.
    fn grow(
        &mut self,
        now: Duration,
        free: Bytes,
        vms: &mut [Vm],
        decisions: &mut Vec<Decision>,
    ) -> (Bytes, Bytes) {
        self.order.clear();
        for (index, vm) in vms.iter().enumerate() {
            let gap = vm.gap(now, &self.settings);
            if gap > Bytes::ZERO && vm.takes_targets() && !vm.memory.just_stuck {
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
            let Said { target, limits, .. } = vm.said;
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
            vm.memory.grown = Some(Moved { at: now, held: vm.memory.demand.held() });
            let rule = if target < limits.min() { Rule::Limits } else { Rule::Grow };
            vm.decide(self.state, rule, new, decisions);
        }
        (left, unserved)
    }

    /// Takes what is short from those that have more than they may, the largest surplus first.
    fn shrink(&mut self, now: Duration, shortage: Shortage, vms: &mut [Vm], decisions: &mut Vec<Decision>) {
        let Shortage { mut short, unserved, dwelt } = shortage;
        let paying = unserved > Bytes::ZERO;
        self.order.clear();
        let mut total = Bytes::ZERO;
        for (index, vm) in vms.iter_mut().enumerate() {
            if vm.said.target > vm.said.limits.max() && vm.takes_targets() {
                let max = vm.said.limits.max();
                vm.decide(self.state, Rule::Limits, max, decisions);
                continue;
            }
            let mut surplus = vm.surplus(now, self.state, dwelt, &self.settings);
            if !paying {
                surplus = self.unhurried(now, vm, surplus);
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
            vm.memory.shrunk = Some(Moved { at: now, held: vm.memory.demand.held() });
            if !paying {
                vm.memory.refilled_from = Some(now);
            }
            vm.decide(self.state, rule, new, decisions);
        }
    }

    /// What may be taken of `surplus` when nobody is short and only the pool is refilled.
    fn unhurried(&self, now: Duration, vm: &Vm, surplus: Bytes) -> Bytes {
        let since = |then: Option<Duration>| then.map_or(Duration::MAX, |then| now.saturating_sub(then));
        if self.state < HostState::Hard
            && since(vm.memory.grown.map(|moved| moved.at)) < guards::REST_AFTER_GROW
        {
            return Bytes::ZERO;
        }
        if self.state > HostState::Normal {
            return surplus;
        }
        if since(vm.memory.refilled_from) < guards::UNHURRIED {
            return Bytes::ZERO;
        }
        Bytes(surplus.0 / guards::UNHURRIED_PART).max(DEADBAND).min(surplus)
    }
}

/// What is to be taken from guests in one round.
#[derive(Clone, Copy)]
struct Shortage {
    /// All of it.
    short: Bytes,
    /// What others are waiting for.
    unserved: Bytes,
    /// Whether an emergency has lasted.
    dwelt: bool,
}

#[cfg(test)]
mod tests;
