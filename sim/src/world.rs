//! Guests, demand and one law on one host, step by step.

use std::time::Duration;

use api::units::Bytes;

use super::faults::Fault;
use super::guest::Guest;
use super::laws::{Law, Seen, View};
use super::score::{Score, Turns};
use super::trace::{Series, Trace};
use super::{Reports, STEP, Setup};

/// What happens before this is not scored: every law first has to get from an
/// equal start to where it wants to be.
pub const WARM_UP: Duration = Duration::from_secs(120);

/// A VM whose start finds no room after this long is started all the same.
pub const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// The state of the world at one moment, for those who draw it.
#[derive(Clone, Debug, Default)]
pub struct Moment {
    /// When.
    pub now: Duration,
    /// For each running VM: index, what it demands, what it has.
    pub vms: Vec<(usize, Bytes, Bytes)>,
    /// What all may hold.
    pub held: Bytes,
}

struct Place<'a> {
    series: &'a Series,
    guest: Option<Guest>,
    fault: Option<Fault>,
    turns: Turns,
    over: bool,
    stalled: bool,
    /// When it last asked to be started.
    asked: Duration,
}

/// Runs `law` over `trace`. `watch` sees the world once a second.
pub fn run(trace: &Trace, setup: &Setup, law: &mut dyn Law, watch: &mut dyn FnMut(&Moment)) -> Score {
    World::new(trace, setup).run(law, watch)
}

struct World<'a> {
    setup: &'a Setup,
    places: Vec<Place<'a>>,
    waiting: Vec<usize>,
    seconds: u64,
    score: Score,
}

impl<'a> World<'a> {
    fn new(trace: &'a Trace, setup: &'a Setup) -> Self {
        let budget = setup.host.budget();
        let at_once = trace.vms.iter().filter(|series| series.starts == 0);
        let sizes: Bytes = at_once.map(|series| series.limits.max()).sum();
        let places = trace
            .vms
            .iter()
            .enumerate()
            .map(|(index, series)| {
                let fault = setup.faults.get(index).copied();
                // All laws begin with the same: the budget less a twentieth, by size.
                let share = u128::from(budget.0) * 95 / 100 * u128::from(series.limits.max().0)
                    / u128::from(sizes.0.max(1));
                let share = series.limits.clamp(Bytes(u64::try_from(share).unwrap_or(u64::MAX)));
                let guest = (series.starts == 0)
                    .then(|| Guest::running(series.limits, share, fault, index).growing_by(setup.grow));
                let turns = Turns::default();
                Place { series, guest, fault, turns, over: false, stalled: false, asked: Duration::ZERO }
            })
            .collect();
        Self { setup, places, waiting: Vec::new(), seconds: trace.seconds, score: Score::default() }
    }

    fn run(mut self, law: &mut dyn Law, watch: &mut dyn FnMut(&Moment)) -> Score {
        let steps = Duration::from_secs(self.seconds).as_millis() / STEP.as_millis();
        let mut next = Duration::ZERO;
        let (mut seen, mut targets, mut moment) = (Vec::new(), Vec::new(), Moment::default());
        for step in 0..steps as u32 {
            let now = STEP * step;
            self.start_and_end(now);
            self.live(now, law.is_refused_what_is_not_there());
            if now >= next {
                next = now + law.cadence();
                if self.setup.reports == Reports::Asked {
                    self.ask(now);
                }
                self.decide(now, law, &mut seen, &mut targets);
            }
            self.judge(now);
            if now.subsec_millis() == 0 {
                self.show(now, &mut moment);
                watch(&moment);
            }
        }
        self.score
    }

    fn held(&self) -> Bytes {
        self.places.iter().filter_map(|place| place.guest.as_ref()).map(Guest::holds).sum()
    }

    fn promised(&self) -> Bytes {
        self.places
            .iter()
            .filter_map(|place| place.guest.as_ref())
            .map(|guest| guest.holds().max(guest.target))
            .sum()
    }

    fn reserved(&self) -> Bytes {
        self.waiting.iter().map(|&index| self.places[index].series.limits.startup()).sum()
    }

