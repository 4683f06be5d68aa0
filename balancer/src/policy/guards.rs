//! What keeps the policy from doing harm: charges, floors, and guests that don't follow.

use std::fmt;
use std::time::Duration;

use api::status::DriverState;
use api::status::UNPLUG_PATIENCE;
use api::units::Bytes;
use serde::{Deserialize, Serialize};

use super::{Observation, host_state::HostState};

/// A guest that gave up less than [`PROGRESS`] in this time is stuck (Xen's squeezed: 5 s). One that
/// is asked to unplug first has [`UNPLUG_PATIENCE`] for that, and then this time for its balloon.
pub const STUCK_AFTER: Duration = Duration::from_secs(5);

/// Less than this in [`STUCK_AFTER`] is no progress. Far below what the slowest
/// balloon at work does (some 30 MiB/s under software emulation).
pub const PROGRESS: Bytes = Bytes::mib(4);

/// How fast a guest gives up memory is measured over this long, and half as long at least.
pub const PACE_OVER: Duration = Duration::from_secs(4);

/// Memory that a guest will have given up within this time counts as given: no other guest is asked for it
/// too.
pub const COUNTED_ON: Duration = STUCK_AFTER;

/// How long a stuck guest is left alone the first time; doubled each time after.
pub const FIRST_REST: Duration = Duration::from_secs(60);

/// The longest that a stuck guest is left alone.
pub const LONGEST_REST: Duration = Duration::from_secs(3600);

/// How far `actual` may lie above the target and still count as there. A guest
/// counts in 4 KiB pages and fills its balloon in batches of 256 of them.
pub const THERE: Bytes = Bytes::mib(1);

/// A guest that gives up no more counts as following if its `actual` lies above its target by no more than
/// this. Another move would not be worth it ([`DEADBAND`](super::DEADBAND)). The guest is charged what it
/// has, so leaving it alone for a minute, as one that gives up nothing, would gain nothing.
pub const NEARLY_THERE: Bytes = super::DEADBAND;

/// How long after its start a guest may take to bring its balloon to the first
/// target. Until then it is charged what the host really holds for it, since it
/// has not touched the rest yet.
pub const BOOT: Duration = Duration::from_secs(120);

/// A guest whose driver goes for the first time counts for so long as one that shuts down, and is charged
/// what the host holds for it: Linux resets its devices before it powers off. The second time it does not, or
/// a guest could have more than its target by coming and going.
pub const LEAVING: Duration = Duration::from_secs(10);

/// Use within this of what it was is steady, in percent.
pub const STEADY_PERCENT: u64 = 3;

/// A guest that was just shrunk is given nothing before it uses this much more, in percent:
/// [`STEADY_PERCENT`], and what a kernel keeps free beside what its programs use.
pub const STILL_PERCENT: u64 = 4;

/// A guest that was moved one way is not moved back within this time while its use is steady,
/// not even in an emergency: what is moved to and fro within a minute helps nobody.
pub const TURN: Duration = Duration::from_secs(61);

/// No shrink to refill the pool this long after a grow. Longer than the minute in which a
/// move back is felt as one.
pub const REST_AFTER_GROW: Duration = Duration::from_secs(90);

/// How often memory is taken to refill the pool while the host is in NORMAL (Xen's selfballoon: 5 s).
pub const UNHURRIED: Duration = Duration::from_secs(5);

/// The part of the gap that is taken each time then (Xen's selfballoon: 1/8).
pub const UNHURRIED_PART: u64 = 8;

/// How long EMERGENCY must last before guests lose memory that they use. Half of published
/// bursts are over before, and what guests swap out meanwhile they swap in again.
pub const EMERGENCY_DWELL: Duration = Duration::from_secs(60);

/// A VM that claims more than its fair share is believed for so long, and may have what is kept as buffers of
/// others: 88 % of published bursts are over by then. After that, it is believed what the host holds for it.
pub const LOAN: Duration = Duration::from_secs(120);

/// A VM that was lent memory is believed again once it has lived on its share for this many times as long. If
/// a moment were enough, a VM that claims all there is could borrow nearly always.
pub const PAID_BACK: u32 = 4;

