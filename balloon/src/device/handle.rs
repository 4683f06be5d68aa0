//! The host's side of the balloon: what the API asks of it, from any thread.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use api::guest_memory::{Had, balloon_for};
use api::report::Report;
use api::status::{AgedReport, BalloonCounters, DriverState, OomDeflate};
use api::units::{Bytes, Pages};

use crate::unmanaged::Unmanaged;

/// How long a request for statistics may go unanswered until the driver counts as silent.
pub const SILENT_AFTER: Duration = Duration::from_secs(5);

/// Why a target can't be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Nobody is there to reach it.
    #[error(
        "the guest has no working balloon driver: wait until it has booted, or load virtio_balloon in it"
    )]
    NoDriver,
    /// More than the guest's memory map, or nothing at all.
    #[error("target {target} must be more than nothing and at most the guest's memory map of {map}")]
    OutOfMap {
        /// As asked.
        target: Bytes,
        /// All guest RAM.
        map: Bytes,
    },
}

/// What the device knows of its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    Absent,
    Active(Answers),
    Broken,
}

/// How the driver stands with questions for statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answers {
    /// It did not agree on them.
    Never,
    /// It was asked at that moment, and has not answered yet.
    Owed(Instant),
    /// It has answered the last question.
    Given,
}

impl Answers {
    /// Those of a driver that was just asked; never, where it did not agree on them.
    pub(crate) fn owed(agreed: bool) -> Self {
        if agreed { Self::Owed(Instant::now()) } else { Self::Never }
    }
}

/// What the device and its handles share; held for moments only.
pub(crate) struct State {
    pub(crate) target: Bytes,
    /// Counts requests for a target, as the same one may be asked for again.
    pub(crate) requests: u64,
    /// One of those that the device has not taken up asks a guest anew that has taken pages back.
    pub(crate) asks_anew: bool,
    /// The guest could not reach the target, and is no longer asked to.
    pub(crate) settled: bool,
    /// The balloon has been where it was wanted since its driver started.
    pub(crate) followed: bool,
    /// In the balloon, and given back to the host.
    pub(crate) actual: Pages,
    /// In the balloon, as the guest counts it.
    pub(crate) reached: Pages,
    /// The guest may take pages back when it is out of memory, and so counts what is in the balloon as its own
    /// (`virtballoon_probe` in Linux takes pages off `MemTotal` only where it may not).
    pub(crate) deflates_on_oom: bool,
    /// What the guest's kernel does not manage.
    pub(crate) unmanaged: Unmanaged,
    pub(crate) driver: Driver,
    /// What the guest has taken back rather than run out of memory, and still has.
    pub(crate) taken_back: Pages,
    /// When it last did, since its driver started, and what it had then.
    pub(crate) took_back: Option<(Instant, Bytes)>,
    pub(crate) report: Option<Received>,
    /// Somebody wants a newer one.
    pub(crate) report_wanted: bool,
    /// The guest's processors stand still: what it does not do says nothing of what it can.
    pub(crate) resting: bool,
    pub(crate) counters: BalloonCounters,
}

/// A report, and what the guest had when it came.
pub(crate) struct Received {
    pub(crate) at: Instant,
    pub(crate) report: Report,
    pub(crate) had: Option<Had>,
}

impl Received {
    pub(crate) fn aged(&self) -> AgedReport {
        AgedReport {
            age_ms: u64::try_from(self.at.elapsed().as_millis()).unwrap_or(u64::MAX),
            had: self.had.map(|had| had.all()),
            managed: self.had.map(|had| had.managed),
            statistics: self.report.clone(),
        }
    }
}

/// A guest's memory that is not all there from the start.
pub(crate) struct Plugs {
    /// What the guest has plugged.
    pub(crate) plugged: Box<dyn Fn() -> Bytes + Send + Sync>,
    /// The most that it can plug.
    pub(crate) most: Bytes,
    /// Called, on the balloon's event loop, when the guest's kernel manages more or less of what it was given.
    pub(crate) changed: Tell,
}

