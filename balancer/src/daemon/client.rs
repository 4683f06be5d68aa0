//! Asking the daemon that looks after a directory what it knows, and to do things.

use std::path::{Path, PathBuf};
use std::time::Duration;

use api::client::{self, BALLAST, Http};
use api::limits::Limits;
use hyper::Method;
use tokio::time::{Instant, sleep};
use tracing::info;

use super::api_error;
use super::history::{Decisions, Why};
use super::reservation::{ReservationRequest, ReservationView};
use super::{State, socket_in};

/// The largest answer that is read, in bytes: some tens of thousands of VMs.
const LARGEST_ANSWER: usize = 32 << 20;

/// How long a daemon that has ended is given to come back.
pub const RESTART: Duration = Duration::from_secs(5);

/// How often it is looked for meanwhile.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Why the daemon said nothing that could be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None runs for this directory.
    #[error("no balancer runs (nobody answers at {}): start `ballast balancer`", .socket.display())]
    NotRunning {
        /// Where it would listen.
        socket: PathBuf,
    },
    /// It is there and says nothing.
    #[error("the balancer does not answer: it hangs or this host is overloaded")]
    NotAnswering,
    /// It ended in the middle of an answer: a new one may be there in a moment.
    #[error("the balancer ended before it answered ({0})")]
    HungUp(String),
    /// It understood and said no.
    #[error("{0}")]
    Refused(String),
    /// It said something else.
    #[error("the balancer gave no answer that could be used: {0}")]
    Failed(String),
}

impl From<client::Error> for Error {
    fn from(error: client::Error) -> Self {
        match error {
            client::Error::NoSuchVm { socket, .. } => Self::NotRunning { socket },
            client::Error::NotAnswering { .. } => Self::NotAnswering,
            client::Error::HungUp { cause, .. } => Self::HungUp(cause),
            client::Error::Nonsense { what, .. } => {
                Self::Failed(format!("{what}; is it of this version of ballast?"))
            }
            client::Error::Refused { error, .. } if error == api_error::ApiError::Stopping.to_string() => {
                Self::HungUp(error)
            }
            client::Error::Refused { error, .. } => Self::Refused(error),
            error @ client::Error::Busy { .. } => Self::Failed(error.to_string()),
            client::Error::Unable { cause, .. } => {
                Self::Failed(format!("this process could not ask it: {cause}"))
            }
            client::Error::NotAllowed { socket } => Self::Failed(format!(
                "not allowed to connect to {}: run as the user who runs it, or as root",
                socket.display()
            )),
        }
    }
}

/// A client of one daemon. Keeps its connection open, and makes a new one when that broke. Every request may
/// fail as [`Error`] says.
pub struct Client {
    http: Http,
}

impl Client {
    /// A client of the daemon for the VMs in `directory`. Connects at the first request.
    ///
    /// What is asked for is done between two rounds, each of which takes less than the
    /// daemon's interval: leave it `timeout` enough.
    pub fn new(directory: &Path, timeout: Duration) -> Self {
        let mut http = Http::new(&BALLAST, socket_in(directory), timeout);
        http.set_largest_answer(LARGEST_ANSWER);
        Self { http }
    }

    /// `GET /state`: the host and every VM at the end of the last round.
    pub async fn state(&mut self) -> Result<State, Error> {
        Ok(self.http.get("/state").await?)
    }

    /// `GET /decisions`: the last decisions about any VM.
    pub async fn decisions(&mut self) -> Result<Decisions, Error> {
        Ok(self.http.get("/decisions").await?)
    }

    /// `GET /vms/NAME/why`: how one VM came to have what it has.
    ///
    /// # Errors
    /// [`Error::Refused`] where the daemon knows no such VM.
    pub async fn why(&mut self, vm: &str) -> Result<Why, Error> {
        Ok(self.http.get(&format!("/vms/{vm}/why")).await?)
    }

    /// `PUT /vms/NAME/limits`: gives a VM other limits.
    ///
    /// # Errors
    /// [`Error::Refused`] with the VM's own sentence.
    pub async fn set_limits(&mut self, vm: &str, limits: Limits) -> Result<(), Error> {
        Ok(self.http.send(Method::PUT, &format!("/vms/{vm}/limits"), &limits).await?)
    }

    /// `POST /reservations`: makes room for a VM that is about to start. Answered when there is. Asks
    /// again where the daemon ends before it has answered, or was killed before, and a new one is there within
    /// [`RESTART`], and where more clients come at once than its socket has room for, for as long as it is to
    /// wait.
    ///
    /// # Errors
    /// [`Error::Refused`] with the numbers where there is no room.
    pub async fn reserve(&mut self, request: &ReservationRequest) -> Result<ReservationView, Error> {
        let last = Instant::now() + request.wait() + RESTART;
        let mut again_until: Option<Instant> = None;
        loop {
            let error = match self.http.ask("/reservations", request).await {
                Ok(view) => return Ok(view),
                Err(error) => error,
            };
            let now = Instant::now();
            let crowded = error.is_crowded();
            let error = Error::from(error);
            let again = match error {
                Error::NotAnswering if crowded => last,
                Error::HungUp(_) => *again_until.insert(last.min(now + RESTART)),
                // One that is stopped takes its socket along. One that was killed is brought back by its service
                // manager: what it promised still stands.
                Error::NotRunning { ref socket } if again_until.is_none() && socket.exists() => {
                    info!("the balancer was killed: waiting up to {} s for a new one", RESTART.as_secs());
                    *again_until.insert(last.min(now + RESTART))
                }
                Error::NotRunning { .. } => again_until.unwrap_or(now),
                _ => now,
            };
            if now >= again {
                return Err(error);
            }
            sleep(ASK_AGAIN).await;
        }
    }

    /// `DELETE /reservations/NAME`: the VM does not start after all.
    ///
    /// # Errors
    /// [`Error::Refused`] where nothing is reserved for it.
    pub async fn release(&mut self, vm: &str) -> Result<(), Error> {
        Ok(self.http.send(Method::DELETE, &format!("/reservations/{vm}"), &()).await?)
    }
}
