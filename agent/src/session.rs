//! The agent's life: waits for the kernel's word or for its rhythm, and speaks.

use std::fmt::Display;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use api::agent::wire::{Frame, Kind};
use api::agent::{AgentFigures, Version};
use api::units::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::complain;
use crate::figures::{Reader, Reclaim};
use crate::port::{Port, Sent};
use crate::pressure::Trigger;

/// How long a port that can't be opened is left alone, at first and at last.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How often the counters are looked at where the kernel gives no word and memory is short.
const LOOK: Duration = Duration::from_millis(250);

/// How often they are looked at while there is enough: how long it may take to see that there no longer is.
const GLANCE: Duration = Duration::from_secs(1);

/// Memory is short when less than one part in so many of it is available.
const SHORT: u64 = 4;

/// How the agent learns that its guest waits.
enum Watch {
    /// The kernel says so.
    Kernel(Trigger),
    /// The agent looks at counters.
    Counters,
}

/// What a sleep ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    Pressure,
    Time,
    BrokenTrigger,
}

/// The agent.
pub struct Session {
    path: Option<PathBuf>,
    every: Duration,
    reader: Reader,
    watch: Watch,
    /// Reclaim as of the last rhythm and the one before: a stall that began
    /// just before the last is to be compared with what was before it.
    reclaim: [Reclaim; 2],
    last_error: String,
}

impl Session {
    /// An agent that speaks on the port at `path`, or on the one with its name.
    pub fn new(path: Option<PathBuf>, every: Duration) -> Self {
        let reader = Reader::new();
        let reclaim = [reader.reclaim(); 2];
        Self { path, every, reader, watch: watch(), reclaim, last_error: String::new() }
    }

    /// Works for ever: a port that goes may come again.
    pub fn run(mut self) -> ! {
        let mut wait = RETRY.0;
        loop {
            match Port::open(self.path.as_deref()) {
                Ok(port) => {
                    wait = RETRY.0;
                    self.last_error.clear();
                    self.speak(port);
                    self.complain("the port has gone");
                }
                Err(error) => self.complain(error),
            }
            std::thread::sleep(wait);
            wait = (wait * 2).min(RETRY.1);
        }
    }

    /// Says what is wrong, once.
    fn complain(&mut self, error: impl Display) {
        let sentence = error.to_string();
        if sentence != self.last_error {
            complain(format_args!("{sentence}; trying again"));
            self.last_error = sentence;
        }
    }

    /// Speaks until the port has gone.
    fn speak(&mut self, mut port: Port) {
        let mut due = Instant::now();
        loop {
            let now = Instant::now();
            let sent = if now >= due {
                due = now + self.every;
                self.figures(&mut port)
            } else {
                match self.sleep(due - now) {
                    Woken::Pressure => self.distress(&mut port),
                    Woken::Time => Sent::Yes,
                    Woken::BrokenTrigger => {
                        self.watch = Watch::Counters;
                        Sent::Yes
                    }
                }
            };
            if sent == Sent::Gone {
                return;
            }
        }
    }

    fn figures(&mut self, port: &mut Port) -> Sent {
        let [recent, _] = self.reclaim;
        self.reclaim = [self.reader.reclaim(), recent];
        let frame = Frame { kind: Kind::Figures, version: Some(Version::OWN), figures: self.reader.all() };
        port.send(frame.encode().as_bytes())
    }

    fn distress(&mut self, port: &mut Port) -> Sent {
        let (figures, reclaim) = self.reader.urgent();
        let [_, before] = self.reclaim;
        if reclaim == before {
            // Some cgroup waits at its own limit: memory for the guest would not help it.
            return Sent::Yes;
        }
        port.send(Frame { kind: Kind::Distress, version: None, figures }.encode().as_bytes())
    }

    /// Sleeps until the guest waits for memory, at most for `time`.
    fn sleep(&mut self, time: Duration) -> Woken {
        match &self.watch {
            Watch::Kernel(trigger) => {
                let mut events = [PollFd::new(trigger, PollFlags::PRI)];
                // Whole seconds and nanoseconds of a Duration always fit.
                let time = Timespec::try_from(time).ok();
                let woken = poll(&mut events, time.as_ref());
                let [event] = events;
                match woken {
                    Ok(0) | Err(Errno::INTR) => Woken::Time,
                    Ok(_) if event.revents().contains(PollFlags::PRI) => Woken::Pressure,
                    Ok(_) | Err(_) => Woken::BrokenTrigger,
                }
            }
            Watch::Counters => self.look_for(time),
        }
    }

