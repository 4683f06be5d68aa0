//! Whether a guest waits for memory, concluded from counters that it sends.
//!
//! Use is capped by what a guest has: one that is short seems to use what it has and no more. Nobody can say
//! how much it lacks, only that it waits. So its demand is boosted while it waits, more each time that it
//! still does. The boost fades when it stops. It is a part of the demand, and bounded by what the VM is
//! entitled to, as any demand is. A guest that lies in its counters gains no more than one that lies about
//! its use.

use std::time::Duration;

use api::units::{Bytes, Pages};

use super::demand::News;
use super::observation::Stalls;

/// More waiting than this between two looks is distress; Senpai (Meta's TMO) aims for 10 ms in 6 s.
pub const WAITED: Duration = Duration::from_millis(10);

/// More memory than this scanned by allocations, refaulted or swapped in between two looks is distress.
pub const WORKED: Bytes = Bytes::mib(1);

/// The first boost, in percent of use.
pub const FIRST_BOOST: f64 = 25.0;

/// The largest boost, in percent of use.
pub const LARGEST_BOOST: f64 = 100.0;

/// What is left of a boost after each second without distress.
pub const FADE: f64 = 0.875;

/// Reports closer to each other than this are one report.
pub const APART: Duration = Duration::from_millis(200);

/// A boost below this is none, in percent of use.
const LEAST_BOOST: f64 = 5.0;

/// A guest that could spare more than this part of what it has is not short. What waits in it waits for
/// something else, such as a limit of its own on a group of programs.
pub const SPARE_PERCENT: u64 = 10;

/// What was last seen of one guest's counters, and the boost that came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Distress {
    last: Option<Stalls>,
    boost: f64,
    looked: Duration,
    /// When the guest made its newest report, and when the newest that showed it waiting.
    reported: Duration,
    waited: Duration,
}

impl Distress {
    /// Takes in the counters, what the guest could spare, and what it has by the same news.
    pub fn look(&mut self, now: Duration, news: &News, has: Bytes) {
        let News { reported, spare, stalls, ran_out, .. } = *news;
        self.reported = reported;
        // Major faults alone are no distress: a program that starts has them too.
        let waits = self.last.replace(stalls).is_some_and(|before| rose(&before, &stalls)) || ran_out;
        if waits && spare <= has.percent(SPARE_PERCENT) {
            let is_new = reported.saturating_sub(self.waited) >= APART;
            let more = if is_new { 2.0 } else { 1.0 };
            self.boost = (self.boost * more).clamp(FIRST_BOOST, LARGEST_BOOST);
            self.waited = reported;
        } else {
            let since = now.saturating_sub(self.looked).as_secs_f64();
            self.boost *= FADE.powf(since);
        }
        self.looked = now;
    }

    /// What is added to what a guest asks for, in percent of use: nothing for one that has stopped waiting.
    pub fn present_percent(&self) -> u64 {
        if self.waits() { self.boost_percent() } else { 0 }
    }

    /// Whether it has waited for so long that the boost can't rise any more, and waits still.
    pub fn is_long(&self) -> bool {
        self.waits() && self.boost >= LARGEST_BOOST
    }

    fn waits(&self) -> bool {
        self.reported.saturating_sub(self.waited) < APART
    }

    /// What is added to the demand, in percent of use.
    pub fn boost_percent(&self) -> u64 {
        if self.boost < LEAST_BOOST { 0 } else { self.boost as u64 }
    }
}

