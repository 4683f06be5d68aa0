//! Whether a guest's reports show that it waits for memory, or is about to.
//!
//! Pure: reports in, a word out. A guest with an agent says so itself and sooner.

use api::report::Report;
use api::units::Bytes;

/// A guest that could spare less than one part in so many of its memory is short. Linux 6.1 counts
/// no waiting that the balloon's driver could tell, so that this is all there is to go by.
const SHORT: u64 = 16;

/// One that is short already has news when it could spare this part of its memory less.
const FALL: u64 = 128;

/// Follows the reports of one guest.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stalls {
    /// The sum of all counts of waiting in the last report.
    waited: Option<u64>,
    /// What it could spare when that was last news.
    spare: Option<Bytes>,
}

impl Stalls {
    /// Takes in a report; true where it shows that the guest waits more than it did.
    pub(crate) fn look(&mut self, report: &Report) -> bool {
        let waited = waited(report);
        // A guest that has booted anew begins at zero: that is no news.
        let waits = matches!((self.waited, waited), (Some(before), Some(now)) if now > before);
        self.waited = waited;
        self.falls_short(report) || waits
    }

    fn falls_short(&mut self, report: &Report) -> bool {
        let (Some(spare), Some(total)) = (report.spare(), report.total) else { return false };
        if spare >= Bytes(total.0 / SHORT) {
            self.spare = None;
            return false;
        }
        let news = self.spare.is_none_or(|before| spare < before.saturating_sub(Bytes(total.0 / FALL)));
        if news {
            self.spare = Some(spare);
        }
        news
    }
}

fn waited(report: &Report) -> Option<u64> {
    let counts = [
        report.allocation_stalls,
        report.direct_scans,
        report.oom_kills,
        report.swap_in.map(|swapped| swapped.pages().0),
    ];
    counts.into_iter().flatten().reduce(u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(spare: u64, stalls: Option<u64>) -> Report {
        Report {
            total: Some(Bytes::mib(1024)),
            available: Some(Bytes::mib(spare)),
            allocation_stalls: stalls,
            ..Report::default()
        }
    }

    #[test]
    fn counts_that_rise_are_news() {
        let mut stalls = Stalls::default();
        let looks = [(Some(5), false), (Some(5), false), (Some(6), true), (Some(0), false), (None, false)];
        for (count, news) in looks {
            assert_eq!(stalls.look(&report(500, count)), news, "{count:?}");
        }
        let swapped = Report { swap_in: Some(Bytes::mib(1)), ..Report::default() };
        stalls.look(&Report { swap_in: Some(Bytes::ZERO), ..Report::default() });
        assert!(stalls.look(&swapped));
        assert!(!stalls.look(&swapped));
    }

    #[test]
    fn falling_short_is_news_once_and_again_as_it_goes_on() {
        let mut stalls = Stalls::default();
        let looks =
            [(500, false), (64, false), (63, true), (63, false), (60, false), (54, true), (100, false)];
        for (spare, news) in looks {
            assert_eq!(stalls.look(&report(spare, None)), news, "{spare}");
        }
        assert!(stalls.look(&report(10, None)), "short anew");
    }

    #[test]
    fn what_a_guest_does_not_say_is_no_news() {
        assert!(!Stalls::default().look(&Report::default()));
        assert!(!Stalls::default().look(&Report { available: Some(Bytes::ZERO), ..Report::default() }));
    }
}
