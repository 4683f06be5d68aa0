//! What a guest needs, concluded from what it says.

use std::time::Duration;

use api::guest_memory::GuestMemory;
use api::limits::Limits;
use api::units::Bytes;

use super::observation::{Observation, Stalls};
use super::stall::{APART, Distress};

/// Short memory of use: a dip of a second or two is no reason to take anything.
pub const FAST: Duration = Duration::from_secs(5);

/// Long memory of use, honoured only where nobody is short: 88 % of published
/// bursts are over within two minutes, so what was used a minute ago is often
/// used again.
pub const SLOW: Duration = Duration::from_secs(60);

/// How far use must fall below what is held before the demand follows it down.
/// Steady use that varies by 1 % either way must not move anything.
pub const FALL_PERCENT: u64 = 4;

/// The part of its buffer that a guest can't do without, in percent of its use.
pub const MINIMUM_BUFFER_PERCENT: u64 = 5;

/// The largest such part: how fast use can rise until more is granted does not grow with the guest.
pub const MINIMUM_BUFFER_MOST: Bytes = Bytes::mib(128);

/// How far ahead rising use is followed: the age of a report, the time to the next
/// decision, and the time until the guest has what it is granted.
pub const FORECAST_HORIZON: Duration = Duration::from_secs(2);

/// How long a rise is followed after it was last seen.
pub const FORECAST_HOLD: Duration = Duration::from_secs(3);

/// A rise from one report to the next below this is none, in percent of use. Steady use
/// that varies by 1 % either way rises by 2 %.
pub const RISE_PERCENT: u64 = 2;

/// How many moments of `actual` are kept, to know what it was when a report was made.
const SAMPLES: usize = 16;

/// Moments closer than this to each other are kept as one: rounds between two ticks, of
/// which there may be many, must not push out what is as old as a report.
const SAMPLES_APART: Duration = Duration::from_millis(250);

/// A report that was made at most this long before `actual` was read tells of that `actual`: a VM that asks
/// its guest when it is asked itself answers as soon as the guest has.
const TOGETHER: Duration = Duration::from_millis(20);

/// What is remembered of one guest's use.
#[derive(Clone, Debug, Default)]
pub struct Demand {
    /// The last values of `actual` and when they were seen; a ring.
    samples: [Sample; SAMPLES],
    seen: usize,
    used: Option<Bytes>,
    fast: f64,
    slow: f64,
    last: Duration,
    peak_hold: Bytes,
    distress: Distress,
    /// The report from which a rise is measured: when it was made, and the use that it told.
    measured: Sample,
    committed: Option<Bytes>,
    /// How far use was rising by the newest report.
    forecast: Bytes,
    /// The farthest that it was for a while, and when that was last seen.
    peak_forecast: Sample,
    uncertainty: Bytes,
}

/// Which parts of a report are followed.
#[derive(Clone, Copy, Debug)]
pub struct Follow {
    /// Small falls are not.
    pub hold: bool,
    /// Distress is.
    pub distress: bool,
    /// Rises are.
    pub rises: bool,
}

/// One report, as the demand is concluded from it.
#[derive(Clone, Copy, Debug, Default)]
pub struct News {
    /// When the guest made it.
    pub reported: Duration,
    /// What it had then; `None` where its VMM does not tell.
    pub had: Option<Bytes>,
    /// What it could spare.
    pub spare: Bytes,
    /// How it waits.
    pub stalls: Stalls,
    /// It took pages back of its balloon rather than run out of memory.
    pub ran_out: bool,
    /// What it has promised its programs.
    pub committed: Option<Bytes>,
}

impl News {
    /// What `observed` tells at `now`; `None` where the guest never told what it could spare.
    pub fn of(now: Duration, observed: &Observation) -> Option<Self> {
        let GuestMemory { age, had, spare, .. } = observed.guest?;
        let Observation { stalls, ran_out, committed, .. } = *observed;
        Some(Self { reported: now.saturating_sub(age), had, spare, stalls, ran_out, committed })
    }
}

impl Demand {
    /// Takes in that the guest had `actual` when it was looked at, at `now` or a moment before.
    pub fn has(&mut self, now: Duration, actual: Bytes) {
        let before = self.seen.checked_sub(2).map(|seen| self.samples[seen % SAMPLES].0);
        if before.is_some_and(|before| now.saturating_sub(before) < SAMPLES_APART) {
            self.seen -= 1;
        }
        self.samples[self.seen % SAMPLES] = (now, actual);
        self.seen += 1;
    }

