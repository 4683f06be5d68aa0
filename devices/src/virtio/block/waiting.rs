//! Requests that wait in the device: for its limits, or for a host that could not do them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::handle::Counters;
use super::workers::Job;
use crate::bucket::{Limiter, RateLimits};
use crate::virtio::queue::Chain;

/// Requests that wait for the limits, in the order in which they came. A queue holds as many as it has
/// descriptors.
pub struct Limited {
    limiter: Limiter,
    timer: TimerFd,
    /// When the timer expires.
    wakes_at: Option<Instant>,
    jobs: VecDeque<Job>,
    /// Since when some request waits.
    since: Option<Instant>,
}

impl Limited {
    /// Nothing waits.
    ///
    /// # Errors
    /// No timer can be had.
    pub fn new(limits: RateLimits) -> io::Result<Self> {
        Ok(Self {
            limiter: Limiter::new(limits, Instant::now()),
            timer: TimerFd::new()?,
            wakes_at: None,
            jobs: VecDeque::new(),
            since: None,
        })
    }

    /// Readable when something that waits may pass.
    pub fn event(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Lets requests pass as far as the limits go: of those that wait already, then of `new`. What passes is in
    /// `new` afterwards.
    pub fn pass(&mut self, new: &mut Vec<Job>, counters: &Counters) {
        let now = Instant::now();
        if self.wakes_at.is_some_and(|at| at <= now) {
            // It has expired, so this does not wait.
            let _ = self.timer.wait();
            self.wakes_at = None;
        }
        let waited = self.jobs.len();
        self.jobs.extend(new.drain(..));
        let mut wait = None;
        while let Some(job) = self.jobs.front() {
            if let Err(time) = self.limiter.pass(job.bytes(), now) {
                wait = Some(time);
                break;
            }
            new.extend(self.jobs.pop_front());
        }
        let passed = new.len();
        // Those that came now and stay, of which none was counted before.
        for _ in waited.saturating_sub(passed)..self.jobs.len() {
            counters.waits();
        }
        self.count_time(now, counters);
        if let Some(time) = wait {
            self.wake_in(time, now);
        }
    }

    fn count_time(&mut self, now: Instant, counters: &Counters) {
        if let Some(since) = self.since.take() {
            counters.waited(now.saturating_duration_since(since));
        }
        self.since = (!self.jobs.is_empty()).then_some(now);
    }

    fn wake_in(&mut self, time: Duration, now: Instant) {
        // A timer of no time is none.
        let time = time.max(Duration::from_micros(1));
        if self.timer.reset(time, None).is_ok() {
            self.wakes_at = now.checked_add(time);
        }
    }

    /// Whether something waits.
    pub fn any(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Forgets what waits.
    pub fn clear(&mut self) {
        self.jobs.clear();
        self.since = None;
    }
}

/// Requests that the host could not do, by their queues.
pub type Failed = Vec<(usize, Chain)>;