    fn start_and_end(&mut self, now: Duration) {
        for (index, place) in self.places.iter_mut().enumerate() {
            let Series { starts, ends, .. } = *place.series;
            if place.guest.is_some() && ends.is_some_and(|end| now >= Duration::from_secs(end)) {
                place.guest = None;
                place.over = true;
            }
            let dead = place.fault.is_some_and(|fault| fault.is_dead(now));
            if dead && place.guest.take().is_some() {
                (place.turns, place.stalled) = (Turns::default(), false);
            }
            let due = now == Duration::from_secs(starts) && starts > 0;
            let again = place.fault == Some(Fault::Dying) && now >= Duration::from_secs(starts);
            let waits = self.waiting.contains(&index);
            if place.guest.is_none() && !place.over && !dead && !waits && (due || again) {
                place.asked = now;
                self.waiting.push(index);
            }
        }
        while let Some(&index) = self.waiting.first() {
            let Place { series: Series { limits, .. }, asked, .. } = self.places[index];
            let room = self.setup.host.budget().saturating_sub(self.promised());
            let waited = now.saturating_sub(asked);
            if room < limits.startup() && waited < LONGEST_WAIT {
                self.score.waited += self.waiting.len() as u64;
                return;
            }
            let place = &mut self.places[index];
            place.guest = Some(Guest::starting(*limits, limits.startup(), place.fault, self.setup.grow, now));
            self.waiting.remove(0);
        }
    }

    fn live(&mut self, now: Duration, refused: bool) {
        let mut room = self.setup.host.budget().saturating_sub(self.held());
        for place in &mut self.places {
            let Some(guest) = &mut place.guest else { continue };
            let demand = place.series.at(now);
            place.turns.demand(guest.wants(now, demand));
            let room = refused.then_some(&mut room);
            let happened = guest.step(now, demand, place.series.cache, &self.setup.speeds, room);
            guest.tell(now, place.series.commit_percent, happened.stalled);
            place.stalled = happened.stalled;
            if now < WARM_UP {
                continue;
            }
            if place.fault.is_some() {
                self.score.faulty_stalled += u64::from(happened.stalled);
                continue;
            }
            self.score.steps += 1;
            self.score.stalled += u64::from(happened.stalled);
            self.score.killed += u64::from(happened.killed);
            self.score.churn += happened.moved;
        }
    }

    /// Has each guest tell of itself that has the time to.
    fn ask(&mut self, now: Duration) {
        for place in self.places.iter_mut().filter(|place| !place.stalled) {
            if let Some(guest) = &mut place.guest {
                guest.answer(now, place.series.commit_percent);
            }
        }
    }

    fn decide(
        &mut self,
        now: Duration,
        law: &mut dyn Law,
        seen: &mut Vec<Seen>,
        targets: &mut Vec<(usize, Bytes)>,
    ) {
        seen.clear();
        for (index, place) in self.places.iter().enumerate() {
            let Some(guest) = &place.guest else { continue };
            seen.push(Seen {
                id: index,
                limits: guest.limits,
                target: guest.target,
                actual: guest.actual,
                resident: guest.resident,
                driver: guest.driver,
                answers: place.fault.is_none_or(|fault| fault.answers(now)),
                uptime: now.saturating_sub(guest.started),
                report: guest.report,
            });
        }
        targets.clear();
        let budget = self.setup.host.budget();
        law.decide(&View { now, budget, reserved: self.reserved(), vms: seen }, targets);
        for &(index, target) in targets.iter() {
            let place = &mut self.places[index];
            let Some(guest) = &mut place.guest else { continue };
            if place.fault.is_some_and(|fault| !fault.answers(now)) {
                continue;
            }
            let target = guest.limits.clamp(target);
            if target == guest.target {
                continue;
            }
            // A guest is told to keep what it was asked for and has not given, or not to take what it was
            // granted and never had: nothing moves back.
            let called_back = (target > guest.target && target <= guest.actual)
                || (target < guest.target && target >= guest.actual);
            let wants = guest.wants(now, place.series.at(now));
            let turned = !called_back && place.turns.moved(now, guest.target, target, wants);
            guest.target = target;
            if now >= WARM_UP && place.fault.is_none() {
                self.score.decisions += 1;
                self.score.reversals += u64::from(turned);
            }
        }
    }

    fn judge(&mut self, now: Duration) {
        if now < WARM_UP {
            return;
        }
        let over = self.held().saturating_sub(self.setup.host.budget());
        self.score.over_budget += u64::from(over > Bytes::ZERO);
        self.score.worst_over = self.score.worst_over.max(over);
        let resident: Bytes =
            self.places.iter().filter_map(|place| place.guest.as_ref()).map(|guest| guest.resident).sum();
        if resident > self.setup.host.total {
            // The host swaps: everyone waits. Those who waited anyway are counted already.
            self.score.host_full += 1;
            let more = self
                .places
                .iter()
                .filter(|place| place.guest.is_some() && !place.stalled && place.fault.is_none());
            self.score.stalled += more.count() as u64;
        }
    }

    fn show(&self, now: Duration, moment: &mut Moment) {
        moment.now = now;
        moment.held = self.held();
        moment.vms.clear();
        for (index, place) in self.places.iter().enumerate() {
            if let Some(guest) = &place.guest {
                moment.vms.push((index, place.series.at(now), guest.actual));
            }
        }
    }
}
