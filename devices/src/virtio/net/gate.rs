//! What holds a NIC to its limits, each way.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::counters::{Counters, Direction};
use crate::bucket::{Limiter, RateLimits};

/// Lets frames pass one way, as far as the limits go. How long one is may be known only once it has passed: the next
/// ones wait for it then.
#[derive(Debug)]
pub struct Gate {
    limiter: Option<Limiter>,
    direction: Direction,
    /// It has closed then, and opens then.
    closed: Option<(Instant, Instant)>,
}

impl Gate {
    /// An open one.
    pub fn new(direction: Direction, limits: RateLimits) -> Self {
        let is_limited = limits != RateLimits::default();
        let limiter = is_limited.then(|| Limiter::new(limits, Instant::now()));
        Self { limiter, direction, closed: None }
    }

    /// Whether a frame may pass now.
    pub fn is_open(&mut self, counters: &Counters) -> bool {
        let Some(limiter) = &mut self.limiter else { return true };
        let now = Instant::now();
        let wait = limiter.wait(now);
        let since = match self.closed {
            Some((since, _)) => since,
            None if wait.is_zero() => return true,
            None => {
                counters.limited(self.direction);
                now
            }
        };
        // What it was closed for so far, at each look.
        counters.limited_for(self.direction, now.saturating_duration_since(since));
        self.closed = (!wait.is_zero()).then(|| (now, now + wait));
        wait.is_zero()
    }

    /// A frame of so many bytes has passed.
    pub fn passed(&mut self, bytes: usize) {
        if let Some(limiter) = &mut self.limiter {
            limiter.spend(bytes as u64);
        }
    }

    /// When it opens, where it is closed.
    pub fn opens_at(&self) -> Option<Instant> {
        self.closed.map(|(_, opens_at)| opens_at)
    }
}

/// Wakes a NIC when one of its gates opens.
pub struct Alarm {
    timer: TimerFd,
    set_for: Option<Instant>,
}

impl Alarm {
    /// Set for no time.
    ///
    /// # Errors
    /// No timer can be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self { timer: TimerFd::new()?, set_for: None })
    }

    /// Rings at the first of these times; what it rang for is over.
    pub fn set(&mut self, times: [Option<Instant>; 2]) {
        let first = times.into_iter().flatten().min();
        if first == self.set_for {
            return;
        }
        self.set_for = first;
        let set = match first {
            // A time of zero would switch it off.
            Some(at) => {
                let wait = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
                self.timer.reset(wait, None)
            }
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            tracing::warn!("a guest's network is held back by its limits, and nothing wakes it: {error}");
        }
    }

    /// It rang.
    pub fn take(&mut self) {
        // Where it did so for a time before, it does not ring now, and this must not wait.
        if self.set_for.is_some_and(|at| at <= Instant::now()) {
            let _ = self.timer.wait();
            self.set_for = None;
        }
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::Rate;

    #[test]
    fn a_gate_without_limits_is_always_open() {
        let counters = Counters::default();
        let mut gate = Gate::new(Direction::Sent, RateLimits::default());
        for _ in 0..1000 {
            assert!(gate.is_open(&counters));
            gate.passed(1 << 30);
        }
        assert_eq!((gate.opens_at(), counters.traffic(Direction::Sent).limited), (None, 0));
    }

    #[test]
    fn what_passed_is_waited_for_and_counted_once() {
        let counters = Counters::default();
        let bytes = Some(Rate { per_second: 1_000_000, burst: 1 });
        let mut gate = Gate::new(Direction::Received, RateLimits { operations: None, bytes });
        assert!(gate.is_open(&counters));
        gate.passed(20_000);
        for _ in 0..3 {
            assert!(!gate.is_open(&counters));
        }
        let opens_at = gate.opens_at().unwrap();
        std::thread::sleep(opens_at.saturating_duration_since(Instant::now()));
        assert!(gate.is_open(&counters));
        assert_eq!(gate.opens_at(), None);
        let traffic = counters.traffic(Direction::Received);
        assert_eq!(traffic.limited, 1);
        assert!(traffic.limited_for >= Duration::from_millis(19), "{:?}", traffic.limited_for);
        assert_eq!(counters.traffic(Direction::Sent).limited, 0);
    }

    #[test]
    fn an_alarm_rings_at_the_first_time_and_can_be_set_off() {
        let mut alarm = Alarm::new().unwrap();
        let rings = |alarm: &Alarm, milliseconds| {
            let mut poll = libc::pollfd { fd: alarm.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one entry, which the kernel writes to.
            unsafe { libc::poll(&raw mut poll, 1, milliseconds) == 1 }
        };
        let soon = Instant::now() + Duration::from_millis(5);
        alarm.set([Some(soon + Duration::from_secs(60)), Some(soon)]);
        assert!(rings(&alarm, 5000));
        std::thread::sleep(soon.saturating_duration_since(Instant::now()));
        alarm.take();
        assert!(!rings(&alarm, 0));
        alarm.set([Some(Instant::now() + Duration::from_millis(1)), None]);
        alarm.set([None, None]);
        assert!(!rings(&alarm, 20));
        alarm.take();
    }
}
