//! Subscriptions to the events of VMs: a guest in distress can't wait for the next round.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::client::{Error, EventSource};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use tracing::debug;

/// Events that wait to be handled. One that finds no place comes again: a guest in distress says so twice a
/// second.
const QUEUE_LENGTH: usize = 256;

/// The least time between two events of a VM that are handled.
const REST: Duration = Duration::from_millis(100);

/// How long to wait before subscribing again: the first time, and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The subscriptions to all VMs that have events.
pub struct EventSubscriptions {
    sender: Sender<u64>,
    urgent: Receiver<u64>,
    subscriptions: BTreeMap<u64, Subscription>,
}

/// One VM's subscription; it ends when this is dropped.
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
    /// Subscribes to the events of VM `id`.
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

    /// Keeps the `most` subscriptions that came first.
    pub fn keep_at_most(&mut self, most: usize) {
        while self.subscriptions.len() > most && self.subscriptions.pop_last().is_some() {}
    }

    /// Ends the subscriptions to all other VMs than those that `stays` names.
    pub fn retain(&mut self, stays: impl Fn(u64) -> bool) {
        self.subscriptions.retain(|id, _| stays(*id));
    }

    /// Waits until guests are in distress; returns their VMs.
    pub async fn next(&mut self) -> BTreeSet<u64> {
        loop {
            // It never ends, as this owns a sender.
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
    /// Whether this event is to be handled: not too soon after the last one.
    fn answer(&mut self, now: Instant) -> bool {
        let rested = self.answered.is_none_or(|then| now.saturating_duration_since(then) >= REST);
        if rested {
            self.answered = Some(now);
        }
        rested
    }
}

/// Listens to one VM for ever.
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
        // A VM of an older version has no events.
        wait = match error {
            _ if heard => RETRY.0,
            Error::Refused { .. } => RETRY.1,
            _ => (wait * 2).min(RETRY.1),
        };
    }
}