    /// Takes in a report. `follow` comes from [`super::Guards`]: whether small falls are not followed, and
    /// whether distress and rises are.
    pub fn report(&mut self, now: Duration, news: &News, follow: Follow) {
        let (had, most) = self.had(news, follow.hold);
        self.uncertainty = most.saturating_sub(had);
        let used = had.saturating_sub(news.spare);
        if follow.distress {
            self.distress.look(now, news, had);
        }
        if follow.rises {
            self.rise(now, used, news);
        }
        let value = used.0 as f64;
        let fall = |tau: Duration| (-now.saturating_sub(self.last).as_secs_f64() / tau.as_secs_f64()).exp();
        if self.used.is_none() {
            (self.fast, self.slow) = (value, value);
        } else {
            let (fast, slow) = (fall(FAST), fall(SLOW));
            self.fast = value + (self.fast - value) * fast;
            self.slow = value + (self.slow - value) * slow;
        }
        self.last = now;
        self.used = Some(used);
        let need = used.max(Bytes(self.fast as u64));
        if need > self.peak_hold || need < self.peak_hold.percent(100 - FALL_PERCENT) || !follow.hold {
            self.peak_hold = need;
        }
    }

    /// Rising use is followed to where it will be when the guest has what it is granted.
    fn rise(&mut self, now: Duration, used: Bytes, news: &News) {
        let (seen, _) = self.peak_forecast;
        if now.saturating_sub(seen) > FORECAST_HOLD {
            self.peak_forecast = (seen, Bytes::ZERO);
        }
        let (then, before) = self.measured;
        let since = news.reported.saturating_sub(then);
        if self.used.is_none() {
            self.measured = (news.reported, used);
            return;
        }
        if since < APART {
            return;
        }
        self.measured = (news.reported, used);
        let rise = used.saturating_sub(before);
        let forecast = rise.0 as f64 * FORECAST_HORIZON.as_secs_f64() / since.as_secs_f64();
        // What programs were just promised is a hint of what they will use: a small one,
        // as many never do.
        let promised = match (self.committed, news.committed) {
            (Some(before), Some(now)) => now.saturating_sub(before).min(Bytes(used.0 / 4)),
            _ => Bytes::ZERO,
        };
        self.committed = news.committed;
        let least = used.percent(RISE_PERCENT);
        let forecast = if rise > least { Bytes(forecast as u64).min(used) } else { Bytes::ZERO };
        self.forecast = if promised > least { forecast.max(promised) } else { forecast };
        if self.forecast > self.peak_forecast.1 {
            self.peak_forecast = (now, self.forecast);
        }
    }

    /// What the guest used when it last reported; `None` if it never did.
    pub fn used(&self) -> Option<Bytes> {
        self.used
    }

    /// Whether it has waited for memory for some seconds, and still does.
    pub fn waits_on(&self) -> bool {
        self.distress.is_long()
    }

    /// How much more it may use than it is counted for: memory went while it reported.
    pub fn uncertainty(&self) -> Bytes {
        self.uncertainty
    }

    /// Its use as the policy holds it: up at once, down only when it has clearly fallen.
    pub fn peak_hold(&self) -> Bytes {
        self.peak_hold
    }

    /// What it can't do without this moment: use and [`MINIMUM_BUFFER_PERCENT`] of it, no more than
    /// [`MINIMUM_BUFFER_MOST`], within its limits.
    pub fn minimum_working_set(&self, limits: &Limits) -> Bytes {
        let used = self.used.unwrap_or_default();
        limits.clamp(used.saturating_add(minimum_buffer(used, limits)))
    }

    /// What can't wait: as little as it can do with, and what it lacks or is about to.
    pub fn urgent(&self, limits: &Limits) -> Bytes {
        self.recent().urgent(limits)
    }

    /// What it must have: recent use and its buffer, or more where it lacks more or is about to,
    /// within its limits.
    pub fn need(&self, limits: &Limits) -> Bytes {
        self.recent().need(limits)
    }

    /// What the newest report asks for. What a guest used a moment ago is a reason to leave it memory, but
    /// not to give it more: a burst may be over before there is memory for it.
    pub fn asks(&self, limits: &Limits) -> Bytes {
        self.newest().need(limits)
    }

