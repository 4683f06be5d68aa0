//! Guests that can't wait for the next round: who calls, heard from all VMs that can tell.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::client::{Error, EventSource};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use tracing::debug;

/// Calls that wait to be answered. One that finds no place is made again: a guest that goes on
/// waiting for memory says so twice a second.
const QUEUE_LENGTH: usize = 256;

/// How soon after one call a VM is heard again.
const REST: Duration = Duration::from_millis(100);

/// How long a VM that could not be heard is left alone, at first and at last.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Everybody who may call.
pub struct EventSubscriptions {
    sender: Sender<u64>,
    urgent: Receiver<u64>,
    subscriptions: BTreeMap<u64, Subscription>,
}

/// One VM's line; it is cut when this goes.
struct Subscription {
    task: AbortHandle,
    answered: Option<Instant>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Default for EventSubscriptions {
    fn default() -> Self {
        let (sender, urgent) = mpsc::channel(QUEUE_LENGTH);
        Self { sender, urgent, subscriptions: BTreeMap::new() }
    }
}

impl EventSubscriptions {
    /// Hears `id` from now on.
    pub fn subscribe(&mut self, id: u64, urgent: EventSource) {
        let sender = self.sender.clone();
        let task = tokio::spawn(listen(id, urgent, sender)).abort_handle();
        self.subscriptions.insert(id, Subscription { task, answered: None });
    }

    /// Whether `id` is heard.
    pub fn hears(&self, id: u64) -> bool {
        self.subscriptions.contains_key(&id)
    }

    /// How many are heard.
    pub fn len(&self) -> usize {
        self.subscriptions.len()
    }

    /// Hears no more than `most` from now on: those that came first.
    pub fn keep_at_most(&mut self, most: usize) {
        while self.subscriptions.len() > most && self.subscriptions.pop_last().is_some() {}
    }

    /// Hears only those from now on whom `stays` names.
    pub fn retain(&mut self, stays: impl Fn(u64) -> bool) {
        self.subscriptions.retain(|id, _| stays(*id));
    }

    /// Waits until somebody calls; gives all who do.
    pub async fn next(&mut self) -> BTreeSet<u64> {
        loop {
            // It never ends, as this holds a sender.
            let first = self.urgent.recv().await;
            let mut callers = BTreeSet::from_iter(first);
            while let Ok(id) = self.urgent.try_recv() {
                callers.insert(id);
            }
            let now = Instant::now();
            callers.retain(|id| {
                self.subscriptions.get_mut(id).is_some_and(|subscription| subscription.answer(now))
            });
            if !callers.is_empty() {
                return callers;
            }
        }
    }
}

impl Subscription {
    /// Whether this call is to be answered: not so soon after the last.
    fn answer(&mut self, now: Instant) -> bool {
        let rested = self.answered.is_none_or(|then| now.saturating_duration_since(then) >= REST);
        if rested {
            self.answered = Some(now);
        }
        rested
    }
}

/// Listens to one VM for as long as there is anybody to tell.
async fn listen(id: u64, urgent: EventSource, sender: Sender<u64>) {
    let mut wait = RETRY.0;
    loop {
        let mut heard = false;
        let error = urgent
            .listen(|event| {
                heard = true;
                if event.event.is_urgent() {
                    let _ = sender.try_send(id);
                }
            })
            .await;
        debug!("{error}; listening again in {} s", wait.as_secs());
        sleep(wait).await;
        // A VM of an older version never tells anything.
        wait = match error {
            _ if heard => RETRY.0,
            Error::Refused { .. } => RETRY.1,
            _ => (wait * 2).min(RETRY.1),
        };
    }
}