/// How a VM stands with the balancer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Answers, reports, and follows its target.
    #[default]
    Following,
    /// Its limits leave nothing to move.
    Static,
    /// Starting: its balloon has not reached the first target yet.
    Booting,
    /// Its balloon driver has just gone: it shuts down.
    Leaving,
    /// No balloon driver runs in the guest: nothing can be moved.
    NoDriver,
    /// Its API does not answer, or answers nonsense.
    NotAnswering,
    /// Its guest has not reported for too long: held, never shrunk.
    Stale,
    /// It did not give up what it was asked for: not asked again for a while.
    Stuck,
    /// Its vCPUs stand still, so it touches no more than it holds until they run on.
    Paused,
}

impl Standing {
    /// Whether a target set now can be reached.
    pub(super) fn is_movable(self) -> bool {
        matches!(self, Self::Following | Self::Booting | Self::Stale | Self::Stuck)
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Following => "following",
            Self::Static => "static",
            Self::Booting => "booting",
            Self::Leaving => "leaving",
            Self::NoDriver => "no driver",
            Self::NotAnswering => "not answering",
            Self::Stale => "no reports",
            Self::Stuck => "stuck",
            Self::Paused => "paused",
        })
    }
}

/// Watches whether a guest gives up what it was asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct ShrinkWatch {
    /// Since when an inflate is under way, and what the guest had then.
    since: Option<(Duration, Bytes)>,
    /// What it had at two moments of this inflate, the later of which is the next to be measured from.
    had: Option<[(Duration, Bytes); 2]>,
    /// Not asked before then.
    until: Duration,
    rest: Duration,
    /// Its balloon has been at its target once since it was first seen.
    settled: bool,
    driver: SeenDriver,
}

/// What was ever seen of a guest's balloon driver.
#[derive(Clone, Copy, Debug, Default)]
enum SeenDriver {
    #[default]
    Never,
    Running,
    /// When it went for the first time.
    Gone(Duration),
}

impl ShrinkWatch {
    /// Takes in what the guest has; true at the moment when it is found stuck.
    pub fn look(&mut self, now: Duration, observed: &Observation) -> bool {
        if observed.driver == DriverState::Absent {
            // Without a driver nobody follows; the balloon begins anew with the next one.
            self.let_go();
            self.settled = false;
            if let SeenDriver::Running = self.driver {
                self.driver = SeenDriver::Gone(now);
            }
            return false;
        }
        if let SeenDriver::Never = self.driver {
            self.driver = SeenDriver::Running;
        }
        // The VMM knows better than a balancer that was just started: the guest may be in the middle of a
        // shrink, and may hold all that it has not given up yet.
        self.settled = observed.followed.unwrap_or(self.settled);
        let pending = observed.pending();
        self.measure(now, pending, observed.actual);
        if pending <= THERE {
            self.settled = true;
            if self.since.take().is_some() {
                // It reached a target by giving up memory: trust it again.
                self.rest = Duration::ZERO;
            }
            return false;
        }
        let Some((since, had)) = self.since else {
            self.since = Some((now, observed.actual));
            return false;
        };
        if had.saturating_sub(observed.actual) >= PROGRESS {
            self.since = Some((now, observed.actual));
            return false;
        }
        let patience = if observed.plugs { UNPLUG_PATIENCE + STUCK_AFTER } else { STUCK_AFTER };
        if now.saturating_sub(since) < patience {
            return false;
        }
        if pending <= NEARLY_THERE {
            // Looked at anew: more may come, or another target.
            self.since = Some((now, observed.actual));
            return false;
        }
        self.rest = (self.rest * 2).clamp(FIRST_REST, LONGEST_REST);
        self.until = now + self.rest;
        self.since = None;
        true
    }

    /// Forgets the inflate under way: the target was just raised to what the guest has.
    pub fn let_go(&mut self) {
        (self.since, self.had) = (None, None);
    }