    fn recent(&self) -> Use {
        Use {
            bytes: self.peak_hold,
            boost_percent: self.distress.boost_percent(),
            forecast: self.peak_forecast.1,
        }
    }

    fn newest(&self) -> Use {
        let boost_percent = self.distress.present_percent();
        Use { bytes: self.used.unwrap_or_default(), boost_percent, forecast: self.forecast }
    }

    /// What it should have where nobody is short: use over the last minute and its buffer.
    pub fn ample(&self, limits: &Limits) -> Bytes {
        let slow = Bytes(self.slow as u64).percent(100 + u64::from(limits.buffer_percent()));
        self.need(limits).max(limits.clamp(slow))
    }

    /// What the guest had when it made this report, and what it had at most.
    ///
    /// Use is what it had less what it could spare at the same moment. A VMM may tell what it had then.
    /// Elsewhere the report comes by a clock of the guest's, and is up to a statistics interval old. While
    /// memory moves, the guest has another amount by now: what it had then lies between the amounts before
    /// the report and after it. While memory goes, the amount is taken that changes use least: an error would
    /// look like a rise, and memory would be given back for it. While memory comes, a fall is doubted in the
    /// same way, and a rise is not.
    fn had(&self, news: &News, hold: bool) -> (Bytes, Bytes) {
        if let Some(had) = news.had {
            return (had, had);
        }
        let (before, after) = self.around(news.reported);
        let line = between(before, after, news.reported);
        let Some(used) = self.used.filter(|_| hold) else { return (line, line) };
        let steady = used.saturating_add(news.spare).clamp(before.1.min(after.1), before.1.max(after.1));
        if after.1 < before.1 {
            (steady, before.1)
        } else {
            let had = steady.max(line);
            (had, had)
        }
    }

    /// What the guest had at the last look before `then`, and at the first look after it.
    fn around(&self, then: Duration) -> (Sample, Sample) {
        let mut after = None;
        for back in 1..=self.seen.min(SAMPLES) {
            let sample = self.samples[(self.seen - back) % SAMPLES];
            if sample.0 <= then + TOGETHER {
                return (sample, after.unwrap_or(sample));
            }
            after = Some(sample);
        }
        (after.unwrap_or_default(), after.unwrap_or_default())
    }
}

/// When, and what was had or used then.
type Sample = (Duration, Bytes);

/// What a need is concluded from.
#[derive(Clone, Copy)]
struct Use {
    bytes: Bytes,
    /// What is added to it for a guest that waits for memory.
    boost_percent: u64,
    /// How far it rises.
    forecast: Bytes,
}

impl Use {
    fn urgent(&self, limits: &Limits) -> Bytes {
        let boosted = self.bytes.percent(100 + self.boost_percent);
        limits.clamp(boosted.saturating_add(minimum_buffer(self.bytes, limits)).saturating_add(self.forecast))
    }

    fn need(&self, limits: &Limits) -> Bytes {
        let buffer = u64::from(limits.buffer_percent());
        limits.clamp(self.bytes.percent(100 + buffer + self.boost_percent)).max(self.urgent(limits))
    }
}

/// What was had at `then`, on a line from `a` to `b`.
fn between(a: Sample, b: Sample, then: Duration) -> Bytes {
    let span = b.0.saturating_sub(a.0).as_secs_f64();
    if span == 0.0 {
        return b.1;
    }
    let part = (then.saturating_sub(a.0).as_secs_f64() / span).min(1.0);
    Bytes((a.1.0 as f64 + (b.1.0 as f64 - a.1.0 as f64) * part) as u64)
}

