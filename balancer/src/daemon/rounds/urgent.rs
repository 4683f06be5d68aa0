//! What happens between two rounds, for guests that can't wait for the next.

use std::collections::BTreeSet;
use std::time::Duration;

use api::units::Bytes;
use tokio::time::Instant;

use super::Daemon;

/// How long answers are waited for where a guest can't wait.
const HURRY: Duration = Duration::from_millis(100);

/// So many of the VMs that wait for memory are looked at in a round between the rounds.
const MOST_LOOKED_AT: usize = 32;

/// While others still pay for what a calling guest is to get, they are looked at this often,
const CHASE_EVERY: Duration = Duration::from_millis(50);

/// and for this long; after that, the rounds have it.
const CHASE_FOR: Duration = Duration::from_secs(2);

/// Short rounds that follow a call.
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
    /// A round between the rounds: for guests that call, and then until others have paid what these are
    /// to get. Only VMs that have something new to say are asked: those that call, that move, and that
    /// wait for memory, so that they get what they want by now. A guest in distress may answer late, and
    /// holds nobody up: what it says then is there at the next look.
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

    /// Some of those that wait for memory, from the longest on: on a host that is short of much, to look at
    /// all of them so often would take its processors too.
    fn wait_longest(&self) -> impl Iterator<Item = u64> {
        let waiting: BTreeSet<(Duration, u64)> =
            self.waiting.iter().map(|(id, since)| (*since, *id)).collect();
        waiting.into_iter().map(|(_, id)| id).take(MOST_LOOKED_AT)
    }
}
