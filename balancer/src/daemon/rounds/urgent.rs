//! Urgent rounds between the regular ones, for guests in distress.

use std::collections::BTreeSet;
use std::time::Duration;

use api::units::Bytes;
use tokio::time::Instant;

use super::Daemon;

/// How long an urgent round waits for answers.
const HURRY: Duration = Duration::from_millis(100);

/// How many of the VMs that wait for memory an urgent round looks at.
const MOST_LOOKED_AT: usize = 32;

/// While others still give up memory for a guest in distress, urgent rounds follow at this interval,
const CHASE_EVERY: Duration = Duration::from_millis(50);

/// and for this long; after that the regular rounds do.
const CHASE_FOR: Duration = Duration::from_secs(2);

/// Urgent rounds that are to follow.
#[derive(Clone, Copy)]
pub struct FollowUp {
    next: Instant,
    until: Instant,
}

impl FollowUp {
    /// When the next of them is due.
    pub fn next(self) -> Instant {
        self.next
    }
}

impl Daemon {
    /// An urgent round: for guests in distress, and then until others have given up what these need. Only VMs
    /// that may have news are asked: those in distress, those whose memory moves, and those that wait for
    /// memory. The round does not wait for a guest in distress that answers late; the next one sees its
    /// answer.
    pub(super) async fn answer(&mut self, urgent: &BTreeSet<u64>) {
        let eager: BTreeSet<u64> = urgent.iter().copied().chain(self.wait_longest()).collect();
        let asked = self.ask(Duration::ZERO, |id, managed| {
            !managed.response_times.is_slow() && (eager.contains(&id) || managed.moves())
        });
        self.gather(asked, HURRY).await;
        self.read_host();
        if self.knows_enough() {
            self.decide();
            let told = self.tell();
            self.gather(told, HURRY).await;
        }
        self.ask(Duration::ZERO, |id, managed| managed.response_times.is_slow() && urgent.contains(&id));
        self.publish();
        let now = Instant::now();
        let until = match self.follow_up {
            Some(follow_up) if urgent.is_empty() => follow_up.until,
            _ => now + CHASE_FOR,
        };
        let goes_on = self.balance.unserved > Bytes::ZERO && now < until;
        self.follow_up = goes_on.then_some(FollowUp { next: now + CHASE_EVERY, until });
    }

    /// Some of the VMs that wait for memory, the longest waiting first. On a host that is very short, looking
    /// at all of them so often would take its processors too.
    fn wait_longest(&self) -> impl Iterator<Item = u64> {
        let waiting: BTreeSet<(Duration, u64)> =
            self.waiting.iter().map(|(id, since)| (*since, *id)).collect();
        waiting.into_iter().map(|(_, id)| id).take(MOST_LOOKED_AT)
    }
}
