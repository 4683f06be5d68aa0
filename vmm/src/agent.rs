//! The guest's agent as its VM hears it: what comes over the port is parsed,
//! bounded in how often it counts, kept, and passed on to who waits for it.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use api::agent::wire::{Decoder, Frame, Kind};
use api::agent::{AgentFigures, AgentStatus, EventKind, PORT, Version};
use api::guest_memory::Had;
use api::units::Bytes;
use devices::bucket::Bucket;
use devices::virtio::port::{Port, PortEvent};
use parking_lot::Mutex;

use crate::event_stream::EventStream;

/// Words that count in a second, and at once after a silence. An agent sends two a second while
/// its guest stalls; a guest that sends more is only heard less.
const RATE: (u64, u64) = (10, 20);

/// What one agent has said.
#[derive(Debug)]
struct State {
    connected: bool,
    /// When the last word came; none has where this is `None`.
    heard_at: Option<Instant>,
    distress_at: Option<Instant>,
    version: Option<Version>,
    figures: AgentFigures,
    /// What the guest had when it last told what is available.
    had: Option<Had>,
    heard: u64,
    dropped: u64,
    malformed: u64,
    bucket: Bucket,
}

/// What one agent has said, and what it is in the middle of saying.
#[derive(Debug)]
struct Listener {
    decoder: Decoder,
    state: State,
}

/// Tells what a guest has at this moment, whose kernel manages so much by its word.
type Count = dyn Fn(Bytes) -> Had + Send + Sync;

/// A VM's agent, if its guest runs one.
#[derive(Clone)]
pub struct Agent {
    listener: Arc<Mutex<Listener>>,
    count: Arc<OnceLock<Box<Count>>>,
    events: Arc<EventStream>,
}

impl Agent {
    /// An agent that was not heard yet; what it says goes to `events` as well.
    pub fn new(events: Arc<EventStream>) -> Self {
        let state = State {
            connected: false,
            heard_at: None,
            distress_at: None,
            version: None,
            figures: AgentFigures::default(),
            had: None,
            heard: 0,
            dropped: 0,
            malformed: 0,
            bucket: Bucket::new(RATE.0, RATE.1, Instant::now()),
        };
        let listener = Arc::new(Mutex::new(Listener { decoder: Decoder::default(), state }));
        Self { listener, count: Arc::new(OnceLock::new()), events }
    }

    /// Has `count` tell what the guest has when the agent speaks. Only the first call counts.
    pub fn counted_by(&self, count: impl Fn(Bytes) -> Had + Send + Sync + 'static) {
        let _ = self.count.set(Box::new(count));
    }

    /// The device over which it is heard.
    pub fn port(&self) -> Port {
        let agent = self.clone();
        Port::new(PORT, move |event| agent.take(event, Instant::now()))
    }

    /// How it stands at `now`; `None` where it was never heard.
    pub fn status(&self, now: Instant) -> Option<AgentStatus> {
        self.listener.lock().state.status(now)
    }

    /// The guest's driver says that it waits for memory. What it says goes to the events no more often than an
    /// agent's words: both are the guest's to send, and too many would drive every reader away.
    pub fn stalls(&self, now: Instant) {
        self.tell(EventKind::Stalls, now);
    }

    /// The guest's driver has taken pages out of the balloon rather than run out of memory: as
    /// [`stalls`](Self::stalls).
    pub fn deflates_on_oom(&self, now: Instant) {
        self.tell(EventKind::DeflatedOnOom, now);
    }

    fn tell(&self, kind: EventKind, now: Instant) {
        let mut listener = self.listener.lock();
        if listener.state.bucket.take(now) {
            self.events.push(kind, listener.state.status(now));
        }
    }

    fn take(&self, event: PortEvent<'_>, now: Instant) {
        let mut listener = self.listener.lock();
        let Listener { decoder, state } = &mut *listener;
        match event {
            PortEvent::Opened => {
                state.connected = true;
                decoder.restart();
            }
            PortEvent::Closed => {
                state.connected = false;
                if state.heard_at.is_some() && state.bucket.take(now) {
                    self.events.push(EventKind::AgentGone, state.status(now));
                }
            }
            PortEvent::Data(piece) => {
                decoder.feed(piece, |frame| {
                    if let Some(kind) = state.hear(frame, now, self.count.get().map(|count| &**count)) {
                        self.events.push(kind, state.status(now));
                    }
                });
                state.malformed = decoder.malformed();
            }
        }
    }
}

impl State {
    /// Takes in one word, and says what it is to others; `None` where it came too soon.
    fn hear(&mut self, frame: Frame, now: Instant, count: Option<&Count>) -> Option<EventKind> {
        if !self.bucket.take(now) {
            self.dropped = self.dropped.saturating_add(1);
            return None;
        }
        self.heard = self.heard.saturating_add(1);
        self.heard_at = Some(now);
        self.version = frame.version.or(self.version);
        let tells = frame.figures.available.is_some();
        self.figures.update(frame.figures);
        if tells {
            self.had = count.zip(self.figures.total).map(|(count, total)| count(total));
        }
        Some(match frame.kind {
            Kind::Figures => EventKind::Figures,
            Kind::Distress => {
                self.distress_at = Some(now);
                EventKind::Distress
            }
        })
    }