/// The part of its buffer that a guest with such use can't do without.
fn minimum_buffer(used: Bytes, limits: &Limits) -> Bytes {
    used.percent(u64::from(limits.buffer_percent()).min(MINIMUM_BUFFER_PERCENT)).min(MINIMUM_BUFFER_MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        "256M,min=128M,max=1G".parse().unwrap()
    }

    const ALL: Follow = Follow { hold: true, distress: true, rises: true };

    fn spares(reported: Duration, spare: Bytes) -> News {
        News { reported, spare, ..News::default() }
    }

    fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    #[test]
    fn demand_is_use_and_buffer_within_the_limits() {
        let mut demand = Demand::default();
        demand.has(at(1), Bytes::mib(500));
        demand.report(at(1), &spares(at(1), Bytes::mib(200)), ALL);
        assert_eq!(demand.used(), Some(Bytes::mib(300)));
        assert_eq!(demand.need(&limits()), Bytes::mib(360));
        demand.report(at(2), &spares(at(2), Bytes::ZERO), ALL);
        demand.has(at(3), Bytes::gib(4));
        demand.report(at(3), &spares(at(3), Bytes::ZERO), ALL);
        assert_eq!(demand.need(&limits()), Bytes::gib(1));
    }

    #[test]
    fn a_guest_that_just_gave_memory_up_does_not_seem_to_use_less() {
        let mut demand = Demand::default();
        demand.has(at(10), Bytes::mib(800));
        demand.report(at(10), &spares(at(10), Bytes::mib(400)), ALL);
        // 200 MiB went between 10 s and 11 s; the report is of 10.5 s, when half was gone.
        demand.has(at(11), Bytes::mib(600));
        demand.report(at(11), &spares(Duration::from_millis(10_500), Bytes::mib(300)), ALL);
        assert_eq!(demand.used(), Some(Bytes::mib(400)));
    }

    #[test]
    fn a_report_that_was_asked_for_is_of_what_is_there_now() {
        let asked = |ago| {
            let mut demand = Demand::default();
            demand.has(at(10), Bytes::mib(800));
            demand.report(at(10), &spares(at(10), Bytes::mib(400)), ALL);
            demand.has(at(11), Bytes::mib(600));
            demand.report(at(11), &spares(at(11) - Duration::from_millis(ago), Bytes::mib(100)), ALL);
            (demand.used(), demand.uncertainty())
        };
        assert_eq!(asked(10), (Some(Bytes::mib(500)), Bytes::ZERO));
        assert_ne!(asked(500).1, Bytes::ZERO, "nobody knows what it had half a second ago");
    }

    #[test]
    fn what_is_over_is_held_and_not_asked_for() {
        let mut demand = Demand::default();
        for (second, spare) in [(1, 600), (2, 300), (3, 600)] {
            demand.has(at(second), Bytes::gib(1));
            demand.report(at(second), &spares(at(second), Bytes::mib(spare)), ALL);
        }
        assert!(demand.need(&limits()) > Bytes::mib(800), "{}", demand.need(&limits()));
        assert_eq!(demand.asks(&limits()), limits().clamp(Bytes::mib(424).percent(120)));
    }

    #[test]
    fn a_rise_is_seen_by_reports_in_quick_succession() {
        let mut demand = Demand::default();
        for tick in 0..20u64 {
            let now = at(1) + Duration::from_millis(50 * tick);
            demand.has(now, Bytes::gib(1));
            demand.report(now, &spares(now, Bytes::mib(800 - 20 * tick)), ALL);
        }
        let (used, minimum_working_set) = (demand.used().unwrap(), Bytes::mib(64));
        assert!(
            demand.urgent(&limits()) > used.saturating_add(minimum_working_set),
            "{}",
            demand.urgent(&limits())
        );
    }

    #[test]
    fn demand_rises_at_once_and_falls_later_in_comfort_than_in_need() {
        let mut demand = Demand::default();
        for second in 0..20 {
            demand.has(at(second), Bytes::gib(1));
            demand.report(at(second), &spares(at(second), Bytes::mib(424)), ALL);
        }
        for second in 20..40 {
            demand.has(at(second), Bytes::gib(1));
            demand.report(at(second), &spares(at(second), Bytes::mib(824)), ALL);
        }
        assert!(demand.need(&limits()) < Bytes::mib(270), "{}", demand.need(&limits()));
        assert!(demand.ample(&limits()) > Bytes::mib(500), "{}", demand.ample(&limits()));
    }

    #[test]
    fn wobble_of_one_percent_does_not_move_a_held_demand_but_a_free_one() {
        let run = |hold: bool| {
            let mut demand = Demand::default();
            let mut falls = 0;
            let mut before = Bytes::ZERO;
            for second in 0..200 {
                let wobble = [0, 5, 10, 3, 7][second as usize % 5];
                demand.has(at(second), Bytes::gib(1));
                let follow = Follow { hold, ..ALL };
                demand.report(at(second), &spares(at(second), Bytes::mib(424 + wobble)), follow);
                let need = demand.need(&limits());
                falls += usize::from(need < before);
                before = need;
            }
            falls
        };
        assert_eq!(run(true), 0);
        assert!(run(false) > 0, "without the hold the same wobble moves it");
    }
}
