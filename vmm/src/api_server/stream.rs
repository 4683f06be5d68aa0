//! A response without an end: lines of JSON, written as events come.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::event_stream::{FellBehind, Subscription};

/// The lines that are still to come on one connection.
#[derive(Clone, Debug)]
pub struct Stream(Arc<Mutex<Subscription>>);

impl From<Subscription> for Stream {
    fn from(subscription: Subscription) -> Self {
        Self(Arc::new(Mutex::new(subscription)))
    }
}

impl PartialEq for Stream {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Stream {}

impl Stream {
    /// The lines that have come since the last call; empty where none have.
    ///
    /// # Errors
    /// [`FellBehind`] where the client was too slow to get all of them.
    pub fn lines(&self) -> Result<Vec<u8>, FellBehind> {
        let events = self.0.lock().read()?;
        let mut lines = Vec::new();
        for event in events {
            // Plain numbers and words can always be encoded; a Vec takes all that is written.
            let _ = serde_json::to_writer(&mut lines, &event);
            lines.push(b'\n');
        }
        Ok(lines)
    }
}