    /// As [`sleep`](Self::sleep) where the kernel gives no word.
    fn look_for(&mut self, time: Duration) -> Woken {
        look_for(time, || self.reader.urgent().0, std::thread::sleep)
    }
}

/// Looks at the counters before and after a nap, which is the shorter where memory is short, and no
/// longer than `time`.
fn look_for(time: Duration, look: impl Fn() -> AgentFigures, sleep: impl Fn(Duration)) -> Woken {
    let before = look();
    sleep(time.min(if is_short(&before) { LOOK } else { GLANCE }));
    let now = look();
    let short = is_short(&before) || is_short(&now);
    if short && now.allocation_stalls > before.allocation_stalls { Woken::Pressure } else { Woken::Time }
}

fn watch() -> Watch {
    match Trigger::new() {
        Ok(trigger) => Watch::Kernel(trigger),
        Err(error) => {
            complain(format_args!(
                "the kernel won't say when tasks wait for memory ({error}): looking at its counters \
                 instead. Run as root, and boot the kernel with psi=1 where it is switched off"
            ));
            Watch::Counters
        }
    }
}

fn is_short(figures: &AgentFigures) -> bool {
    match (figures.available, figures.total) {
        (Some(available), Some(total)) => available < Bytes(total.0 / SHORT),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn memory_is_short_below_a_quarter() {
        let figures = |available: Option<Bytes>| AgentFigures {
            available,
            total: Some(Bytes::mib(400)),
            ..AgentFigures::default()
        };
        assert!(is_short(&figures(Some(Bytes::mib(99)))));
        assert!(!is_short(&figures(Some(Bytes::mib(100)))));
        assert!(!is_short(&figures(None)));
    }

    const HOUR: Duration = Duration::from_secs(3600);

    /// A guest without PSI: how much of 400 MiB is available at each moment, and how many allocations
    /// have waited by then. Gives when it was seen to wait within an hour, and after how many naps.
    fn watched(guest: impl Fn(Duration) -> (Bytes, u64)) -> (Option<Duration>, u32) {
        let clock = Cell::new(Duration::ZERO);
        let look = || {
            let (available, stalls) = guest(clock.get());
            AgentFigures {
                available: Some(available),
                total: Some(Bytes::mib(400)),
                allocation_stalls: Some(stalls),
                ..AgentFigures::default()
            }
        };
        let mut naps = 0;
        while clock.get() < HOUR {
            naps += 1;
            let left = HOUR - clock.get();
            if look_for(left, look, |time| clock.set(clock.get() + time)) == Woken::Pressure {
                return (Some(clock.get()), naps);
            }
        }
        (None, naps)
    }

    #[test]
    fn a_guest_that_becomes_short_is_seen_within_a_second() {
        let begins = Duration::from_millis(100_500);
        let (seen, naps) = watched(|now| match now.checked_sub(begins) {
            None => (Bytes::mib(300), 7),
            // It takes some seconds until an allocation waits.
            Some(since) if since < Duration::from_secs(3) => (Bytes::mib(50), 7),
            Some(_) => (Bytes::mib(10), 8),
        });
        let stalled = begins + Duration::from_secs(3);
        assert!(seen.is_some_and(|seen| seen >= stalled && seen <= stalled + LOOK), "{seen:?}");
        assert!(naps < 120, "{naps}");
        // All at once.
        let (seen, _) = watched(|now| if now < begins { (Bytes::mib(300), 7) } else { (Bytes::mib(10), 8) });
        assert!(seen.is_some_and(|seen| seen <= begins + GLANCE), "{seen:?}");
    }

    #[test]
    fn nobody_is_called_where_memory_is_not_short_or_nothing_waits() {
        assert_eq!(watched(|now| (Bytes::mib(300), now.as_secs())), (None, 3600), "once a second");
        assert_eq!(watched(|_| (Bytes::mib(50), 7)), (None, 4 * 3600), "four times a second");
    }
}
