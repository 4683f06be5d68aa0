//! The device's state as data.

use std::time::{Duration, Instant};

use devices::state::{self, StateError, Version};
use devices::virtio::device::Active;
use devices::virtio::queue::{Faults, Head, retake};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::GuestAddress;

use super::handle::{Answers, Driver, Received};
use super::pace::{Pace, PaceState};
use super::{Balloon, DEFLATE_ON_OOM, STATISTICS, STATS_VQ};
use crate::ranges::Range;
use crate::unmanaged::Unmanaged;
use api::guest_memory::{Had, balloon_for};
use api::report::MOST_STATISTICS;
use api::status::AgedReport;
use api::units::{Bytes, PAGE_SIZE, Pages};

const DEVICE: &str = "the balloon";

/// Guest pages of 4 KiB side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The number of the first.
    pub first: u64,
    /// How many there are.
    pub count: Pages,
}

/// What a balloon knows, as data. What it has counted belongs to the process that counted, and
/// begins anew in the next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// Of this struct.
    pub version: Version<1>,
    /// All guest RAM.
    pub map: Bytes,
    /// What the guest shall have.
    pub target: Bytes,
    /// Whether the device has not taken up that target yet.
    pub pending: bool,
    /// Whether the guest has been at a target since its driver started.
    pub followed: bool,
    /// How far the balloon is on its way.
    pub pace: PaceState,
    /// num_pages as the guest was last told (virtio 1.2, section 5.5.4).
    pub told: Pages,
    /// What the guest fills free pages with (poison_val).
    pub poison: u32,
    /// The driver's buffer for statistics, where the device has it (section 5.5.6.3).
    pub statistics_buffer: Option<Head>,
    /// The guest's last report.
    pub report: Option<AgedReport>,
    /// What of its memory the guest's kernel does not manage, by its own word.
    pub unmanaged: Bytes,
    /// What of that was plugged into it.
    pub off_line: Bytes,
    /// Pages that the guest has given up and the host still held.
    pub given_up: Vec<Run>,
    /// Whether the driver has broken the protocol.
    pub broken: bool,
    /// Malformed chains so far.
    pub faults: Faults,
}

impl Balloon {
    pub(super) fn saved(&self) -> Result<Value, StateError> {
        let state = self.shared.state();
        let report = state.report.as_ref().map(Received::aged);
        let run = |range: Range| Run { first: range.start.0 / PAGE_SIZE, count: range.len.pages() };
        state::to_value(&BalloonState {
            version: Version,
            map: self.shared.map,
            target: state.target,
            pending: state.requests != self.request,
            followed: state.followed,
            pace: self.pace.saved(),
            told: self.told,
            poison: self.poison,
            statistics_buffer: self.statistics.held(),
            report,
            unmanaged: state.unmanaged.all(),
            off_line: state.unmanaged.off_line(),
            given_up: self.discard.given_up().into_iter().map(run).collect(),
            broken: state.driver == Driver::Broken,
            faults: self.faults,
        })
    }

