//! Moves one guest's memory towards its target, by the means that [`steps`] finds.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vmm_sys_util::timerfd::TimerFd;

use super::{Phase, Standing, cushion, steps};
use crate::device::{Handle, TargetError};
use crate::plug;
use api::status::{CushionStatus, DriverState, PlugStatus};
use api::units::Bytes;

/// Why a target can't be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SteeringError {
    /// It lies below the boot memory, or the VM has a balloon alone, and nobody is there to inflate it.
    #[error(
        "the guest has no working balloon driver: wait until it has booted, or load virtio_balloon in it"
    )]
    NoBalloon,
    /// It lies above what the guest has, and nobody is there to plug more.
    #[error(
        "the guest has no working virtio-mem driver, so it can't have more than {has}: wait until it has \
         booted, load virtio_mem in it (Linux 5.17 or later), or start the VM with --grow balloon"
    )]
    NoPlug {
        /// What it has.
        has: Bytes,
    },
    /// More than the VM was made for, or nothing at all.
    #[error("target {target} must be more than nothing and at most the {map} that this VM was started with")]
    OutOfMap {
        /// As asked.
        target: Bytes,
        /// The most that the guest could have.
        map: Bytes,
    },
}

impl From<TargetError> for SteeringError {
    fn from(error: TargetError) -> Self {
        match error {
            TargetError::NoDriver => Self::NoBalloon,
            TargetError::OutOfMap { target, map } => Self::OutOfMap { target, map },
        }
    }
}

/// A guest's pluggable memory and where its way has led so far.
struct Pluggable {
    plug: plug::Handle,
    boot: Bytes,
    cushioned: bool,
    timer: Mutex<TimerFd>,
    course: Mutex<Course>,
}

struct Course {
    target: Bytes,
    /// The most that the guest may have, cushion included.
    max: Bytes,
    /// Its virtio-mem driver was there at the last look.
    plugs: bool,
    /// Since when it has a balloon driver and no virtio-mem driver.
    lacks_driver_since: Option<Instant>,
    /// What the balloon was last asked to hold.
    held: Bytes,
    plugged: Bytes,
    phase: Phase,
    /// When the guest last moved, was asked for something new, or ran again.
    since: Instant,
    /// Its processors stand still.
    resting: bool,
}

/// Steers one guest's memory, from any thread.
#[derive(Clone)]
pub struct Steering {
    balloon: Handle,
    pluggable: Option<Arc<Pluggable>>,
}

/// What [`Steering::events`] are for.
const MOVED: usize = 0;
const TIMER: usize = 1;
const BALLOON_MOVED: usize = 2;

impl Steering {
    /// By the balloon alone.
    pub fn by_balloon(balloon: Handle) -> Self {
        Self { balloon, pluggable: None }
    }

