//! The traditional memory balloon (virtio 1.2, section 5.5).
//!
//! The guest's driver names pages that it gives up; the host drops them as soon
//! as enough of them have come together to go in one go (`pending`). Where the
//! host wants the balloon, and what the driver is told on the way there, is in
//! `pace`. Statistics and free page reporting stand in their own modules.
//!
//! # Why free page hints are not offered
//! VIRTIO_BALLOON_F_FREE_PAGE_HINT (section 5.5.6.5) names pages that were free
//! a moment ago. Linux's driver keeps them allocated while it hints, but its
//! shrinker gives them back to the guest under memory pressure at any time,
//! hints that the device has not seen yet included
//! (`drivers/virtio/virtio_balloon.c`: `virtio_balloon_shrinker_scan`). A device
//! that drops a hinted page can so drop one that is in use again. Only who
//! copies a guest's memory, and sees what is written meanwhile, can use hints;
//! nobody here does. Free page reporting is the safe way: there the driver keeps
//! the pages until the device has answered.

mod goal;
pub(crate) mod handle;
mod moves;
pub mod pace;
pub mod saved;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use devices::sandbox::SandboxNeeds;
use devices::state::StateError;
use devices::virtio::device::{Active, Progress, VirtioDevice, read_part};
use devices::virtio::queue::{Budget, Faults, Verdict, serve};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use goal::free;
use handle::{Answers, Driver, Shared};
pub use handle::{Handle, SILENT_AFTER, TargetError};
use moves::{Flow, move_pages};

use crate::advise;
use crate::discard::Discard;
use crate::reporting;
use crate::statistics::Statistics;
use crate::timer::Timer;
use crate::unmanaged::Unmanaged;
use api::guest_memory::balloon_for;
use api::units::{Bytes, Pages};
use pace::Pace;

/// Feature bits (virtio 1.2, section 5.5.3). This one: the driver says that it
/// takes a page back before it touches it. What it gives up can wait for its
/// neighbours then, as nobody misses it meanwhile.
pub const MUST_TELL_HOST: u32 = 0;
/// The driver tells how the guest's memory is doing.
pub const STATS_VQ: u32 = 1;
/// The driver may take pages back when the guest is out of memory.
pub const DEFLATE_ON_OOM: u32 = 2;
/// The driver tells what it fills free pages with. Without this, Linux reports no free pages
/// where it fills them (`init_on_free`, `page_poison`).
pub const PAGE_POISON: u32 = 4;
/// The driver reports free pages that the host may drop.
pub const PAGE_REPORTING: u32 = 5;

/// Pages in one chain at most; Linux sends 256, Windows 1024.
const MOST_PAGES: u64 = 16 << 10;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;

/// Five queues, as reporting is the fourth for drivers that leave no gap for
/// the free page hint queue that isn't offered (Linux), and the fifth for
/// drivers that count as section 5.5.2 does. Without statistics it is the third:
/// Linux gives up on the whole balloon where reporting has fewer than 32 places
/// (`PAGE_REPORTING_CAPACITY`).
const QUEUE_SIZES: [u16; 5] = [128; 5];

/// Of page numbers or statistics in one event.
const BUDGET: Budget = Budget { chains: 64, bytes: MOST_PAGES * 4 };

/// Of reported memory, which costs by the buffer rather than by the byte.
const REPORTING_BUDGET: Budget = Budget { chains: 16, bytes: 1 << 30 };

/// The configuration space (section 5.5.4): num_pages, actual, free_page_hint_cmd_id, poison_val.
const CONFIG_SIZE: usize = 16;
const ACTUAL: usize = 4;
const POISON: usize = 12;

/// How often the device looks after a balloon on its way. Never while it rests.
const TICK: Duration = Duration::from_millis(100);

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
    /// Ask the guest for what it took back rather than run out of memory as soon as it says that it can spare it
    /// again. Else it keeps that until the next target.
    pub refills: bool,
}

