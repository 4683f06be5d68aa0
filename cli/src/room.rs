//! Asking the balancer for room before a VM starts.

use std::time::Duration;

use balancer::daemon::client::{Client, Error};
use balancer::daemon::{Process, Wanted};
use balloon::limits::Limits;
use balloon::runtime;
use tracing::{info, warn};

use crate::client;
use crate::failure::Failure;

/// How long the balancer may take memory from others.
const WAIT: Duration = Duration::from_secs(30);

/// Beyond that, how long until it is held to hang.
const PATIENCE: Duration = Duration::from_secs(5);

/// Room that a balancer keeps for a VM until its socket answers.
pub struct Room {
    vm: String,
}

/// Room for `vm`, which this process will be; `None` where nobody could be asked, which is said once.
///
/// # Errors
/// There is no room, or there was not enough in time.
pub fn reserve(vm: &str, limits: Limits) -> Result<Option<Room>, Failure> {
    let wait_ms = u64::try_from(WAIT.as_millis()).ok();
    let wanted = Wanted { name: vm.to_owned(), limits, wait_ms, process: Process::own() };
    let directory = runtime::directory()?;
    let answer =
        client::block_on(async { Ok(Client::new(&directory, WAIT + PATIENCE).reserve(&wanted).await) })?;
    match answer {
        Ok(_) => Ok(Some(Room { vm: wanted.name })),
        Err(Error::NotRunning { .. }) => {
            info!("no balancer runs: starting without asking for room");
            Ok(None)
        }
        Err(Error::Refused(sentence)) => {
            Err(Failure::new(format!("{sentence} (--no-balancer starts without asking it)")))
        }
        Err(error @ (Error::NotAnswering | Error::HungUp(_) | Error::Failed(_))) => {
            warn!("starting without room: {error}");
            Ok(None)
        }
    }
}

impl Room {
    /// The VM does not start after all. What gets lost of this is dropped by the balancer itself.
    pub fn give_back(self) {
        let Ok(directory) = runtime::directory() else { return };
        let released =
            client::block_on(async { Ok(Client::new(&directory, PATIENCE).release(&self.vm).await) });
        if let Ok(Err(error)) = released {
            info!("the room that was reserved is not given back yet: {error}");
        }
    }
}
