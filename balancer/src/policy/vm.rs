//! One VM: what it says, what is remembered of it, and how far it may be moved.

use std::time::Duration;

use api::status::{DriverState, Pauser};
use api::units::{Bytes, Pages};

use super::demand::{Demand, Follow, News};
use super::entitlement::Claim;
use super::guards::{self, ShrinkWatch, Standing};
use super::host_state::HostState;
use super::reason::{Decision, Reason, Rule};
use super::rest::Rest;
use super::{Guards, Observation, Settings, Vcpus};

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
    /// Whether it answered this tick; if not, `observed` is what it said last.
    pub answers: bool,
    /// What it said.
    pub observed: Observation,
    memory: Memory,
}

/// What the policy remembers of one VM between ticks.
#[derive(Clone, Debug, Default)]
struct Memory {
    demand: Demand,
    shrink_watch: ShrinkWatch,
    rest: Rest,
    /// Found stuck in this very round, which has its decision already.
    just_stuck: bool,
    /// The policy had it paused, and has not had it resumed.
    paused_by_balancer: bool,
    /// Who had paused it when it was last seen.
    paused_by: Option<Pauser>,
    standing: Standing,
    charge: Bytes,
    /// Its guest once touched what it had said not to manage.
    overran: bool,
    need: Bytes,
    entitlement: Bytes,
    /// What it would have if all claimed all there is.
    share: Bytes,
    /// For how long it needed more than that. Time in which it needed clearly less is taken off, in part.
    borrowed: Duration,
    /// When that was last brought up to date.
    shared: Option<Duration>,
    /// What of its need is within its fair share, while not everyone's need fits.
    assured: Bytes,
}

/// How a VM is looked at in one round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round<'a> {
    pub now: Duration,
    pub state: HostState,
    /// Another VM waits for memory.
    pub paying: bool,
    /// An emergency has lasted.
    pub lasts: bool,
    pub settings: &'a Settings,
}

/// How far a target lies below what the VM may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gap {
    /// All of it.
    pub whole: Bytes,
    /// What of it can't wait.
    pub urgent: Bytes,
    /// What of it is granted.
    pub given: Bytes,
}