/// What a queue is for, with the features that were agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The balloon device.
pub struct Balloon {
    shared: Arc<Shared>,
    features: u64,
    discard: Discard,
    faults: Faults,
    statistics: Statistics,
    pace: Pace,
    /// num_pages as the guest was last told: what the balloon should hold now.
    told: Pages,
    /// The last of the host's requests that was taken up.
    request: u64,
    timer: Timer,
    refills: bool,
    /// What the guest fills free pages with (poison_val).
    poison: u32,
    /// The guest has taken the last page out of the balloon, and the host does not know it yet.
    emptied: bool,
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
            (MUST_TELL_HOST, true),
            (PAGE_POISON, true),
            (STATS_VQ, !config.statistics_interval.is_zero()),
            (DEFLATE_ON_OOM, config.deflate_on_oom),
            (PAGE_REPORTING, config.reporting),
        ];
        let features = offered.iter().filter(|(_, on)| *on).fold(0, |bits, (bit, _)| bits | 1 << bit);
        let handle = Handle(shared.clone());
        let pace = Pace::new(config.map, balloon_for(config.map, config.target, Bytes::ZERO));
        let device = Self {
            shared,
            features,
            discard,
            faults: Faults::default(),
            statistics,
            told: pace.asked(),
            pace,
            request: 0,
            timer: Timer::new(TICK)?,
            refills: config.refills,
            poison: 0,
            emptied: false,
        };
        Ok((device, handle))
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
        let inflate = if active.features & 1 << MUST_TELL_HOST != 0 { Flow::GiveSoon } else { Flow::Give };
        // The guest expects to find its pattern there (section 5.5.6.7): nothing may go.
        let keep_reported = active.features & 1 << PAGE_POISON != 0 && self.poison != 0;
        match role {
            Role::Inflate => serve(active, index, faults, BUDGET, |memory, chain| {
                move_pages(memory, chain, discard, shared, inflate)
            }),
            Role::Deflate => serve(active, index, faults, BUDGET, |memory, chain| {
                move_pages(memory, chain, discard, shared, Flow::TakeBack)
            }),
            Role::Statistics => {
                let statistics = &mut self.statistics;
                let progress =
                    serve(active, index, faults, BUDGET, |memory, chain| statistics.take(memory, chain));
                self.aim();
                self.pace.heard(free(&self.shared));
                self.refill();
                progress
            }
            Role::Reporting => serve(active, index, faults, REPORTING_BUDGET, |_, chain| {
                if keep_reported {
                    return Verdict::Used(0);
                }
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
        let wanted = self.shared.wanted();
        let mut state = self.shared.state();
        state.counters.discarded = done.bytes;
        state.counters.discard_ranges = done.ranges;
        state.counters.discard_calls = done.calls;
        state.counters.discard_failures = done.failures;
        state.counters.huge_pages_whole = done.huge_pages_whole;
        state.counters.huge_pages_broken = done.huge_pages_broken;
        let left = |of: Pages, held: Bytes| Pages(of.0.saturating_sub(held.pages().0));
        // What waits for its neighbours will go; parts of huge pages are not the driver's fault.
        let gone_soon = left(self.pace.reached(), self.discard.waiting());
        state.actual = left(gone_soon, self.discard.kept());
        state.reached = self.pace.reached();
        state.settled = self.pace.is_settled();
        state.taken_back = if self.pace.has_taken_back() {
            Pages(self.pace.wanted().0.saturating_sub(self.pace.reached().0))
        } else {
            Pages(0)
        };
        state.followed |= state.settled || gone_soon >= wanted;
        state.counters.malformed = self.faults.total();
        if broken {
            state.driver = Driver::Broken;
        }
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut config = [0; CONFIG_SIZE];
        for (at, value) in [
            (0, register(self.told)),
            (ACTUAL, register(self.pace.reached())),
            (POISON, self.poison.to_le_bytes()),
        ] {
            for (byte, value) in config.iter_mut().skip(at).zip(value) {
                *byte = value;
            }
        }
        config
    }

    /// Whether somebody wants a report that is newer than the last.
    fn take_question(&self) -> bool {
        std::mem::take(&mut self.shared.state().report_wanted)
    }

    /// Before the event loop takes more into the balloon: has the host use huge pages again for a
    /// guest that had taken everything back.
    fn note_emptied(&mut self) {
        if std::mem::take(&mut self.emptied) {
            self.discard.all_used();
        }
    }

    /// After any event: lets go what waits for nothing more, tells the guest what it is asked for
    /// now, and keeps time while there is something to come.
    fn follow_up(&mut self, active: &mut Active, quiet: bool) {
        if quiet || self.pace.reached() >= self.pace.asked() {
            self.discard.finish();
        }
        if self.pace.asked() != self.told {
            self.told = self.pace.asked();
            active.config_interrupt.raise();
        }
        // One that broke the protocol gets nowhere until it starts anew.
        let broken = self.shared.state().driver == Driver::Broken;
        let wanted = !broken && (self.pace.is_moving() || self.discard.waiting() > Bytes::ZERO);
        if let Err(error) = self.timer.run(wanted) {
            tracing::warn!("the balloon may not get where it should: its timer can't be set: {error}");
        }
    }
}

/// Pages as a 32-bit little-endian register holds them; saturates.
fn register(pages: Pages) -> [u8; 4] {
    u32::try_from(pages.0).unwrap_or(u32::MAX).to_le_bytes()
}

/// The device's own descriptors, by their place.
const WAKE: usize = 0;
const STATISTICS_TIMER: usize = 1;
const TIMER: usize = 2;

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

    fn sandbox_needs(&self) -> SandboxNeeds {
        SandboxNeeds::calls(&[advise::CALL])
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        read_part(&config, offset, data);
    }

    /// Only `actual` and `poison_val` are the driver's to write.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Some(offset) = usize::try_from(offset).ok().filter(|offset| *offset < CONFIG_SIZE) else {
            return;
        };
        let mut config = self.config();
        for (byte, value) in config.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
        let field =
            |at| config.iter().skip(at).take(4).rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
        self.poison = field(POISON);
        let before = self.pace.reached();
        let took_back = self.pace.arrived(Pages(u64::from(field(ACTUAL))));
        let empties = before > Pages(0) && self.pace.reached() == Pages(0);
        self.emptied |= empties;
        self.publish(false);
        if took_back {
            let left = self.pace.reached();
            self.shared.took_back(Pages(before.0.saturating_sub(left.0)).bytes(), left);
        } else if self.pace.reached() == self.pace.asked() {
            self.shared.tell_moved();
        }
        let there = self.pace.reached() >= self.pace.asked();
        let comes_next = self.pace.waits_for_news() || self.discard.waiting() > Bytes::ZERO;
        if empties || self.pace.asked() != self.told || there && comes_next {
            // The rest is for the event loop. The one failure is a wake-up already pending.
            let _ = self.shared.wake.write(1);
        }
    }

    fn activate(&mut self, active: &mut Active) {
        let statistics = active.features & 1 << STATS_VQ != 0;
        let wanted = self.shared.wanted();
        {
            let mut state = self.shared.state();
            // A driver brings its buffer unasked, with its first report.
            state.driver = Driver::Active(Answers::owed(statistics));
            state.deflates_on_oom = active.features & 1 << DEFLATE_ON_OOM != 0;
            state.followed = wanted == Pages(0);
        }
        if statistics {
            self.statistics.start();
        }
        self.shared.tell_moved();
    }

    fn reset(&mut self) {
        self.faults.forgive();
        self.statistics.stop();
        self.discard.take_back_all();
        (self.poison, self.emptied) = (0, false);
        {
            let mut state = self.shared.state();
            // What this driver said of its guest says nothing of the next one's.
            (state.report, state.report_wanted) = (None, false);
            (state.unmanaged, state.deflates_on_oom) = (Unmanaged::default(), false);
            state.took_back = None;
        }
        self.take_request();
        self.aim();
        self.pace.restart();
        self.told = self.pace.asked();
        // Disarming fails only for a bad descriptor.
        let _ = self.timer.run(false);
        self.publish(false);
        let mut state = self.shared.state();
        (state.driver, state.followed) = (Driver::Absent, false);
        drop(state);
        self.shared.tell_moved();
    }

    /// A guest that stands still for long must not keep what it has given up.
    fn pause(&mut self) {
        self.discard.finish();
        self.publish(false);
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        let Some(role) = self.role(index, active.features) else { return Progress::Done };
        if role == Role::Inflate {
            self.note_emptied();
        }
        let progress = self.serve_role(role, index, active);
        let broken = progress == Progress::Broken;
        if broken {
            self.shared.state().driver = Driver::Broken;
            self.shared.tell_moved();
        }
        // On a vCPU's thread no memory goes to the host: that is left to the event loop.
        if role != Role::Deflate {
            self.follow_up(active, broken);
        } else if broken {
            let _ = self.shared.wake.write(1);
        }
        self.publish(broken);
        progress
    }

    /// Pages that come back are only counted, and Linux's driver waits for every 256 of them.
    fn is_served_by_vcpu(&self, index: usize) -> bool {
        index == DEFLATE
    }

    fn own_events(&self) -> Vec<RawFd> {
        vec![self.shared.wake.as_raw_fd(), self.statistics.timer(), self.timer.descriptor()]
    }

    fn own_event(&mut self, index: usize, active: Option<&mut Active>) {
        match index {
            WAKE => drop(self.shared.wake.read()),
            STATISTICS_TIMER => return self.statistics.tick(STATISTICS, active),
            TIMER => self.timer.read(),
            _ => return,
        }
        self.note_emptied();
        let (is_new, is_asked) = (self.take_request(), self.take_question());
        let Some(active) = active else {
            // Nobody to ask: a driver that comes finds it in the configuration space. One that broke the
            // protocol takes nothing back before a reset.
            self.told = self.pace.asked();
            self.discard.finish();
            // Disarming fails only for a bad descriptor.
            let _ = self.timer.run(false);
            return self.publish(false);
        };
        if index == TIMER && !self.shared.state().resting {
            self.pace.tick();
        }
        // What the guest said last may be a second old: it had less free then, or more.
        let decides = is_new && self.pace.asked() < self.pace.wanted();
        if is_asked || decides || index == WAKE && self.pace.waits_for_news() {
            self.statistics.ask(STATISTICS, active);
        }
        self.follow_up(active, index == TIMER);
        self.publish(false);
    }

    fn save(&self) -> Result<Value, StateError> {
        self.saved()
    }

    fn restore(&mut self, state: Value, active: Option<&mut Active>) -> Result<(), StateError> {
        self.take_in(state, active)
    }
}