    /// Remembers what it has from time to time, while it gives up memory.
    fn measure(&mut self, now: Duration, pending: Bytes, actual: Bytes) {
        if pending <= THERE {
            self.had = None;
            return;
        }
        let [_, later] = *self.had.get_or_insert([(now, actual); 2]);
        if now.saturating_sub(later.0) >= PACE_OVER / 2 {
            self.had = Some([later, (now, actual)]);
        }
    }

    /// What of `pending` it will have given up within `time`, at the pace at which it does. One that was
    /// asked only a moment ago is believed all of it.
    pub fn gives(&self, now: Duration, pending: Bytes, actual: Bytes, time: Duration) -> Bytes {
        let Some([(then, had), _]) = self.had else { return pending };
        let elapsed = now.saturating_sub(then);
        if elapsed < PACE_OVER / 2 {
            return pending;
        }
        let gave = u128::from(had.saturating_sub(actual).0);
        let will = gave.saturating_mul(time.as_millis()) / elapsed.as_millis().max(1);
        pending.min(Bytes(u64::try_from(will).unwrap_or(u64::MAX)))
    }

    pub fn is_resting(&self, now: Duration) -> bool {
        now < self.until
    }

    /// Whether its driver has gone for the first time, and a moment ago.
    pub fn is_leaving(&self, now: Duration) -> bool {
        matches!(self.driver, SeenDriver::Gone(then) if now.saturating_sub(then) < LEAVING)
    }

    pub fn is_settled(&self) -> bool {
        self.settled
    }
}

/// What a VM is charged: what it may hold on the host without anyone asking again. What its guest says that it
/// does not manage is charged as far as the host holds it, see [`is_overrun`].
pub fn charge(standing: Standing, observed: &Observation) -> Bytes {
    let full = observed.limits.max().max(observed.given());
    // Where nobody knows what the host holds, it may hold all of it.
    let held = observed.host_rss.map_or(full, |held| held.min(full));
    match standing {
        Standing::NoDriver | Standing::Static => full,
        Standing::Booting | Standing::Leaving => observed.target.max(held),
        Standing::Paused => held,
        Standing::Following | Standing::Stale | Standing::Stuck | Standing::NotAnswering => {
            observed.target.max(observed.actual).max(held)
        }
    }
}

/// Whether the guest is not believed about what it manages: the host holds so much more for the VM that it
/// touches what it is said not to have.
pub fn is_overrun(observed: &Observation) -> bool {
    observed.unmanaged > Bytes::ZERO
        && observed.host_rss.is_some_and(|held| held > one_step_beyond(observed.actual.max(observed.target)))
}

/// Spare memory that a guest of this size is left on top of its use.
///
/// Some times the kernel's high watermark, so that taking memory does not by
/// itself start reclaim in the guest.
pub fn headroom(size: Bytes) -> Bytes {
    Bytes::mib(16).max(Bytes(size.0 / 32))
}

/// The size below which a guest is not shrunk in this state. It uses `used` of `size`, and needs
/// `working_set` at least. `lasts` is whether EMERGENCY has lasted for [`EMERGENCY_DWELL`].
pub fn floor(state: HostState, lasts: bool, used: Bytes, working_set: Bytes, size: Bytes) -> Bytes {
    match state {
        HostState::Normal | HostState::Soft => working_set.max(used.saturating_add(headroom(size))),
        HostState::Emergency if lasts => Bytes::ZERO,
        HostState::Hard | HostState::Emergency => working_set,
    }
}

/// What a guest has touched, and one step more: so much of its claim is more than a word.
pub fn touched(observed: &Observation) -> Bytes {
    one_step_beyond(observed.host_rss.unwrap_or_default())
}

/// `held`, and as much more as a guest of this size is moved at a time.
pub fn one_step_beyond(held: Bytes) -> Bytes {
    held.saturating_add(whole_step(held))
}

/// The most that one guest is asked to give up at a time, less what it still owes.
pub fn step(observed: &Observation) -> Bytes {
    whole_step(observed.target).saturating_sub(observed.pending())
}

/// How far a guest of this size is moved at a time.
fn whole_step(size: Bytes) -> Bytes {
    Bytes::mib(128).max(Bytes(size.0 / 8))
}