impl Vm {
    /// A VM that was just found.
    pub fn new(id: u64, uptime: Duration, observed: Observation) -> Self {
        Self { id, uptime, answers: true, observed, memory: Memory::default() }
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

    /// Its use with its buffer, and what it lacks or is about to, within its limits, at the last decision.
    pub fn demand(&self) -> Bytes {
        self.memory.need
    }

    /// What it might have had at the last decision.
    pub fn entitlement(&self) -> Bytes {
        self.memory.entitlement
    }

    /// Takes in what it said, and tells how it stands. True if it was just found stuck.
    pub(super) fn look(&mut self, now: Duration, settings: &Settings) -> bool {
        let Settings { tick, guards, .. } = settings;
        let observed = &self.observed;
        let memory = &mut self.memory;
        memory.just_stuck = false;
        let paused_by = observed.vcpus.paused_by();
        if !self.answers || paused_by.is_some() {
            memory.standing = if self.answers { Standing::Paused } else { Standing::NotAnswering };
            match (memory.paused_by, paused_by) {
                (_, Some(Pauser::Balancer)) => memory.paused_by_balancer = true,
                // An operator took the pause over, or a disk did.
                (Some(Pauser::Balancer), Some(Pauser::Operator | Pauser::Disk)) => {
                    memory.paused_by_balancer = false
                }
                _ => {}
            }
            memory.paused_by = paused_by.or(memory.paused_by);
            // Whoever else paused it may let it run on at any moment.
            let as_if = if memory.paused_by_balancer { memory.standing } else { Standing::NotAnswering };
            self.charge_as(as_if);
            return false;
        }
        if memory.paused_by.take().is_some() {
            memory.paused_by_balancer = false;
        }
        memory.demand.has(now.saturating_sub(observed.since), observed.actual);
        let mut fresh = false;
        if let Some(news) = News::of(now, observed) {
            fresh = now.saturating_sub(news.reported) <= FRESH.max(*tick * STALE_TICKS);
            if fresh {
                let follow = Follow {
                    hold: guards.peaks_are_held,
                    distress: guards.distress_counts,
                    rises: guards.rises_are_forecast,
                };
                memory.demand.report(now, &news, follow);
                memory.rest.learn(now, observed, &memory.demand, news.reported);
            }
        }
        let stuck = memory.shrink_watch.look(now, observed) && guards.stuck_are_left_alone;
        memory.standing = if !observed.limits.is_dynamic() {
            Standing::Static
        } else if observed.driver == DriverState::Absent {
            if memory.shrink_watch.is_leaving(now) {
                Standing::Leaving
            } else if self.uptime < guards::BOOT {
                Standing::Booting
            } else {
                Standing::NoDriver
            }
        } else if stuck || (memory.shrink_watch.is_resting(now) && guards.stuck_are_left_alone) {
            Standing::Stuck
        } else if !memory.shrink_watch.is_settled() && self.uptime < guards::BOOT {
            Standing::Booting
        } else if (fresh && observed.driver == DriverState::Active) || !guards.stale_are_held {
            Standing::Following
        } else {
            Standing::Stale
        };
        memory.just_stuck = stuck && memory.standing == Standing::Stuck;
        memory.need = memory.demand.need(&observed.limits);
        self.charge_as(self.memory.standing);
        self.memory.just_stuck
    }

    /// Charges it as one that stands so.
    fn charge_as(&mut self, standing: Standing) {
        self.memory.overran |= guards::is_overrun(&self.observed);
        self.memory.charge = self.charge_of(standing);
    }

    fn charge_of(&self, standing: Standing) -> Bytes {
        let charge = guards::charge(standing, &self.observed);
        if self.memory.overran && standing != Standing::Paused {
            let Observation { target, actual, .. } = self.observed;
            charge.max(target.max(actual).saturating_add(self.beside()))
        } else {
            charge
        }
    }

    /// What it is charged beside its target: what its guest does not manage, where it was seen to touch that.
    pub(super) fn beside(&self) -> Bytes {
        if self.memory.overran { self.observed.unmanaged } else { Bytes::ZERO }
    }

    /// Whether it must have at least its charge in any sharing: it can't or must not be shrunk.
    fn is_fixed(&self) -> bool {
        self.memory.standing != Standing::Following
    }

    /// Whether a new target can reach the guest.
    pub(super) fn takes_targets(&self) -> bool {
        self.memory.standing.is_movable() && self.observed.driver != DriverState::Absent
    }

    /// Whether it has its decision in this round already.
    pub(super) fn is_decided(&self) -> bool {
        self.memory.just_stuck
    }

    /// What it must have; what it has, where nobody knows.
    pub(super) fn want(&self) -> Bytes {
        if self.used().is_some() { self.memory.need } else { self.observed.target }
    }

    /// What of it can't wait.
    pub(super) fn urgent(&self) -> Bytes {
        if self.used().is_some() {
            self.memory.demand.urgent(&self.observed.limits).min(self.memory.need)
        } else {
            self.observed.target
        }
    }

    /// What it should have where nobody is short.
    pub(super) fn ample(&self) -> Bytes {
        if self.used().is_some() && !self.is_fixed() {
            self.memory.demand.ample(&self.observed.limits)
        } else {
            self.want()
        }
    }

    pub(super) fn claim(&self, index: usize) -> Claim {
        let limits = &self.observed.limits;
        let charge = self.memory.charge.saturating_sub(self.beside());
        let floor = if self.is_fixed() { charge } else { limits.min() };
        let range = limits.max().saturating_sub(limits.min()).pages();
        Claim {
            id: self.id,
            index,
            floor: floor.pages(),
            want: self.want().pages(),
            share: if self.takes_targets() { u128::from(range.0) * u128::from(limits.weight()) } else { 0 },
            given: Pages::default(),
        }
    }

    /// Notes its fair share, and for how long it could not do with that.
    pub(super) fn share(&mut self, now: Duration, share: Bytes) {
        self.memory.share = share;
        let urgent = self.urgent();
        let since = now.saturating_sub(self.memory.shared.replace(now).unwrap_or(now));
        let borrowed = &mut self.memory.borrowed;
        if urgent > share {
            *borrowed = borrowed.saturating_add(since).min(guards::LOAN);
        } else if urgent < share.percent(100 - guards::STEADY_PERCENT) {
            *borrowed = borrowed.saturating_sub(since / guards::PAID_BACK);
        }
    }

    /// What can't wait and is within its fair share.
    pub(super) fn urgent_in_share(&self) -> Bytes {
        self.urgent().min(self.memory.share)
    }

    /// What can't wait, where buffers of others may be lent for it: all that it says for a while, and then no
    /// more than the host sees it use.
    pub(super) fn borrows(&self) -> Bytes {
        if self.memory.borrowed >= guards::LOAN {
            self.urgent().min(guards::touched(&self.observed)).max(self.urgent_in_share())
        } else {
            self.urgent()
        }
    }

    /// What of its need is within its fair share.
    pub(super) fn in_share(&self) -> Bytes {
        self.want().min(self.memory.share)
    }

    /// Notes what it may have, and whether everyone's need fits.
    pub(super) fn entitle(&mut self, entitlement: Bytes, fits: bool) {
        self.memory.assured = if fits { Bytes::ZERO } else { self.in_share() };
        // One that was just found stuck keeps what it has.
        if !self.memory.just_stuck {
            self.memory.entitlement = entitlement;
        }
    }

    /// Calls back what it was asked to give up: it keeps what it has, which is returned.
    pub(super) fn let_go(&mut self) -> Bytes {
        let actual = self.observed.limits.clamp(self.observed.actual);
        self.memory.shrink_watch.let_go();
        self.memory.entitlement = actual;
        actual
    }

    /// How far the target lies below what it may have, where that is worth moving.
    pub(super) fn gap(&self, now: Duration, settings: &Settings) -> Option<Gap> {
        let Observation { target, limits, .. } = self.observed;
        // Comfort is a reason to leave memory with a guest, but not to give it more. A guest that is held is
        // entitled to what it has, which is no reason to call a shrink back.
        let mut may = self.memory.entitlement.min(self.want());
        if settings.guards.news_counts {
            may = may.min(self.memory.demand.asks(&limits));
        }
        // What it is assured of within its fair share does not wait for the ease of others. Else a guest that
        // claims all there is would keep them from their buffers.
        let mut urgent = may.min(self.urgent().max(self.memory.assured));
        if settings.guards.moves_rest {
            let Memory { demand, rest, .. } = &self.memory;
            let just_shrunk = rest.just_shrunk(now, settings.rest);
            if just_shrunk && target >= limits.min() && rest.stands_still(demand) {
                return None;
            }
            if just_shrunk || rest.after_shrink(now, settings.rest, demand) {
                may = may.min(self.urgent());
                urgent = may;
            }
        }
        // Use is capped by what the guest has: one with little left must not wait for a wide gap.
        let used = self.used().unwrap_or_default();
        let half_the_buffer = Bytes(self.memory.need.saturating_sub(used).0 / 2);
        let pressed = target < used.saturating_add(half_the_buffer);
        let worth = |gap: Bytes| {
            // The last piece up to its max never becomes larger.
            let last = target.saturating_add(gap) >= limits.max();
            let counts =
                target < limits.min() || ((pressed || last) && gap >= PIECE) || gap > deadband(target);
            if counts { gap } else { Bytes::ZERO }
        };
        let (whole, urgent) = (worth(may.saturating_sub(target)), worth(urgent.saturating_sub(target)));
        (whole > Bytes::ZERO).then_some(Gap { whole, urgent, given: Bytes::ZERO })
    }

    /// How far it may be shrunk, by the band and the floors.
    pub(super) fn surplus(&self, round: &Round) -> Bytes {
        let Observation { target, limits, .. } = self.observed;
        let Round { now, state, paying, lasts, settings } = *round;
        let (Some(used), false) = (self.used(), self.is_fixed()) else { return Bytes::ZERO };
        let rest = match state {
            HostState::Emergency => settings.rest.min(guards::TURN),
            _ => settings.rest,
        };
        if settings.guards.moves_rest && self.memory.rest.after_grow(now, rest, &self.memory.demand) {
            return Bytes::ZERO;
        }
        // Where another VM waits, the bands of all would be a pool that serves nobody.
        let band = if paying { PIECE } else { DEADBAND.max(target.percent(BAND_PERCENT)) };
        let most = self.memory.entitlement;
        if target <= most.saturating_add(band) {
            return Bytes::ZERO;
        }
        let floor = if settings.guards.use_is_spared {
            guards::floor(state, lasts, used, self.memory.demand.minimum_working_set(&limits), target)
        } else {
            Bytes::ZERO
        };
        // What nobody can judge now is not taken before the next report.
        let spared = settings.guards.uncertainty_is_spared && !lasts;
        let uncertainty = if spared { self.memory.demand.uncertainty() } else { Bytes::ZERO };
        let lowest =
            limits.clamp(most.saturating_add(Bytes(band.0 / 2)).saturating_add(uncertainty).max(floor));
        target.saturating_sub(lowest).min(guards::step(&self.observed)).page_floor()
    }

    /// What of `surplus` may be taken when nobody is short and only the pool is refilled.
    pub(super) fn unhurried(&self, round: &Round, surplus: Bytes) -> Bytes {
        let rest = &self.memory.rest;
        if round.state < HostState::Hard && rest.since_grow(round.now) < guards::REST_AFTER_GROW {
            return Bytes::ZERO;
        }
        if round.state > HostState::Normal {
            return surplus;
        }
        if rest.since_refill(round.now) < guards::UNHURRIED {
            return Bytes::ZERO;
        }
        Bytes(surplus.0 / guards::UNHURRIED_PART).max(DEADBAND).min(surplus)
    }

    /// What its guest may take back by itself: Linux opens its balloon by so much where an allocation finds
    /// nothing else (`virtballoon_oom_notify`).
    pub(super) fn slack(&self) -> Bytes {
        if self.memory.standing.is_movable() { guards::THERE } else { Bytes::ZERO }
    }

    /// Whether it has more than it was asked to have.
    pub(super) fn keeps_too_much(&self) -> bool {
        self.observed.actual > self.observed.target.saturating_add(guards::THERE)
    }

    /// What it was asked to give up, still has, and will have given up within `time`.
    pub(super) fn owes(&self, now: Duration, time: Duration, guards: &Guards) -> Bytes {
        let (actual, pending) = (self.observed.actual, self.observed.pending());
        match self.memory.standing {
            Standing::Following | Standing::Stale if guards.pace_counts => {
                self.memory.shrink_watch.gives(now, pending, actual, time)
            }
            Standing::Following | Standing::Stale => pending,
            _ => Bytes::ZERO,
        }
    }

    /// Notes that it is grown.
    pub(super) fn grows(&mut self, now: Duration) {
        self.memory.rest.grows(now, &self.memory.demand);
    }

    /// Notes that it is shrunk to `target`; `hurried` where another VM waits for it.
    pub(super) fn shrinks(&mut self, now: Duration, target: Bytes, hurried: bool) {
        self.memory.rest.shrinks(now, &self.memory.demand, target, hurried);
    }

    /// Whether its vCPUs run and it answers.
    pub(super) fn is_running(&self) -> bool {
        self.answers && self.observed.vcpus == Vcpus::Run
    }

    /// Whether it is paused, as the policy wanted.
    pub fn is_paused_by_balancer(&self) -> bool {
        self.memory.paused_by_balancer && self.memory.standing == Standing::Paused
    }

    /// What it may touch beyond what the host holds for it: what pausing it keeps from being
    /// touched, and what must be there before it is resumed.
    pub fn untouched(&self) -> Bytes {
        self.charge_of(Standing::Following).saturating_sub(self.charge_of(Standing::Paused))
    }

    /// Notes that pausing it, or resuming it, is decided.
    pub(super) fn set_paused_by_balancer(&mut self, down: bool) {
        self.memory.paused_by_balancer = down;
    }

    /// A VM that was to be paused and runs when the emergency is over need not be paused any more: a later
    /// pause is its operator's own.
    pub(super) fn forget_advice(&mut self) {
        if self.is_running() {
            self.set_paused_by_balancer(false);
        }
    }

    /// Puts the decision on record, with every number that it was made of.
    pub(super) fn decide(&self, state: HostState, rule: Rule, new: Bytes, decisions: &mut Vec<Decision>) {
        let reason = Reason {
            used: self.used(),
            demand: self.memory.need,
            entitlement: self.memory.entitlement,
            state,
            rule,
            old: self.observed.target,
            new,
        };
        decisions.push(Decision { vm: self.id, reason });
    }
}

/// How far a target of this size may lie off before it is worth moving.
pub(super) fn deadband(target: Bytes) -> Bytes {
    DEADBAND.max(target.percent(DEADBAND_PERCENT))
}
