//! Saying a thing that lasts: at once, then ever more seldom.

use std::time::Duration;

/// The time until something that has not changed is said a second time.
const FIRST: Duration = Duration::from_secs(60);

/// The longest time between two reminders.
const LONGEST: Duration = Duration::from_secs(3600);

/// One thing that is wrong, and when it was said last.
#[derive(Debug, Default)]
pub struct Complaint {
    said: Option<(String, Duration, Duration)>,
}

impl Complaint {
    /// Whether to say it now. `kind` tells one trouble from another: a new one is said at once.
    pub fn is_due(&mut self, now: Duration, kind: &str) -> bool {
        match &mut self.said {
            Some((said, next, pause)) if said == kind => {
                if now < *next {
                    return false;
                }
                *pause = (*pause * 2).min(LONGEST);
                *next = now + *pause;
                true
            }
            _ => {
                self.said = Some((kind.to_owned(), now + FIRST, FIRST));
                true
            }
        }
    }

    /// It is over. True where it had been said.
    pub fn end(&mut self) -> bool {
        self.said.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lasting_trouble_is_said_ever_more_seldom_and_a_new_one_at_once() {
        let mut complaint = Complaint::default();
        let mut at = Vec::new();
        for second in 0..4000 {
            if complaint.is_due(Duration::from_secs(second), "silent") {
                at.push(second);
            }
        }
        assert_eq!(at, [0, 60, 180, 420, 900, 1860, 3780]);
        assert!(complaint.is_due(Duration::from_secs(4000), "nonsense"));
        assert!(complaint.end());
        assert!(!complaint.end());
        assert!(complaint.is_due(Duration::from_secs(4001), "nonsense"));
    }
}