    /// Goes on where the balloon stood. What the guest had given up, and is in its memory again, goes.
    pub(super) fn take_in(
        &mut self,
        state: Value,
        mut active: Option<&mut Active>,
    ) -> Result<(), StateError> {
        let state: BalloonState = state::from_value::<_, 1>(DEVICE, state)?;
        let answers = active.as_ref().is_some_and(|active| active.features & 1 << STATS_VQ != 0);
        let has_buffer = match (active.as_deref_mut(), state.statistics_buffer) {
            (Some(active), Some(head)) => retake(active, STATISTICS, head),
            _ => false,
        };
        let unreadable = |what| StateError::Unreadable { device: DEVICE, what };
        let given_up = self.check(&state, answers, has_buffer).map_err(unreadable)?;
        let unmanaged = Unmanaged::resumed(state.unmanaged, state.off_line, Instant::now());
        let unmanaged =
            unmanaged.ok_or_else(|| unreadable("more is off line than is not managed".to_owned()))?;
        let total_holds_balloon =
            active.as_ref().is_some_and(|active| active.features & 1 << DEFLATE_ON_OOM != 0);
        let driver = match active {
            None => Driver::Absent,
            Some(_) if state.broken => Driver::Broken,
            Some(_) if answers && state.statistics_buffer.is_some() => Driver::Active(Answers::Given),
            Some(_) => Driver::Active(Answers::owed(answers)),
        };
        self.pace = Pace::resumed(self.shared.map, state.pace);
        (self.told, self.poison, self.faults) = (state.told, state.poison, state.faults);
        self.discard.restore(&given_up);
        {
            let mut shared = self.shared.state();
            (shared.target, shared.driver) = (state.target, driver);
            // The device has taken up none so far.
            shared.requests = u64::from(state.pending);
            shared.report = state.report.map(received);
            (shared.unmanaged, shared.total_holds_balloon) = (unmanaged, total_holds_balloon);
        }
        if answers {
            self.statistics.resume(state.statistics_buffer);
        }
        self.publish(false);
        self.shared.state().followed = state.followed;
        // The rest is for the event loop. The one failure is a wake-up already pending.
        let _ = self.shared.wake.write(1);
        Ok(())
    }

    /// Whether this device can have come to `state`, with a driver that `answers` questions for
    /// statistics or doesn't, and of whose queue for them the device `has_buffer` or hasn't; returns what
    /// the guest had given up.
    fn check(&self, state: &BalloonState, answers: bool, has_buffer: bool) -> Result<Vec<Range>, String> {
        let map = self.shared.map;
        if state.map != map {
            return Err(format!("it is of a guest with {}, and this one has {map}", state.map));
        }
        if state.target == Bytes::ZERO || state.target > map {
            return Err(format!("its target is {}, of {map}", state.target));
        }
        for (name, pages) in
            [("wanted", state.pace.wanted), ("asked", state.pace.asked), ("told", state.told)]
        {
            if pages > map.pages() {
                return Err(format!("{name} is {} pages, which is more than all {map}", pages.0));
            }
        }
        if state.unmanaged > map {
            return Err(format!("its guest does not manage {}, of {map}", state.unmanaged));
        }
        let unmanaged = if self.shared.is_plugged() { Bytes::ZERO } else { state.unmanaged };
        let wanted = balloon_for(map, state.target, unmanaged);
        if !state.pending && state.pace.wanted != wanted {
            return Err(format!(
                "wanted is {} pages, and its target takes {}",
                state.pace.wanted.0, wanted.0
            ));
        }
        if state.statistics_buffer.is_some() && !answers {
            return Err("it has a buffer for statistics, and no driver that answers".to_owned());
        }
        if state.statistics_buffer.is_some() && !has_buffer {
            return Err("it has a buffer for statistics that the driver never gave".to_owned());
        }
        let unknown = state.report.as_ref().map_or(0, |report| report.statistics.unknown.len());
        if unknown > MOST_STATISTICS {
            return Err(format!("its report has {unknown} unknown statistics, of {MOST_STATISTICS} at most"));
        }
        state.given_up.iter().map(|run| self.given_up(run)).collect()
    }

    fn given_up(&self, run: &Run) -> Result<Range, String> {
        let range = run
            .first
            .checked_mul(PAGE_SIZE)
            .zip(run.count.0.checked_mul(PAGE_SIZE))
            .map(|(start, len)| Range { start: GuestAddress(start), len: Bytes(len) });
        range.filter(|range| self.discard.is_ram(range)).ok_or_else(|| {
            format!("{} pages from page {} on are no memory of the guest", run.count.0, run.first)
        })
    }
}

/// A report of such an age.
fn received(report: AgedReport) -> Received {
    let now = Instant::now();
    let AgedReport { age_ms, had, managed, statistics } = report;
    let had = had.zip(managed).map(|(all, managed)| Had {
        managed,
        kernel: all.saturating_sub(managed),
        unmanaged: Bytes::ZERO,
    });
    Received { at: now.checked_sub(Duration::from_millis(age_ms)).unwrap_or(now), report: statistics, had }
}
