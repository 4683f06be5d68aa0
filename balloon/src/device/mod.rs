//! The traditional memory balloon (virtio 1.2, section 5.5).
//!
//! The guest's driver names pages that it gives up; the host drops them at
//! once. Statistics and free page reporting stand in their own modules.

mod handle;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::virtio::device::{Active, Progress, VirtioDevice};
use devices::virtio::queue::{Budget, Chain, Faults, Verdict, serve};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::GuestMemoryMmap;

pub(crate) use handle::{Driver, Shared};
pub use handle::{Handle, SILENT_AFTER, TargetError};

use crate::discard::Discard;
use crate::reporting;
use crate::statistics::Statistics;
use crate::units::{Bytes, Pages};

/// Feature bits (virtio 1.2, section 5.5.3).
pub const STATS_VQ: u32 = 1;
/// The driver may take pages back when the guest is out of memory.
pub const DEFLATE_ON_OOM: u32 = 2;
/// The driver reports free pages that the host may drop.
pub const PAGE_REPORTING: u32 = 5;

/// Pages in one chain at most; Linux sends 256, Windows 1024.
const MOST_PAGES: u64 = 16 << 10;

/// Page numbers read and discarded at a time: 4 KiB of them, on the stack.
const BATCH: usize = 1024;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;

/// Five queues, as reporting is the fourth for drivers that leave no gap for
/// the free page hint queue that isn't offered (Linux), and the fifth for
/// drivers that count as section 5.5.2 does.
const QUEUE_SIZES: [u16; 5] = [128, 128, 16, 128, 128];

/// Of page numbers or statistics in one event.
const BUDGET: Budget = Budget { chains: 64, bytes: MOST_PAGES * 4 };

/// Of reported memory, which costs by the buffer rather than by the byte.
const REPORTING_BUDGET: Budget = Budget { chains: 16, bytes: 1 << 30 };

/// num_pages and actual (section 5.5.4).
const CONFIG_SIZE: usize = 8;
const ACTUAL: usize = 4;

/// What a balloon is made with.
#[derive(Clone, Debug)]
pub struct Config {
    /// All guest RAM.
    pub map: Bytes,
    /// What the guest shall have once its driver is there.
    pub target: Bytes,
    /// Offer the guest to take pages back rather than run out of memory.
    pub deflate_on_oom: bool,
    /// Offer free page reporting.
    pub reporting: bool,
    /// How often the guest is asked for statistics; zero for never.
    pub statistics_interval: Duration,
}

/// What a queue is for, with the features that were agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// Page numbers flow one of two ways.
#[derive(Clone, Copy)]
enum Flow {
    ToHost,
    ToGuest,
}

/// The balloon device.
pub struct Balloon {
    shared: Arc<Shared>,
    features: u64,
    discard: Discard,
    faults: Faults,
    statistics: Statistics,
    /// num_pages as the guest was last told: what the balloon should hold.
    wanted: Pages,
}

