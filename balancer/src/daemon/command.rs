//! What clients of the daemon's socket ask the rounds to do.

use balloon::limits::Limits;
use tokio::sync::oneshot;

use crate::driver::Error;

/// Why something that was asked for was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No VM of that name.
    #[error("there is no VM `{0}` here: GET /state lists those that there are")]
    NoSuchVm(String),
    /// The VM said no.
    #[error("{error}")]
    OfVm {
        /// Its HTTP status, 4xx or 5xx, or its VMM's name for the error.
        status: String,
        /// Its own sentence.
        error: String,
    },
    /// The VM gave no answer that can be used.
    #[error("{0}")]
    NoAnswer(String),
    /// The body can't be read, or is not what belongs there.
    #[error("the body is not what belongs here: {error}")]
    Body {
        /// The HTTP status, 4xx.
        status: u16,
        /// What is wrong with it.
        error: String,
    },
    /// The VM is being asked for something else.
    #[error("{0} still owes the answer to an earlier request: try again in a second")]
    Busy(String),
    /// The daemon is about to end.
    #[error("the balancer is stopping")]
    Stopping,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused { status, error, .. } => Self::OfVm { status, error },
            error => Self::NoAnswer(error.to_string()),
        }
    }
}

/// One thing to do, with the place for its answer.
#[derive(Debug)]
pub enum Command {
    /// Give a VM other limits.
    SetLimits {
        /// Which.
        vm: String,
        /// Its limits from then on.
        limits: Limits,
        /// Told when the VM has taken or refused them.
        answer: oneshot::Sender<Result<(), Refusal>>,
    },
}
