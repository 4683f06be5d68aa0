//! Limits how often a lasting or recurring trouble is logged: at once, then less and less often.

use std::time::Duration;

/// The time until an unchanged trouble is logged a second time.
const FIRST: Duration = Duration::from_secs(60);

/// The longest time between two reminders. After so long without trouble, the next one is logged at once: a
/// guest decides how often it goes wrong, and must not decide how long the log gets.
const LONGEST: Duration = Duration::from_secs(3600);

/// One thing that may be wrong, and when it was logged last.
#[derive(Debug, Default)]
pub struct LogLimiter {
    /// The troubles that were logged since the last long time without any.
    kinds: Vec<&'static str>,
    /// How long nothing is logged after the next line.
    pause: Duration,
    /// When the next line is allowed.
    next: Duration,
    /// When there was trouble last.
    wrong: Duration,
    /// The log's last word is that there is trouble.
    observed: bool,
}

impl LogLimiter {
    /// Notes a trouble. True if it is to be logged now. A `kind` that was not logged yet is logged at once.
    pub fn is_due(&mut self, now: Duration, kind: &'static str) -> bool {
        if now.saturating_sub(self.wrong) >= LONGEST {
            *self = Self::default();
        }
        self.wrong = now;
        let new = !self.kinds.contains(&kind);
        if !new && now < self.next {
            return false;
        }
        if new {
            self.kinds.push(kind);
        }
        self.pause = (self.pause * 2).clamp(FIRST, LONGEST);
        self.next = now + self.pause;
        self.observed = true;
        true
    }

    /// Notes the trouble's end. True if the end is to be logged, as the trouble was.
    pub fn end(&mut self) -> bool {
        std::mem::take(&mut self.observed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When something is said of a thing that is wrong, in the way that is named, at these seconds.
    fn observed(
        log_limiter: &mut LogLimiter,
        wrong: impl IntoIterator<Item = (u64, &'static str)>,
    ) -> Vec<u64> {
        let wrong = wrong.into_iter();
        wrong
            .filter(|(at, kind)| log_limiter.is_due(Duration::from_secs(*at), kind))
            .map(|(at, _)| at)
            .collect()
    }

    #[test]
    fn a_lasting_trouble_is_said_ever_more_seldom_and_a_new_one_at_once() {
        let mut log_limiter = LogLimiter::default();
        let at = observed(&mut log_limiter, (0..4000).map(|second| (second, "silent")));
        assert_eq!(at, [0, 60, 180, 420, 900, 1860, 3780]);
        assert!(log_limiter.is_due(Duration::from_secs(4000), "nonsense"));
        assert!(log_limiter.end());
        assert!(!log_limiter.end());
    }

    #[test]
    fn what_comes_and_goes_is_said_as_seldom_as_what_lasts() {
        let mut log_limiter = LogLimiter::default();
        let (mut troubles, mut ends) = (0, 0);
        for second in 0..4000 {
            troubles += usize::from(log_limiter.is_due(Duration::from_secs(second), "silent"));
            ends += usize::from(log_limiter.end());
        }
        assert_eq!((troubles, ends), (7, 7));
        let another = observed(
            &mut log_limiter,
            (4000..8000).map(|second| (second, ["stuck", "silent"][second as usize % 2])),
        );
        assert_eq!(another.len(), 2, "each trouble by its name once, but no more for that: {another:?}");
    }

    #[test]
    fn one_that_was_well_for_an_hour_is_news_again() {
        let mut log_limiter = LogLimiter::default();
        assert_eq!(observed(&mut log_limiter, (0..100).map(|second| (second, "silent"))), [0, 60]);
        assert!(log_limiter.end());
        assert_eq!(observed(&mut log_limiter, [(3698, "silent")]), [3698], "its pause is long over");
        assert_eq!(observed(&mut log_limiter, [(3700, "silent"), (3938, "silent")]), [3938]);
        assert_eq!(
            observed(&mut log_limiter, [(7538, "silent"), (7539, "silent"), (7598, "silent")]),
            [7538, 7598]
        );
    }
}