    /// By plugging first: the guest has booted with `boot`, and the balloon's
    /// map is `boot` and all that `plug` may request. It keeps a cushion where it is `cushioned`, which makes sense
    /// where what lies in a balloon costs the host nothing.
    ///
    /// # Errors
    /// No timerfd can be had.
    pub fn by_plug(balloon: Handle, plug: plug::Handle, boot: Bytes, cushioned: bool) -> io::Result<Self> {
        let timer = TimerFd::new()?;
        // A look may rearm it between its expiry and the read of it, which must not wait then.
        // SAFETY: fcntl on a descriptor that we own, with no pointer.
        if unsafe { libc::fcntl(timer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let (plugs, tells) = (plug.clone(), plug.clone());
        let changed = move || {
            // The one failure is a full counter, which is news already pending.
            let _ = tells.moved().write(1);
        };
        balloon.plugs(plug.most(), move || plugs.plugged(), changed);
        let course = Course {
            target: boot,
            max: boot.saturating_add(plug.most()),
            plugs: false,
            lacks_driver_since: None,
            held: Bytes::ZERO,
            plugged: Bytes::ZERO,
            phase: Phase::CALM,
            since: Instant::now(),
            resting: false,
        };
        let pluggable =
            Pluggable { plug, boot, cushioned, timer: Mutex::new(timer), course: Mutex::new(course) };
        Ok(Self { balloon, pluggable: Some(Arc::new(pluggable)) })
    }

    /// The balloon, for what it reports and counts.
    pub fn balloon(&self) -> &Handle {
        &self.balloon
    }

    /// Asks the guest to have `target`; how far it gets shows in [`actual`](Self::actual).
    /// Above the boot memory it is rounded down to whole blocks.
    ///
    /// # Errors
    /// [`SteeringError`] where no driver could move the guest there; nothing has changed then.
    pub fn set_target(&self, target: Bytes) -> Result<(), SteeringError> {
        let Some(pluggable) = &self.pluggable else {
            return Ok(self.balloon.set_target(target)?);
        };
        let plug = &pluggable.plug;
        pluggable.check(target)?;
        let boot = pluggable.managed_boot(&self.balloon);
        let above = plug.whole_blocks(target.saturating_sub(boot));
        let has = boot.saturating_add(plug.plugged());
        if boot.saturating_add(above) > has && plug.driver() != DriverState::Active {
            return Err(SteeringError::NoPlug { has });
        }
        let absent = matches!(self.balloon.driver(), DriverState::Absent | DriverState::Broken);
        if target < boot && absent {
            return Err(SteeringError::NoBalloon);
        }
        pluggable.aim(target, &self.balloon);
        Ok(())
    }

    /// As [`set_target`](Self::set_target), whatever drivers there are: those that come find it there.
    ///
    /// # Errors
    /// [`SteeringError::OutOfMap`]; nothing has changed then.
    pub fn retarget(&self, target: Bytes) -> Result<(), SteeringError> {
        let Some(pluggable) = &self.pluggable else {
            return Ok(self.balloon.retarget(target)?);
        };
        pluggable.check(target)?;
        pluggable.aim(target, &self.balloon);
        Ok(())
    }

    /// The guest may have `max` from now on: no more is plugged for it, though its target is set by others.
    pub fn set_max(&self, max: Bytes) {
        if let Some(pluggable) = &self.pluggable {
            let mut course = pluggable.course.lock();
            course.max = max;
            pluggable.step(&mut course, &self.balloon, Ask::Adjust);
        }
    }

    /// The guest's processors stand still from now on, or, without `resting`, run again. It is given no less
    /// time for what it was asked because of that.
    pub fn rest(&self, resting: bool) {
        self.balloon.rest(resting);
        if let Some(pluggable) = &self.pluggable {
            let mut course = pluggable.course.lock();
            course.resting = resting;
            course.since = Instant::now();
            pluggable.step(&mut course, &self.balloon, Ask::Adjust);
        }
    }

    /// What the guest was last asked to have.
    pub fn target(&self) -> Bytes {
        self.pluggable
            .as_ref()
            .map_or_else(|| self.balloon.target(), |pluggable| pluggable.course.lock().target)
    }

    /// What the guest was given: boot memory and what is plugged, less what its driver says that the balloon
    /// holds. A cushion that has left the balloon for an unplugging is not given: the guest may take it then as it
    /// may at any other time.
    pub fn given(&self) -> Bytes {
        let Some(pluggable) = &self.pluggable else { return self.balloon.given() };
        let has = pluggable.boot.saturating_add(pluggable.plug.plugged());
        let in_balloon = self.balloon.map().saturating_sub(self.balloon.given());
        has.saturating_sub(in_balloon.max(pluggable.course.lock().phase.let_go()))
    }

    /// What the guest has: what it was given, less what its kernel does not manage.
    pub fn actual(&self) -> Bytes {
        self.given().saturating_sub(self.balloon.unmanaged())
    }

    /// The most that the guest can have, as far as its kernel manages it. Where it left plugged memory off
    /// line, that is no more than it has plugged already.
    pub fn most(&self) -> Bytes {
        let Some(pluggable) = &self.pluggable else {
            return self.balloon.map().saturating_sub(self.balloon.unmanaged());
        };
        let plug = &pluggable.plug;
        let plugged = if self.balloon.stays_off_line() {
            plug.plugged().saturating_sub(self.balloon.off_line())
        } else {
            plug.most()
        };
        pluggable.managed_boot(&self.balloon).saturating_add(plugged)
    }

    /// How the guest's plugged memory stands; `None` where it has a balloon alone.
    pub fn plug(&self) -> Option<PlugStatus> {
        let Pluggable { plug, boot, course, .. } = &**self.pluggable.as_ref()?;
        let lacks_driver_since = course.lock().lacks_driver_since;
        let milliseconds = |since: Instant| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        Some(PlugStatus {
            driver: plug.driver(),
            lacks_driver_ms: lacks_driver_since.map(milliseconds),
            boot: *boot,
            block: plug.block(),
            requested: plug.requested(),
            plugged: plug.plugged(),
            counters: plug.counters(),
        })
    }

    /// What is kept plugged beyond the target; `None` where the guest has a balloon alone.
    pub fn cushion(&self) -> Option<CushionStatus> {
        let pluggable = self.pluggable.as_ref()?;
        let size = pluggable.cushion(&pluggable.course.lock(), &self.balloon).unwrap_or(Bytes::ZERO);
        let has_plugged = pluggable.boot.saturating_add(pluggable.plug.plugged());
        Some(CushionStatus { size, held: has_plugged.saturating_sub(self.given()) })
    }

    /// Descriptors that an event loop shall watch for reading; none where there is nothing to steer.
    pub fn events(&self) -> Vec<RawFd> {
        self.pluggable.as_ref().map_or_else(Vec::new, |pluggable| {
            vec![
                pluggable.plug.moved().as_raw_fd(),
                pluggable.timer.lock().as_raw_fd(),
                self.balloon.moved().as_raw_fd(),
            ]
        })
    }

    /// One of [`events`](Self::events), by its place there, is readable.
    pub fn event(&self, index: usize) {
        let Some(pluggable) = &self.pluggable else { return };
        match index {
            MOVED => drop(pluggable.plug.moved().read()),
            // Not expired after all where another look has rearmed it.
            TIMER => drop(pluggable.timer.lock().wait()),
            BALLOON_MOVED => drop(self.balloon.moved().read()),
            _ => return,
        }
        let mut course = pluggable.course.lock();
        let plugged = pluggable.plug.plugged();
        let has_plugged = std::mem::replace(&mut course.plugged, plugged) != plugged;
        // A guest whose balloon has let go of all begins to unplug now.
        let is_empty = index == BALLOON_MOVED && matches!(course.phase, Phase::Unplugging { .. });
        if has_plugged || is_empty {
            course.since = Instant::now();
        }
        pluggable.look_at_driver(&mut course, &self.balloon);
        pluggable.step(&mut course, &self.balloon, Ask::Adjust);
    }
}

/// How a balloon is asked to hold something else.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// The guest shall have less than before, or is to try once more.
    Anew,
    /// What it has plugged has changed, or it shall have more.
    Adjust,
}

impl Pluggable {
    /// Whether there can be such a target.
    fn check(&self, target: Bytes) -> Result<(), SteeringError> {
        let map = self.boot.saturating_add(self.plug.most());
        // A part of a block beyond the map is rounded away, as any other is.
        let is_out = target == Bytes::ZERO || target.saturating_sub(map) >= self.plug.block();
        if is_out { Err(SteeringError::OutOfMap { target, map }) } else { Ok(()) }
    }

