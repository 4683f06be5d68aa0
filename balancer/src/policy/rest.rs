//! How one guest was moved last, and how long it rests from that.

use std::time::Duration;

use api::units::Bytes;

use super::Observation;
use super::demand::{Demand, FORECAST_HORIZON, RISE_PERCENT};
use super::guards::{STEADY_PERCENT, STILL_PERCENT, TURN};

/// Use above this part of what a guest has, in percent, can't be seen to rise: it does not tell whether the
/// guest stands still.
const SEEN_PERCENT: u64 = 94;

/// The last moves of one guest.
#[derive(Clone, Debug, Default)]
pub(super) struct Rest {
    grown: Option<Grown>,
    shrunk: Option<Shrunk>,
    refilled_from: Option<Duration>,
}

/// When a target was last raised, and the use that it was raised for.
#[derive(Clone, Copy, Debug)]
struct Grown {
    at: Duration,
    used: Bytes,
}

/// When a target was last lowered, what the guest used then, and what it was held to use.
#[derive(Clone, Copy, Debug)]
struct Shrunk {
    at: Duration,
    /// When the guest was last seen on its way there.
    arrives: Duration,
    used: Bytes,
    peak_hold: Bytes,
    /// Whether it was left what it used.
    spared: bool,
}

impl Shrunk {
    /// Whether a report tells what was used when the move was made. The report that led to it is older, and
    /// nobody knows the use exactly while memory moves.
    fn is_told(&self, reported: Duration) -> bool {
        (self.at..self.arrives + FORECAST_HORIZON).contains(&reported)
    }
}

impl Rest {
    /// Notes that it is grown.
    pub fn grows(&mut self, now: Duration, demand: &Demand) {
        self.grown = Some(Grown { at: now, used: demand.used().unwrap_or_default() });
    }

    /// Notes that it is shrunk to `target`; `hurried` where another VM waits for it.
    pub fn shrinks(&mut self, now: Duration, demand: &Demand, target: Bytes, hurried: bool) {
        let (used, peak_hold) = (demand.used().unwrap_or_default(), demand.peak_hold());
        self.shrunk = Some(Shrunk { at: now, arrives: now, used, peak_hold, spared: used < target });
        if !hurried {
            self.refilled_from = Some(now);
        }
    }

    /// Takes in what a report tells of the last shrink: use may have risen while memory went.
    pub fn learn(&mut self, now: Duration, observed: &Observation, demand: &Demand, reported: Duration) {
        let used = demand.used().unwrap_or_default();
        if let Some(shrunk) = &mut self.shrunk {
            if observed.actual > observed.target {
                shrunk.arrives = now;
            }
            if shrunk.is_told(reported) {
                let used = used.min(observed.target.percent(SEEN_PERCENT));
                shrunk.used = shrunk.used.max(used);
                shrunk.peak_hold = shrunk.peak_hold.max(used);
            }
        }
    }

    /// Whether it was shrunk within `rest` and its use has not risen since.
    pub fn after_shrink(&self, now: Duration, rest: Duration, demand: &Demand) -> bool {
        self.shrunk.is_some_and(|Shrunk { at, peak_hold, .. }| {
            is_within(now, at, rest) && demand.peak_hold() <= peak_hold.percent(100 + STEADY_PERCENT)
        })
    }

    /// Whether it was grown within `rest` and its use has not fallen below what it was grown for.
    pub fn after_grow(&self, now: Duration, rest: Duration, demand: &Demand) -> bool {
        self.grown.is_some_and(|Grown { at, used }| {
            is_within(now, at, rest) && demand.peak_hold() >= used.percent(100 - STEADY_PERCENT)
        })
    }

    /// Whether it was shrunk so recently that growing it would be a move back.
    pub fn just_shrunk(&self, now: Duration, rest: Duration) -> bool {
        self.shrunk.is_some_and(|shrunk| is_within(now, shrunk.at, rest.min(TURN)))
    }

    /// Whether it uses no more than when it was last shrunk. A rise hardly shows where little was left. But a
    /// guest that was left what it used, and has waited for some seconds, uses more.
    pub fn stands_still(&self, demand: &Demand) -> bool {
        let used = demand.used().unwrap_or_default();
        self.shrunk.is_some_and(|shrunk| {
            let waits = shrunk.spared && demand.waits_on();
            let still = if waits { RISE_PERCENT } else { STILL_PERCENT };
            used <= shrunk.used.percent(100 + still)
        })
    }

    /// How long ago it was grown.
    pub fn since_grow(&self, now: Duration) -> Duration {
        since(now, self.grown.map(|grown| grown.at))
    }

    /// How long ago the pool was last refilled from it.
    pub fn since_refill(&self, now: Duration) -> Duration {
        since(now, self.refilled_from)
    }
}

fn is_within(now: Duration, then: Duration, rest: Duration) -> bool {
    now.saturating_sub(then) < rest
}

fn since(now: Duration, then: Option<Duration>) -> Duration {
    then.map_or(Duration::MAX, |then| now.saturating_sub(then))
}
