//! Saying a thing that lasts, or comes and goes: at once, then ever more seldom.

use std::time::Duration;

/// The time until something that has not changed is said a second time.
const FIRST: Duration = Duration::from_secs(60);

/// The longest time between two reminders, and how long a thing must be well until its next trouble is
/// said at once: a guest decides how often it goes wrong, and must not decide how long the log gets.
const LONGEST: Duration = Duration::from_secs(3600);

/// One thing that may be wrong, and when it was said last.
#[derive(Debug, Default)]
pub struct LogLimiter {
    /// All that was said to be wrong with it since it was well for long.
    kinds: Vec<&'static str>,
    /// How long it is silent after the next word.
    pause: Duration,
    /// From when on there may be another word.
    next: Duration,
    /// When it was wrong last.
    wrong: Duration,
    /// Somebody who read the log believes that it is wrong.
    observed: bool,
}

impl LogLimiter {
    /// It is wrong: whether to say it now. `kind` tells one trouble from another: one that was not said
    /// yet is said at once.
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

    /// It is over. True where that is to be said, as the trouble was.
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