    /// What the guest's kernel manages of what it booted with.
    fn managed_boot(&self, balloon: &Handle) -> Bytes {
        let never_plugged = balloon.unmanaged().saturating_sub(balloon.off_line());
        self.boot.saturating_sub(never_plugged)
    }

    fn aim(&self, target: Bytes, balloon: &Handle) {
        let boot = self.managed_boot(balloon);
        let above = self.plug.whole_blocks(target.saturating_sub(boot));
        let mut course = self.course.lock();
        let target = if target < boot { target } else { boot.saturating_add(above) };
        // One in need is not squeezed because it is granted something.
        let ask = if target > course.target { Ask::Adjust } else { Ask::Anew };
        course.target = target;
        course.since = Instant::now();
        self.step(&mut course, balloon, ask);
    }

    /// A guest whose virtio-mem driver has gone can't come to a target above what it has.
    fn look_at_driver(&self, course: &mut Course, balloon: &Handle) {
        let plugs = self.plug.driver() == DriverState::Active;
        let has_balloon = !matches!(balloon.driver(), DriverState::Absent | DriverState::Broken);
        let since = course.lacks_driver_since.unwrap_or_else(Instant::now);
        course.lacks_driver_since = (has_balloon && !plugs).then_some(since);
        let has = self.managed_boot(balloon).saturating_add(self.plug.plugged());
        if std::mem::replace(&mut course.plugs, plugs) && !plugs && course.target > has {
            tracing::warn!(
                "the guest's virtio-mem driver has gone: its target falls from {} to the {has} that it has",
                course.target
            );
            course.target = has;
        }
    }

    /// What to keep plugged beyond the target.
    fn cushion(&self, course: &Course, balloon: &Handle) -> Option<Bytes> {
        // Without a balloon that gives it back, it would be the guest's already, or nobody's. What is not on line
        // can't lie in a balloon, and goes.
        let can_hold = balloon.deflates_on_oom() && !balloon.stays_off_line();
        (self.cushioned && can_hold).then(|| cushion(course.target, course.max))
    }

    /// Asks the guest for what it takes to get on from where it stands. What the balloon was asked
    /// for before it is asked for again only [`Ask::Anew`].
    fn step(&self, course: &mut Course, balloon: &Handle, ask: Ask) {
        let standing = Standing {
            boot: self.managed_boot(balloon),
            block: self.plug.block(),
            plugged: self.plug.plugged(),
            off_line: balloon.off_line(),
            driver: self.plug.driver() == DriverState::Active,
            waited: if course.resting { Duration::ZERO } else { course.since.elapsed() },
            held: course.held,
            balloon: balloon.holds(),
            max: course.max,
            cushion: self.cushion(course, balloon),
            phase: course.phase,
        };
        let steps = steps(standing, course.target);
        self.plug.request(steps.requested);
        let map = self.boot.saturating_add(self.plug.most());
        let target = map.saturating_sub(steps.held);
        let asked = match ask {
            Ask::Anew => balloon.retarget(target),
            Ask::Adjust if steps.held != course.held => balloon.adjust(target),
            Ask::Adjust => Ok(()),
        };
        // A driver that is away finds it when it comes back: nobody looks again because of that.
        if asked.is_ok() {
            course.held = steps.held;
            course.phase = steps.phase;
        }
        self.look_again(steps.look_again);
    }

    fn look_again(&self, after: Option<Duration>) {
        let mut timer = self.timer.lock();
        let set = match after {
            // Zero would disarm it.
            Some(after) => timer.reset(after.max(Duration::from_millis(1)), None),
            None => timer.clear(),
        };
        if let Err(error) = set {
            tracing::warn!("the balloon can't help a guest that does not unplug: no timer: {error}");
        }
    }
}