impl Balloon {
    /// A balloon over the memory that `discard` gives back, and the handle that moves it.
    ///
    /// # Errors
    /// No eventfd or timerfd can be had, or the target is more than the map.
    pub fn new(config: Config, discard: Discard) -> io::Result<(Self, Handle)> {
        if config.target > config.map {
            let error = TargetError::OutOfMap { target: config.target, map: config.map };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let shared = Arc::new(Shared::new(config.map, config.target)?);
        let statistics = Statistics::new(shared.clone(), config.statistics_interval)?;
        let offered = [
            (STATS_VQ, !config.statistics_interval.is_zero()),
            (DEFLATE_ON_OOM, config.deflate_on_oom),
            (PAGE_REPORTING, config.reporting),
        ];
        let features = offered.iter().filter(|(_, on)| *on).fold(0, |bits, (bit, _)| bits | 1 << bit);
        let handle = Handle(shared.clone());
        let wanted = wanted_pages(config.map, config.target);
        Ok((Self { shared, features, discard, faults: Faults::default(), statistics, wanted }, handle))
    }

    /// Section 5.5.2, and the numbering without gaps that Linux uses.
    fn role(&self, index: usize, features: u64) -> Option<Role> {
        let has = |bit: u32| features & 1 << bit != 0;
        match index {
            INFLATE => Some(Role::Inflate),
            DEFLATE => Some(Role::Deflate),
            STATISTICS if has(STATS_VQ) => Some(Role::Statistics),
            _ if has(PAGE_REPORTING) => Some(Role::Reporting),
            _ => None,
        }
    }

    fn serve_role(&mut self, role: Role, index: usize, active: &mut Active) -> Progress {
        let (faults, discard, shared) = (&mut self.faults, &mut self.discard, &self.shared);
        match role {
            Role::Inflate => serve(active, index, faults, BUDGET, |memory, chain| {
                move_pages(memory, chain, discard, shared, Flow::ToHost)
            }),
            Role::Deflate => serve(active, index, faults, BUDGET, |memory, chain| {
                move_pages(memory, chain, discard, shared, Flow::ToGuest)
            }),
            Role::Statistics => {
                let statistics = &mut self.statistics;
                serve(active, index, faults, BUDGET, |memory, chain| statistics.take(memory, chain))
            }
            Role::Reporting => serve(active, index, faults, REPORTING_BUDGET, |_, chain| {
                let Some(reported) = reporting::drop_reported(chain, discard) else {
                    return Verdict::Malformed;
                };
                let mut state = shared.state();
                state.counters.reported = state.counters.reported.saturating_add(reported);
                Verdict::Used(0)
            }),
        }
    }

    /// Brings what others may see up to date after work on a queue.
    fn publish(&mut self, broken: bool) {
        let done = self.discard.done();
        let mut state = self.shared.state();
        state.counters.discarded = done.bytes;
        state.counters.discard_ranges = done.ranges;
        state.counters.discard_calls = done.calls;
        state.counters.discard_failures = done.failures;
        state.counters.malformed = self.faults.total();
        if broken {
            state.driver = Driver::Broken;
        }
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut config = [0; CONFIG_SIZE];
        let (wanted, actual) = config.split_at_mut(ACTUAL);
        wanted.copy_from_slice(&register(self.wanted));
        actual.copy_from_slice(&register(self.shared.state().actual));
        config
    }
}

/// Pages as a 32-bit little-endian register holds them; saturates.
fn register(pages: Pages) -> [u8; 4] {
    u32::try_from(pages.0).unwrap_or(u32::MAX).to_le_bytes()
}

/// What the balloon holds when the guest has `target` of `map`.
fn wanted_pages(map: Bytes, target: Bytes) -> Pages {
    map.saturating_sub(target).pages()
}

/// Reads the page numbers of an inflate or deflate chain, a batch at a time, and moves the pages.
fn move_pages(
    memory: &GuestMemoryMmap,
    chain: &Chain,
    discard: &mut Discard,
    shared: &Shared,
    flow: Flow,
) -> Verdict {
    let bytes = chain.len();
    if !chain.writable().is_empty() || !bytes.is_multiple_of(4) || bytes / 4 > MOST_PAGES {
        return Verdict::Malformed;
    }
    let mut reader = chain.reader(memory);
    let mut piece = [0; BATCH * 4];
    let mut pfns = [0; BATCH];
    loop {
        let count = reader.read(&mut piece);
        let numbers = piece.get(..count).unwrap_or_default().chunks_exact(4);
        let mut batch = 0;
        for (pfn, number) in pfns.iter_mut().zip(numbers) {
            *pfn = <[u8; 4]>::try_from(number).map_or(0, u32::from_le_bytes);
            batch += 1;
        }
        let Some(batch) = pfns.get_mut(..batch).filter(|batch| !batch.is_empty()) else {
            return Verdict::Used(0);
        };
        match flow {
            Flow::ToHost => {
                let given = discard.give_up(batch);
                let mut state = shared.state();
                state.counters.inflated = state.counters.inflated.saturating_add(given);
            }
            Flow::ToGuest => {
                let taken = discard.take_back(batch);
                let mut state = shared.state();
                state.counters.deflated = state.counters.deflated.saturating_add(taken);
            }
        }
    }
}

/// The device's own descriptors, by their place.
const WAKE: usize = 0;
const TIMER: usize = 1;

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let there = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(there) {
            *byte = *value;
        }
    }

    /// Only `actual` is the driver's to write.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Some(offset) = usize::try_from(offset).ok().filter(|offset| *offset < CONFIG_SIZE) else {
            return;
        };
        let mut actual = register(self.shared.state().actual);
        for (place, value) in (offset..).zip(data) {
            if let Some(byte) = place.checked_sub(ACTUAL).and_then(|place| actual.get_mut(place)) {
                *byte = *value;
            }
        }
        self.shared.state().actual = Pages(u64::from(u32::from_le_bytes(actual)));
    }

    fn activate(&mut self, active: &mut Active) {
        let statistics = active.features & 1 << STATS_VQ != 0;
        let owes_statistics = statistics.then(Instant::now);
        self.shared.state().driver = Driver::Active { owes_statistics };
        if statistics {
            self.statistics.start();
        }
    }

    fn reset(&mut self) {
        self.faults.forgive();
        self.statistics.stop();
        self.discard.take_back_all();
        let mut state = self.shared.state();
        state.driver = Driver::Absent;
        state.actual = Pages(0);
        self.wanted = wanted_pages(self.shared.map, state.target);
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        let Some(role) = self.role(index, active.features) else { return Progress::Done };
        let progress = self.serve_role(role, index, active);
        self.publish(progress == Progress::Broken);
        progress
    }

    fn own_events(&self) -> Vec<RawFd> {
        vec![self.shared.wake.as_raw_fd(), self.statistics.timer()]
    }

    fn own_event(&mut self, index: usize, active: Option<&mut Active>) {
        match index {
            WAKE => {
                let _ = self.shared.wake.read();
                let wanted = wanted_pages(self.shared.map, self.shared.state().target);
                let changed = wanted != self.wanted;
                self.wanted = wanted;
                if let (Some(active), true) = (active, changed) {
                    active.interrupt.config_changed();
                }
            }
            TIMER => self.statistics.tick(STATISTICS, active),
            _ => {}
        }
    }
}
