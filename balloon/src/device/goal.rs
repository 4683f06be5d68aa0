//! What the balloon is to hold: what the host asks for, and what a guest that took pages back can spare again.

use std::time::Duration;

use api::units::Bytes;

use super::Balloon;
use super::handle::Shared;

/// How long a report decides what the guest is asked for. After that it is asked for a step, and for
/// another report.
const NEWS_FOR: Duration = Duration::from_secs(2);

/// A guest that took pages back is asked for none of them for so long.
const REFILL_AFTER: Duration = Duration::from_secs(1);
/// After that it is asked for this part of what it can spare, in percent, and left with so much of it.
const REFILL_PERCENT: u64 = 75;
const REFILL_LEAVES: Bytes = Bytes::mib(16);

impl Balloon {
    /// Takes up what the host has asked for since the last time; returns whether that is news.
    pub(super) fn take_request(&mut self) -> bool {
        let (request, anew) = {
            let mut state = self.shared.state();
            (state.requests, std::mem::take(&mut state.asks_anew))
        };
        if request == self.request {
            return false;
        }
        self.request = request;
        let (wanted, free) = (self.shared.wanted(), free(&self.shared));
        if anew {
            self.pace.aim(wanted, free);
        } else {
            self.pace.adjust(wanted, free);
        }
        true
    }

    /// Goes for what the balloon shall hold by now: a guest may say that it manages more or less than before.
    pub(super) fn aim(&mut self) {
        let wanted = self.shared.wanted();
        if wanted != self.pace.wanted() {
            self.pace.adjust(wanted, free(&self.shared));
        }
    }

    /// Asks a guest that took pages back for what it says that it can spare again.
    pub(super) fn refill(&mut self) {
        if !self.refills || !self.pace.has_taken_back() {
            return;
        }
        let spare = {
            let state = self.shared.state();
            if state.took_back.is_some_and(|(at, _)| at.elapsed() < REFILL_AFTER) {
                return;
            }
            state.report.as_ref().and_then(|received| received.report.spare()).unwrap_or_default()
        };
        self.pace.refill(spare.percent(REFILL_PERCENT).min(spare.saturating_sub(REFILL_LEAVES)));
    }
}

/// What the guest has free, as far as it said so lately.
pub(super) fn free(shared: &Shared) -> Bytes {
    let state = shared.state();
    let received = state.report.as_ref().filter(|received| received.at.elapsed() < NEWS_FOR);
    received.and_then(|received| received.report.free).unwrap_or_default()
}
