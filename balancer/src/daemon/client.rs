//! Asking the daemon that looks after a directory what it knows.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{State, socket_in};
use crate::driver::ballast;

/// The largest answer that is read, in bytes: some tens of thousands of VMs.
const LARGEST_BODY: usize = 32 << 20;

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
    /// It said something else.
    #[error("the balancer gave no answer that could be used: {0}")]
    Failed(String),
}

/// A client of one daemon. Keeps its connection open, and makes a new one when that broke.
pub struct Client {
    http: ballast::Client,
}

impl Client {
    /// A client of the daemon for the VMs in `directory`. Connects at the first request.
    pub fn new(directory: &Path, timeout: Duration) -> Self {
        let http = ballast::Client::new(socket_in(directory));
        Self { http: http.with_timeout(timeout).with_largest_body(LARGEST_BODY) }
    }

    /// `GET /state`: the host and every VM at the end of the last round.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn state(&mut self) -> Result<State, Error> {
        self.http.get("/state").await.map_err(|error| match error {
            ballast::Error::NoSuchVm { socket, .. } => Error::NotRunning { socket },
            ballast::Error::NotAnswering { .. } => Error::NotAnswering,
            ballast::Error::HungUp { cause, .. } => Error::Failed(format!("it hung up ({cause})")),
            ballast::Error::Nonsense { what, .. } => {
                Error::Failed(format!("{what}; is it of this version of ballast?"))
            }
            ballast::Error::Refused { error, .. } => Error::Failed(error),
            error @ ballast::Error::NotAllowed { .. } => Error::Failed(error.to_string()),
        })
    }
}
