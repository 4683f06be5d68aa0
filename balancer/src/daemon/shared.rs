//! What the rounds share with the tasks that answer clients.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::history::History;
use super::state::State;
use super::timings::Timings;

/// The last [`State`], the history and timings, readable while a round runs.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<Arc<State>>,
    history: Mutex<History>,
    timings: Timings,
}

impl Shared {
    /// The last state.
    pub fn get(&self) -> Arc<State> {
        Arc::clone(&self.0.state.lock())
    }

    /// Replaces the state.
    pub fn set(&self, state: State) {
        *self.0.state.lock() = Arc::new(state);
    }

    /// How long things take.
    pub fn timings(&self) -> &Timings {
        &self.0.timings
    }

    /// The history. Don't hold it for long: rounds wait for it.
    pub fn history(&self) -> MutexGuard<'_, History> {
        self.0.history.lock()
    }
}
