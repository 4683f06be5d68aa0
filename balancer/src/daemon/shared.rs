//! What the rounds leave for those who answer clients meanwhile.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::history::History;
use super::state::State;
use super::timings::Timings;

/// The last [`State`] and the past, for whoever asks while the next round runs.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<Arc<State>>,
    history: Mutex<History>,
    timings: Timings,
}

impl Shared {
    /// The last one.
    pub fn get(&self) -> Arc<State> {
        Arc::clone(&self.0.state.lock())
    }

    /// Puts a newer one in its place.
    pub fn set(&self, state: State) {
        *self.0.state.lock() = Arc::new(state);
    }

    /// How long things take.
    pub fn timings(&self) -> &Timings {
        &self.0.timings
    }

    /// The past. Don't hold it for long: rounds wait for it.
    pub fn history(&self) -> MutexGuard<'_, History> {
        self.0.history.lock()
    }
}
