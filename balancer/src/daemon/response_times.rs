//! How fast one VM answers: a slow one must not hold up a round, as other guests wait meanwhile.

use std::time::Duration;

/// A slower answer than this counts as slow. A VM waits at most 100 ms for its guest.
const SLOW: Duration = Duration::from_millis(200);

/// The penalty of one slow answer; a quick one takes 1 off.
const PENALTY: u8 = 5;

/// From this penalty on rounds don't wait for the VM: two slow answers of five. One alone may be the host's
/// fault.
const ENOUGH: u8 = 6;

/// The highest penalty: after some ten quick answers rounds wait for it again.
const MOST: u8 = 15;

/// How a VM's last answers came.
#[derive(Debug, Default)]
pub struct ResponseTimes {
    asked: Option<Duration>,
    penalty: u8,
}

impl ResponseTimes {
    /// A request is sent to it.
    pub fn asked(&mut self, now: Duration) {
        self.asked = Some(now);
    }

    /// Its request has ended, with an answer or at the time limit.
    pub fn answered(&mut self, now: Duration) {
        let Some(asked) = self.asked.take() else { return };
        self.penalty = if now.saturating_sub(asked) > SLOW {
            self.penalty.saturating_add(PENALTY).min(MOST)
        } else {
            self.penalty.saturating_sub(1)
        };
    }

    /// Whether rounds go on without its answer and take it later.
    pub fn is_slow(&self) -> bool {
        self.penalty >= ENOUGH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(answers: &[u64]) -> bool {
        let mut pace = ResponseTimes::default();
        for (number, milliseconds) in answers.iter().enumerate() {
            let asked = Duration::from_secs(number as u64);
            pace.asked(asked);
            pace.answered(asked + Duration::from_millis(*milliseconds));
            // What it was not asked for counts for nothing.
            pace.answered(Duration::MAX);
        }
        pace.is_slow()
    }

    #[test]
    fn who_is_slow_again_and_again_is_not_waited_for_until_it_is_quick_for_a_while() {
        assert!(!after(&[]) && !after(&[490]) && !after(&[100; 50]));
        assert!(after(&[490, 490]) && after(&[490, 1, 1, 490]));
        // Not even who takes turns: this is the pattern that costs others most.
        assert!(after(&[490, 1, 490]) && after(&[490, 1, 490, 1, 490, 1]));
        assert!(after(&[[490; 60].as_slice(), &[1; 5]].concat()));
        assert!(!after(&[[490; 60].as_slice(), &[1; 10]].concat()));
    }
}