    fn status(&self, now: Instant) -> Option<AgentStatus> {
        let age = |then: Instant| milliseconds(now.saturating_duration_since(then));
        Some(AgentStatus {
            connected: self.connected,
            version: self.version,
            age_ms: age(self.heard_at?),
            distress_age_ms: self.distress_at.map(age),
            figures: self.figures,
            had: self.had.map(|had| had.all()),
            managed: self.had.map(|had| had.managed),
            heard: self.heard,
            dropped: self.dropped,
            malformed: self.malformed,
        })
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent").field("listener", &self.listener).finish_non_exhaustive()
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::units::Bytes;

    fn word(kind: Kind, available: Bytes) -> Vec<u8> {
        let figures = AgentFigures { available: Some(available), ..AgentFigures::default() };
        Frame { kind, version: Some(Version::OWN), figures }.encode().as_bytes().to_vec()
    }

    #[test]
    fn what_an_agent_says_is_kept_and_passed_on() {
        let events = Arc::new(EventStream::default());
        let mut reader = events.subscribe(None).unwrap();
        reader.read().unwrap();
        let agent = Agent::new(events.clone());
        let start = Instant::now();
        agent.take(PortEvent::Opened, start);
        assert_eq!(agent.status(start), None, "a program that says nothing is no agent");

        let (first, rest) = (word(Kind::Figures, Bytes::mib(9)), word(Kind::Distress, Bytes::mib(1)));
        agent.take(PortEvent::Data(&first), start);
        let (piece, other) = rest.split_at(7);
        agent.take(PortEvent::Data(piece), start);
        agent.take(PortEvent::Data(other), start);
        let status = agent.status(start + Duration::from_secs(2)).unwrap();
        assert_eq!(status.figures.available, Some(Bytes::mib(1)));
        assert_eq!((status.age_ms, status.distress_age_ms, status.heard), (2000, Some(2000), 2));
        assert_eq!((status.version, status.connected), (Some(Version::OWN), true));

        agent.take(PortEvent::Closed, start);
        let kinds: Vec<EventKind> = reader.read().unwrap().iter().map(|event| event.event).collect();
        assert_eq!(kinds, [EventKind::Figures, EventKind::Distress, EventKind::AgentGone]);
        assert!(!agent.status(start).unwrap().connected);
    }

    #[test]
    fn a_flood_is_heard_in_part_and_counted() {
        let events = Arc::new(EventStream::default());
        let agent = Agent::new(events.clone());
        let start = Instant::now();
        agent.take(PortEvent::Opened, start);
        let flood = word(Kind::Distress, Bytes::ZERO).repeat(1000);
        agent.take(PortEvent::Data(&flood), start);
        let status = agent.status(start).unwrap();
        assert_eq!((status.heard, status.dropped), (RATE.1, 1000 - RATE.1));
        agent.take(PortEvent::Data(&flood), start + Duration::from_secs(1));
        assert_eq!(agent.status(start).unwrap().heard, RATE.0 + RATE.1);
    }

    #[test]
    fn nonsense_is_counted_and_forgotten() {
        let agent = Agent::new(Arc::new(EventStream::default()));
        let now = Instant::now();
        agent.take(PortEvent::Opened, now);
        agent.take(PortEvent::Data(&[7; 5000]), now);
        assert_eq!(agent.status(now), None);
        agent.take(PortEvent::Data(&word(Kind::Distress, Bytes::ZERO)), now);
        assert_eq!(agent.status(now).unwrap().malformed, 1);
    }

    #[test]
    fn opening_and_closing_without_end_fills_nothing() {
        let events = Arc::new(EventStream::default());
        let agent = Agent::new(events.clone());
        let mut reader = events.subscribe(None).unwrap();
        let now = Instant::now();
        agent.take(PortEvent::Opened, now);
        agent.take(PortEvent::Data(&word(Kind::Figures, Bytes::ZERO)), now);
        for _ in 0..1000 {
            agent.take(PortEvent::Closed, now);
            agent.take(PortEvent::Opened, now);
        }
        assert!(reader.read().unwrap().len() <= RATE.1 as usize + 1);
    }

    #[test]
    fn stalls_without_end_drive_no_reader_away() {
        let events = Arc::new(EventStream::default());
        let agent = Agent::new(events.clone());
        let mut reader = events.subscribe(None).unwrap();
        let now = Instant::now();
        for _ in 0..1000 {
            agent.stalls(now);
        }
        let events = reader.read().expect("it has not fallen behind");
        assert_eq!(events.len(), RATE.1 as usize + 1);
        agent.stalls(now + Duration::from_secs(1));
        assert!(matches!(reader.read().unwrap()[..], [event] if event.event == EventKind::Stalls));
    }
}