/// Whether the guest waited for memory between the two.
fn rose(before: &Stalls, now: &Stalls) -> bool {
    fn more<T: PartialOrd + Copy>(before: Option<T>, now: Option<T>) -> Option<(T, T)> {
        before.zip(now).filter(|(before, now)| now > before)
    }
    let pages = |before, now| {
        more(before, now)
            .is_some_and(|(before, now): (u64, u64)| Pages(now.saturating_sub(before)).bytes() > WORKED)
    };
    more(before.waited, now.waited).is_some_and(|(before, now)| now.saturating_sub(before) > WAITED)
        || more(before.allocation_stalls, now.allocation_stalls).is_some()
        || pages(before.direct_scans, now.direct_scans)
        || pages(before.refaults, now.refaults)
        || more(before.swap_in, now.swap_in).is_some_and(|(before, now)| now.saturating_sub(before) > WORKED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(distress: &mut Distress, second: u64, stalls: Stalls, spare: u64) -> u64 {
        let reported = Duration::from_secs(second);
        let news = News { reported, spare: Bytes::mib(spare), stalls, ..News::default() };
        distress.look(reported, &news, Bytes::gib(1));
        distress.boost_percent()
    }

    #[test]
    fn a_boost_rises_while_a_guest_waits_and_fades_when_it_does_not() {
        let mut distress = Distress::default();
        let waited = |ms| Stalls { waited: Some(Duration::from_millis(ms)), ..Stalls::default() };
        assert_eq!(look(&mut distress, 1, waited(5000), 10), 0, "what was before is no news");
        assert_eq!(look(&mut distress, 2, waited(5009), 10), 0, "a little waiting is normal");
        assert_eq!(look(&mut distress, 3, waited(5100), 10), 25);
        assert_eq!(look(&mut distress, 4, waited(5200), 10), 50);
        assert_eq!(look(&mut distress, 5, waited(5300), 10), 100);
        assert_eq!(look(&mut distress, 6, waited(5400), 10), 100);
        assert_eq!(look(&mut distress, 7, waited(5400), 10), 87);
        assert_eq!(look(&mut distress, 40, waited(5400), 10), 0);
    }

    #[test]
    fn who_has_stopped_waiting_asks_for_no_more_and_one_report_counts_once() {
        let mut distress = Distress::default();
        let mut report = |ms, stalls| {
            let (reported, stalls) =
                (Duration::from_millis(ms), Stalls { allocation_stalls: Some(stalls), ..Stalls::default() });
            let news = News { reported, stalls, ..News::default() };
            distress.look(reported, &news, Bytes::gib(1));
            (distress.present_percent(), distress.boost_percent())
        };
        report(1000, 0);
        assert_eq!(report(2000, 1), (25, 25));
        assert_eq!(report(2000, 1), (25, 25), "the same one, read again");
        assert_eq!(report(2050, 2), (25, 25), "still the same wait");
        assert_eq!(report(3000, 3), (50, 50));
        let (present, recent) = report(4000, 3);
        assert!(present == 0 && recent > 25, "{present} {recent}");
    }

    #[test]
    fn each_counter_tells_and_a_guest_with_memory_to_spare_is_not_short() {
        let zero = Stalls {
            waited: Some(Duration::ZERO),
            allocation_stalls: Some(0),
            direct_scans: Some(0),
            direct_reclaims: Some(0),
            swap_in: Some(Bytes::ZERO),
            major_faults: Some(0),
            refaults: Some(0),
        };
        let boost = |stalls: Stalls, spare: u64| {
            let mut distress = Distress::default();
            look(&mut distress, 1, zero, spare);
            look(&mut distress, 2, stalls, spare)
        };
        assert_eq!(boost(zero, 10), 0);
        assert_eq!(boost(Stalls { allocation_stalls: Some(1), ..zero }, 10), 25);
        assert_eq!(boost(Stalls { direct_scans: Some(1000), ..zero }, 10), 25);
        assert_eq!(boost(Stalls { refaults: Some(1000), ..zero }, 10), 25);
        assert_eq!(boost(Stalls { swap_in: Some(Bytes::mib(2)), ..zero }, 10), 25);
        assert_eq!(boost(Stalls { major_faults: Some(10_000), ..zero }, 10), 0);
        assert_eq!(boost(Stalls { allocation_stalls: Some(1), ..zero }, 300), 0);
        // Counters that fall (the guest booted again) or come to be known are no waiting.
        assert_eq!(boost(Stalls { direct_scans: None, ..zero }, 10), 0);
        let mut distress = Distress::default();
        look(&mut distress, 1, Stalls { direct_scans: Some(u64::MAX), ..zero }, 10);
        assert_eq!(look(&mut distress, 2, zero, 10), 0);
    }
}
