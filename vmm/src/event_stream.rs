//! What happens to a VM's memory, for those who wait for it: `GET /memory/events`, and `GET /memory` where
//! it waits for a report.
//!
//! Only the latest events are kept. A reader that falls behind them has lost
//! some, and is sent away: nobody's slowness costs the VM memory or time.

use std::collections::VecDeque;
use std::sync::Arc;

use api::agent::{AgentStatus, EventKind, MemoryEvent};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

/// Events that are kept for readers.
pub const MOST_EVENTS: usize = 64;

/// Readers at a time.
pub const MOST_READERS: usize = 4;

#[derive(Debug, Default)]
struct State {
    events: VecDeque<MemoryEvent>,
    /// The sequence number of the newest event; 0 before the first.
    newest: u64,
    readers: usize,
    /// Somebody waits for the guest's next report.
    report_expected: bool,
    wake: Option<EventFd>,
}

impl State {
    fn wake(&self) {
        if let Some(wake) = &self.wake {
            // The one failure is a full counter, which is a wake-up already pending.
            let _ = wake.write(1);
        }
    }
}

/// The events of one VM.
#[derive(Debug, Default)]
pub struct EventStream(Mutex<State>);

impl EventStream {
    /// Has `wake` written to whenever there is something for a reader.
    pub fn wake_with(&self, wake: EventFd) {
        self.0.lock().wake = Some(wake);
    }

    /// Something other than an event has come that a reader may wait for.
    pub fn wake(&self) {
        self.0.lock().wake();
    }

    /// Something has happened.
    pub fn push(&self, event: EventKind, agent: Option<AgentStatus>) {
        let mut state = self.0.lock();
        state.newest = state.newest.saturating_add(1);
        let event = MemoryEvent { sequence: state.newest, event, agent };
        if state.events.len() >= MOST_EVENTS {
            state.events.pop_front();
        }
        state.events.push_back(event);
        if state.readers > 0 {
            state.wake();
        }
    }

    /// The next report wakes those who wait.
    pub fn expect_report(&self) {
        self.0.lock().report_expected = true;
    }

    /// The guest has sent a report.
    pub fn report_came(&self) {
        let mut state = self.0.lock();
        if std::mem::take(&mut state.report_expected) {
            state.wake();
        }
    }

    /// A reader of what happens from now on, whose first event tells how the agent stands;
    /// `None` where there are [`MOST_READERS`] already.
    pub fn subscribe(self: &Arc<Self>, agent: Option<AgentStatus>) -> Option<Subscription> {
        let mut state = self.0.lock();
        if state.readers >= MOST_READERS {
            return None;
        }
        state.readers += 1;
        let first = MemoryEvent { sequence: state.newest, event: EventKind::Subscribed, agent };
        Some(Subscription { events: Arc::clone(self), first: Some(first), seen: state.newest })
    }
}

/// One reader's place among the events. Its end makes room for another.
#[derive(Debug)]
pub struct Subscription {
    events: Arc<EventStream>,
    first: Option<MemoryEvent>,
    seen: u64,
}

/// The reader was too slow: events it has not seen are no longer kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FellBehind;

impl Subscription {
    /// The events since the last call.
    ///
    /// # Errors
    /// [`FellBehind`], again and again.
    pub fn read(&mut self) -> Result<Vec<MemoryEvent>, FellBehind> {
        let state = self.events.0.lock();
        let oldest = state.events.front().map_or(state.newest, |event| event.sequence);
        if self.seen.saturating_add(1) < oldest {
            return Err(FellBehind);
        }
        let new = state.events.iter().filter(|event| event.sequence > self.seen);
        let events = self.first.take().into_iter().chain(new.copied()).collect();
        self.seen = state.newest;
        Ok(events)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.events.0.lock();
        state.readers = state.readers.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn kinds(events: &[MemoryEvent]) -> Vec<EventKind> {
        events.iter().map(|event| event.event).collect()
    }

    #[test]
    fn a_reader_sees_what_happens_after_it_came() {
        let events = Arc::new(EventStream::default());
        events.push(EventKind::Figures, None);
        let mut reader = events.subscribe(None).unwrap();
        assert_eq!(kinds(&reader.read().unwrap()), [EventKind::Subscribed]);
        events.push(EventKind::Distress, None);
        events.push(EventKind::Stalls, None);
        let events = reader.read().unwrap();
        assert_eq!(kinds(&events), [EventKind::Distress, EventKind::Stalls]);
        assert_eq!(events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2, 3]);
        assert!(reader.read().unwrap().is_empty());
    }

    #[test]
    fn who_falls_behind_is_told_so() {
        let events = Arc::new(EventStream::default());
        let (mut slow, mut quick) = (events.subscribe(None).unwrap(), events.subscribe(None).unwrap());
        for _ in 0..MOST_EVENTS {
            events.push(EventKind::Figures, None);
        }
        assert_eq!(quick.read().unwrap().len(), MOST_EVENTS + 1);
        events.push(EventKind::Figures, None);
        assert_eq!(slow.read(), Err(FellBehind));
        assert_eq!(slow.read(), Err(FellBehind));
        assert_eq!(quick.read().unwrap().len(), 1);
    }

    #[test]
    fn readers_are_few_and_only_they_cause_wake_ups() {
        let events = Arc::new(EventStream::default());
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        events.wake_with(wake.try_clone().unwrap());
        events.push(EventKind::Figures, None);
        assert!(wake.read().is_err(), "nobody reads");
        let mut readers: Vec<_> = (0..MOST_READERS).map(|_| events.subscribe(None).unwrap()).collect();
        assert!(events.subscribe(None).is_none());
        events.push(EventKind::Figures, None);
        assert_eq!(wake.read().unwrap(), 1);
        readers.pop();
        assert!(events.subscribe(None).is_some());
    }

    #[test]
    fn a_report_wakes_whoever_expects_it_once() {
        let events = EventStream::default();
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        events.wake_with(wake.try_clone().unwrap());
        events.report_came();
        assert!(wake.read().is_err(), "nobody waits");
        events.expect_report();
        events.report_came();
        events.report_came();
        assert_eq!(wake.read().unwrap(), 1);
    }
}
