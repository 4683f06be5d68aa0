//! Connections to VMs, where there are fewer descriptors than VMs.
//!
//! Each driver keeps its connection from one request to the next. Where there are too few descriptors for that,
//! some would be kept for good and the others never made. Then every request waits for one of those that there
//! are, and gives its connection up.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::driver::Driver;

/// How many connections there may be at a time.
#[derive(Clone, Debug, Default)]
pub struct Connections(Option<(usize, Arc<Semaphore>)>);

/// One of them, for one request.
#[derive(Debug)]
pub struct Turn(Option<OwnedSemaphorePermit>);

impl Connections {
    /// Goes on with `most` of them for `vms`. True if drivers must not keep theirs from now on.
    pub fn limit(&mut self, most: usize, vms: usize) -> bool {
        if vms <= most {
            self.0 = None;
            return false;
        }
        // There is always one, or nobody would ever be asked.
        let most = most.max(1);
        if self.0.as_ref().is_none_or(|(now, _)| *now != most) {
            self.0 = Some((most, Arc::new(Semaphore::new(most))));
        }
        true
    }

    /// Waits for one, if there are too few.
    pub async fn turn(&self) -> Turn {
        let Some((_, permits)) = &self.0 else { return Turn(None) };
        // It is never closed.
        Turn(Arc::clone(permits).acquire_owned().await.ok())
    }
}

impl Turn {
    /// Ends the request that `driver` was asked.
    pub fn end(self, driver: &mut dyn Driver) {
        if self.0.is_some() {
            driver.hang_up();
        }
    }
}
