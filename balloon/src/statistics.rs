//! The statistics queue (virtio 1.2, section 5.5.6.3): the driver leaves one
//! buffer with the device, which gives it back to ask for fresh values.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::virtio::device::Active;
use devices::virtio::queue::{Chain, Head, Verdict, give_back};
use vm_memory::GuestMemoryMmap;

use crate::device::handle::{Answers, Driver, Shared};
use crate::stalls::Stalls;
use crate::timer::Timer;
use api::report::Report;

/// One statistic in the buffer: a tag of 2 bytes and a value of 8, packed (section 5.5.6.3.1).
const ENTRY: usize = 10;

/// Statistics read from one buffer; Linux 6.12 sends 16, the rest is ignored.
const MOST_ENTRIES: usize = 256;

/// How often a guest is asked that waits for memory, and how many times since it last did more so.
/// What others ask it meanwhile does not count.
const HURRY: Duration = Duration::from_millis(250);
const HURRIED: u32 = 8;

/// Asks for statistics at an interval, counted from the last question, and keeps the buffer between the questions.
pub(crate) struct Statistics {
    shared: Arc<Shared>,
    interval: Duration,
    timer: Timer,
    held: Option<Head>,
    stalls: Stalls,
    /// Times that the timer still comes at a quicker pace.
    hurried: u32,
}

impl Statistics {
    pub(crate) fn new(shared: Arc<Shared>, interval: Duration) -> io::Result<Self> {
        let timer = Timer::new(interval)?;
        Ok(Self { shared, interval, timer, held: None, stalls: Stalls::default(), hurried: 0 })
    }

    pub(crate) fn timer(&self) -> RawFd {
        self.timer.descriptor()
    }

    pub(crate) fn start(&mut self) {
        if let Err(error) = self.timer.run(true) {
            tracing::warn!("no statistics from the guest: its timer can't be set: {error}");
        }
    }

    pub(crate) fn stop(&mut self) {
        self.held = None;
        (self.stalls, self.hurried) = (Stalls::default(), 0);
        // Disarming fails only for a bad descriptor.
        let _ = self.timer.run(false);
    }

    /// The driver's buffer, where the device has it.
    pub(crate) fn held(&self) -> Option<Head> {
        self.held
    }

    /// Goes on with a driver that was there before.
    pub(crate) fn resume(&mut self, held: Option<Head>) {
        self.held = held;
        self.start();
    }

    /// The driver's buffer, with its answer.
    pub(crate) fn take(&mut self, memory: &GuestMemoryMmap, chain: &Chain) -> Verdict {
        if !chain.writable().is_empty() || self.held.is_some() {
            return Verdict::Malformed;
        }
        self.held = Some(chain.head());
        let report = read(memory, chain);
        let stalls = self.stalls.look(&report);
        self.shared.take(report);
        if stalls {
            self.hurried = HURRIED;
            self.shared.stalled();
        }
        self.pace();
        Verdict::Kept
    }

    /// Asks more often while the guest waits for memory.
    fn pace(&mut self) {
        let interval = if self.hurried > 0 { self.interval.min(HURRY) } else { self.interval };
        if let Err(error) = self.timer.set_interval(interval) {
            tracing::warn!("the guest is asked for statistics as often as before: {error}");
        }
    }

    /// Asks at the interval.
    pub(crate) fn tick(&mut self, queue: usize, active: Option<&mut Active>) {
        self.timer.read();
        self.hurried = self.hurried.saturating_sub(1);
        if let Some(active) = active {
            self.ask(queue, active);
        }
    }

    /// Asks for fresh values, where the driver has answered the last question.
    pub(crate) fn ask(&mut self, queue: usize, active: &mut Active) {
        let Some(head) = self.held.take() else { return };
        {
            let mut state = self.shared.state();
            state.counters.statistics_requests += 1;
            if let Driver::Active(answers) = &mut state.driver {
                *answers = Answers::Owed(Instant::now());
            }
        }
        // Whoever asks more often than the timer leaves it nothing to ask.
        if let Err(error) = self.timer.restart() {
            tracing::warn!("the guest is asked for statistics more often than it should be: {error}");
        }
        give_back(active, queue, head, 0);
    }
}

fn read(memory: &GuestMemoryMmap, chain: &Chain) -> Report {
    let mut bytes = [0; ENTRY * MOST_ENTRIES];
    let count = chain.reader(memory).read(&mut bytes);
    let mut report = Report::default();
    for entry in bytes.get(..count).unwrap_or_default().chunks_exact(ENTRY) {
        if let Some((tag, value)) = entry.split_first_chunk::<2>()
            && let Ok(value) = <[u8; 8]>::try_from(value)
        {
            report.set(u16::from_le_bytes(*tag), u64::from_le_bytes(value));
        }
    }
    report
}
