//! Asking the balancer for room before a VM starts.

use std::io;
use std::path::Path;
use std::time::Duration;

use api::limits::Limits;
use api::runtime;
use balancer::daemon::client::{Client, Error};
use balancer::daemon::{Process, ReservationRequest, ReservationView, socket_in};
use tracing::{info, warn};
use vmm::config::Backing;

use crate::client;
use crate::failure::Failure;

/// How long the balancer may take memory from others.
const WAIT: Duration = Duration::from_secs(30);

/// Beyond that, how long until it is held to hang.
const PATIENCE: Duration = Duration::from_secs(5);

/// Room that a balancer keeps for a VM until its socket answers.
pub struct Reservation {
    vm: String,
}

/// Room for `vm`, which this process will be, and whose guest's memory lies in `backing`; `None` where no
/// balancer runs, which is said.
///
/// # Errors
/// There is no room, there was not enough in time, or a balancer is there and gives no answer: to start
/// then would be to take memory that is promised to others.
pub fn reserve(vm: &str, limits: Limits, backing: Backing) -> Result<Option<Reservation>, Failure> {
    let wait_ms = u64::try_from(WAIT.as_millis()).ok();
    let request = ReservationRequest {
        name: vm.to_owned(),
        limits,
        wait_ms,
        process: Process::own(),
        reserved_huge_pages: backing == Backing::HugePages2M,
    };
    let directory = runtime::directory()?;
    let socket = socket_in(&directory);
    let answer = if is_missing(&socket) {
        Err(Error::NotRunning { socket })
    } else {
        client::block_on(async { Ok(Client::new(&directory, WAIT + PATIENCE).reserve(&request).await) })?
    };
    judge(request.name, answer).map_err(Failure::new)
}

/// Whether nobody listens there, for sure. An event loop for a client, only to find that out, would cost each VM half
/// a MiB for its whole life.
fn is_missing(socket: &Path) -> bool {
    socket.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// What an answer to a request for room for `vm` means, or why it must not start.
fn judge(vm: String, answer: Result<ReservationView, Error>) -> Result<Option<Reservation>, String> {
    match answer {
        Ok(_) => Ok(Some(Reservation { vm })),
        Err(Error::NotRunning { socket }) => {
            if socket.exists() {
                warn!("the balancer was killed and has not come back: starting without asking for room");
            } else {
                info!("no balancer runs: starting without asking for room");
            }
            Ok(None)
        }
        Err(Error::Refused(sentence)) => Err(format!("{sentence} (--no-balancer starts without asking it)")),
        Err(error @ (Error::NotAnswering | Error::HungUp(_) | Error::Failed(_))) => {
            Err(format!("{error}; there may be no room for `{vm}` (--no-balancer starts without asking it)"))
        }
    }
}

impl Reservation {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_that_is_not_there_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("balancer.sock");
        assert!(is_missing(&socket));
        // Whatever it is, somebody put it there.
        std::os::unix::fs::symlink("nowhere", &socket).unwrap();
        assert!(!is_missing(&socket));
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(!is_missing(&file.join("balancer.sock")));
    }

    #[test]
    fn only_where_no_balancer_runs_a_vm_starts_without_room() {
        let judged = |error| judge("web".to_owned(), Err(error));
        assert!(
            judged(Error::NotRunning { socket: "/x".into() }).is_ok_and(|reservation| reservation.is_none())
        );
        for error in [
            Error::Refused("no".to_owned()),
            Error::NotAnswering,
            Error::HungUp("closed".to_owned()),
            Error::Failed("nonsense".to_owned()),
        ] {
            let said = error.to_string();
            let refusal = judged(error).err().expect(&said);
            assert!(refusal.starts_with(&said) && refusal.contains("--no-balancer"), "{refusal}");
        }
    }
}