pub(crate) struct Shared {
    pub(crate) map: Bytes,
    /// Tells the device that the target has changed, or that a report is wanted.
    pub(crate) wake: EventFd,
    /// Tells whoever steers that a driver has come or gone, or is where it was asked to be.
    pub(crate) moved: EventFd,
    state: Mutex<State>,
    plugs: OnceLock<Plugs>,
    when_reported: OnceLock<Tell>,
    when_stalled: OnceLock<Tell>,
    when_taken_back: OnceLock<Tell>,
}

/// Something to be done when the guest has news.
type Tell = Box<dyn Fn() + Send + Sync>;

impl Shared {
    pub(crate) fn new(map: Bytes, target: Bytes) -> io::Result<Self> {
        let state = State {
            target,
            requests: 0,
            asks_anew: false,
            settled: false,
            followed: false,
            actual: Pages(0),
            reached: Pages(0),
            deflates_on_oom: false,
            unmanaged: Unmanaged::default(),
            driver: Driver::Absent,
            taken_back: Pages(0),
            took_back: None,
            report: None,
            report_wanted: false,
            resting: false,
            counters: BalloonCounters::default(),
        };
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self {
            map,
            wake: event()?,
            moved: event()?,
            state: Mutex::new(state),
            plugs: OnceLock::new(),
            when_reported: OnceLock::new(),
            when_stalled: OnceLock::new(),
            when_taken_back: OnceLock::new(),
        })
    }

    /// What the guest has plugged beside what it booted with, and what it could plug and has not.
    fn plugged(&self) -> (Bytes, Bytes) {
        self.plugs.get().map_or((Bytes::ZERO, Bytes::ZERO), |plugs| {
            let plugged = (plugs.plugged)();
            (plugged, plugs.most.saturating_sub(plugged))
        })
    }

    /// What the guest has now, whose kernel says that it manages `total`.
    fn had(&self, total: Bytes, unplugged: Bytes) -> Had {
        let state = self.state();
        let balloon = state.reached.bytes();
        let managed = if state.deflates_on_oom { total.saturating_sub(balloon) } else { total };
        let map = self.map.saturating_sub(unplugged);
        Had::of(map, map.saturating_sub(balloon), managed)
    }

    /// Takes in a report.
    pub(crate) fn take(&self, report: Report) {
        let (plugged, unplugged) = self.plugged();
        let had = report.total.map(|total| self.had(total, unplugged));
        let changed = {
            let at = Instant::now();
            let mut state = self.state();
            let before = state.unmanaged;
            if let Some(had) = &had {
                state.unmanaged.report(at, had, plugged);
            }
            state.report = Some(Received { at, report, had });
            state.counters.reports += 1;
            if let Driver::Active(answers) = &mut state.driver {
                *answers = Answers::Given;
            }
            before != state.unmanaged
        };
        if let Some(plugs) = self.plugs.get().filter(|_| changed) {
            (plugs.changed)();
        }
        self.reported();
    }

    /// Whether a part of the map is there only as far as the guest plugs it.
    pub(crate) fn is_plugged(&self) -> bool {
        self.plugs.get().is_some()
    }

    /// What the balloon shall hold for the target.
    pub(crate) fn wanted(&self) -> Pages {
        let state = self.state();
        // Whoever plugs as well has taken off what is not managed.
        let unmanaged = if self.is_plugged() { Bytes::ZERO } else { state.unmanaged.all() };
        balloon_for(self.map, state.target, unmanaged)
    }

    /// A report is there.
    pub(crate) fn reported(&self) {
        if let Some(tell) = self.when_reported.get() {
            tell();
        }
    }

    /// A report shows that the guest waits for memory.
    pub(crate) fn stalled(&self) {
        if let Some(tell) = self.when_stalled.get() {
            tell();
        }
    }

    /// The guest has taken pages back: so many that its balloon holds `left`.
    pub(crate) fn took_back(&self, taken: Bytes, left: Pages) {
        let given = self.map.saturating_sub(self.plugged().1).saturating_sub(left.bytes());
        {
            let mut state = self.state();
            state.took_back = Some((Instant::now(), given.saturating_sub(state.unmanaged.all())));
            state.counters.oom_deflated = state.counters.oom_deflated.saturating_add(taken);
        }
        if let Some(tell) = self.when_taken_back.get() {
            tell();
        }
    }

    /// A driver has come or gone, or is where it was asked to be.
    pub(crate) fn tell_moved(&self) {
        // The one failure is a full counter, which is news already pending.
        let _ = self.moved.write(1);
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// Asks the balloon for things, from any thread.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Shared>);

impl Handle {
    /// Asks the guest to have `target` of its memory map; how far it gets shows
    /// in [`actual`](Self::actual). It replaces what was asked before at once.
    ///
    /// # Errors
    /// There is no driver, or `target` is nothing or more than the map.
    pub fn set_target(&self, target: Bytes) -> Result<(), TargetError> {
        self.check(target)?;
        if let Driver::Absent | Driver::Broken = self.0.state().driver {
            return Err(TargetError::NoDriver);
        }
        self.retarget(target)
    }

    fn check(&self, target: Bytes) -> Result<(), TargetError> {
        let map = self.0.map;
        if target == Bytes::ZERO || target > map {
            Err(TargetError::OutOfMap { target, map })
        } else {
            Ok(())
        }
    }

    /// As [`set_target`](Self::set_target), also where there is no driver: the one that comes finds
    /// the target there.
    ///
    /// # Errors
    /// `target` is nothing or more than the map.
    pub fn retarget(&self, target: Bytes) -> Result<(), TargetError> {
        self.request(target, true)
    }

    /// As [`retarget`](Self::retarget), where what the balloon holds changes and nobody asks the guest for less
    /// than before: one that has taken pages back keeps them.
    ///
    /// # Errors
    /// As for [`retarget`](Self::retarget).
    pub fn adjust(&self, target: Bytes) -> Result<(), TargetError> {
        self.request(target, false)
    }

    fn request(&self, target: Bytes, anew: bool) -> Result<(), TargetError> {
        self.check(target)?;
        {
            let mut state = self.0.state();
            state.target = target;
            state.requests = state.requests.wrapping_add(1);
            state.asks_anew |= anew;
            state.settled &= !anew;
        }
        // The one failure is a full counter, which is a wake-up already pending.
        let _ = self.0.wake.write(1);
        Ok(())
    }

    /// What the balloon holds, as its driver says, whether the host has got it back yet or not.
    pub fn holds(&self) -> Bytes {
        self.0.state().reached.bytes()
    }

    /// Whether a driver is at work that takes pages back rather than have its guest run out of memory.
    pub fn deflates_on_oom(&self) -> bool {
        let state = self.0.state();
        matches!(state.driver, Driver::Active(_)) && state.deflates_on_oom
    }

    /// What the guest has taken back of the balloon rather than run out of memory; `None` where it never did
    /// since its driver started.
    pub fn oom_deflate(&self) -> Option<OomDeflate> {
        let state = self.0.state();
        let (at, had) = state.took_back?;
        let age_ms = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
        Some(OomDeflate { taken: state.taken_back.bytes(), had, age_ms })
    }

    /// Readable each time the driver has come or gone, or the balloon holds what it was asked to.
    pub fn moved(&self) -> &EventFd {
        &self.0.moved
    }

    /// The guest's processors stand still from now on, or, without `resting`, run again. In between no time
    /// passes for a guest that is asked for something.
    pub fn rest(&self, resting: bool) {
        self.0.state().resting = resting;
    }

    /// What the guest was last asked to have.
    pub fn target(&self) -> Bytes {
        self.0.state().target
    }

    /// Whether the guest could not reach the target: it is asked for no more than
    /// [`actual`](Self::actual), until the next target is set.
    pub fn settled(&self) -> bool {
        self.0.state().settled
    }

    /// Whether the guest has been at a target since its driver started. Until then it is on its
    /// way from all of its map to the first one, and has not touched most of what it gives up.
    pub fn followed(&self) -> bool {
        self.0.state().followed
    }

    /// All guest RAM, with what could be plugged.
    pub fn map(&self) -> Bytes {
        self.0.map
    }

    /// What the guest was given: the map less the balloon, as its driver says. What
    /// the host has not got back yet is not in the balloon yet, nor are parts of its huge pages.
    pub fn given(&self) -> Bytes {
        self.0.map.saturating_sub(self.0.state().actual.bytes())
    }

    /// What the guest has: what it was [given](Self::given), less what its kernel does not manage.
    pub fn actual(&self) -> Bytes {
        self.given().saturating_sub(self.unmanaged())
    }

    /// What of its memory the guest's kernel does not manage, by its own word.
    pub fn unmanaged(&self) -> Bytes {
        self.0.state().unmanaged.all()
    }

    /// What of that was plugged into it, and did not come on line.
    pub fn off_line(&self) -> Bytes {
        self.0.state().unmanaged.off_line()
    }

    /// Whether more plugged memory would not come on line either: the last did not, and no other has since.
    pub fn stays_off_line(&self) -> bool {
        self.0.state().unmanaged.stays_off_line()
    }

    /// What the guest has at this moment, whose kernel has just said that it manages `total`.
    pub fn had(&self, total: Bytes) -> Had {
        self.0.had(total, self.0.plugged().1)
    }

    /// Tells of which part of the map the guest has only what it plugs. `changed` is called, on the balloon's
    /// event loop, when the guest's kernel manages more or less of what it was given. Only the first call
    /// counts.
    pub fn plugs(
        &self,
        most: Bytes,
        plugged: impl Fn() -> Bytes + Send + Sync + 'static,
        changed: impl Fn() + Send + Sync + 'static,
    ) {
        let _ = self.0.plugs.set(Plugs { plugged: Box::new(plugged), most, changed: Box::new(changed) });
    }

    /// How the driver is doing.
    pub fn driver(&self) -> DriverState {
        match self.0.state().driver {
            Driver::Absent => DriverState::Absent,
            Driver::Broken => DriverState::Broken,
            Driver::Active(Answers::Owed(since)) if since.elapsed() > SILENT_AFTER => DriverState::Silent,
            Driver::Active(_) => DriverState::Active,
        }
    }

    /// How old the guest's last report is; `None` where it never sent one.
    pub fn report_age(&self) -> Option<Duration> {
        self.0.state().report.as_ref().map(|received| received.at.elapsed())
    }

    /// Asks the guest for a report now; a question that is already on its way is not asked again.
    /// Returns whether an answer can be expected: not where no driver answers such questions, and not
    /// from one that is [silent](DriverState::Silent).
    pub fn ask_for_report(&self) -> bool {
        {
            let mut state = self.0.state();
            match state.driver {
                Driver::Absent | Driver::Broken | Driver::Active(Answers::Never) => return false,
                Driver::Active(Answers::Owed(since)) => return since.elapsed() <= SILENT_AFTER,
                Driver::Active(Answers::Given) => state.report_wanted = true,
            }
        }
        // The one failure is a full counter, which is a wake-up already pending.
        let _ = self.0.wake.write(1);
        true
    }

    /// The guest's last report, if it ever sent one.
    pub fn report(&self) -> Option<AgedReport> {
        Some(self.0.state().report.as_ref()?.aged())
    }

    /// Has `tell` called, on the balloon's event loop, when a report has come.
    /// Only the first call counts.
    pub fn when_reported(&self, tell: impl Fn() + Send + Sync + 'static) {
        let _ = self.0.when_reported.set(Box::new(tell));
    }

    /// Has `tell` called, on the balloon's event loop, when a report shows that the guest waits for
    /// memory. Only the first call counts.
    pub fn when_stalled(&self, tell: impl Fn() + Send + Sync + 'static) {
        let _ = self.0.when_stalled.set(Box::new(tell));
    }

    /// Has `tell` called when the guest has taken pages back rather than run out of memory: on a vCPU's thread,
    /// so that it must not take long. Only the first call counts.
    pub fn when_taken_back(&self, tell: impl Fn() + Send + Sync + 'static) {
        let _ = self.0.when_taken_back.set(Box::new(tell));
    }

    /// What the balloon has counted since it was made.
    pub fn counters(&self) -> BalloonCounters {
        self.0.state().counters
    }
}
