//! What clients of the daemon's socket are told when they don't get what they asked for.

use api::units::Bytes;

use crate::driver::Error;

/// Why something that was asked for was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// No VM of that name.
    #[error("there is no VM `{0}` here: GET /state lists those that there are")]
    NoSuchVm(String),
    /// The path has no name where one belongs.
    #[error("the path names no VM: {0}")]
    Name(String),
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
    /// The VM can't start: even if all others gave what they can, it would not fit.
    #[error(
        "there is no room for `{name}`: it needs {size} to start, its VMM and page tables counted, and \
         {kept} of the budget of {budget} can't be taken from others (the min of each, and all of those \
         that can't be shrunk). Stop a VM, lower a min, or start with at most {left} instead of {startup}"
    )]
    NoRoom {
        /// Which VM.
        name: String,
        /// What it needs.
        size: Bytes,
        /// What others keep.
        kept: Bytes,
        /// What there is.
        budget: Bytes,
        /// What its guest would start with.
        startup: Bytes,
        /// What its guest could start with.
        left: Bytes,
    },
    /// There is no room even for what a VM on reserved huge pages needs beside them.
    #[error(
        "there is no room for `{name}`: beside its huge pages it needs {size} for its VMM and page tables, and \
         {kept} of the budget of {budget} can't be taken from others (the min of each, and all of those \
         that can't be shrunk). Stop a VM, or lower a min"
    )]
    NoRoomForVmm {
        /// Which VM.
        name: String,
        /// What it needs.
        size: Bytes,
        /// What others keep.
        kept: Bytes,
        /// What there is.
        budget: Bytes,
    },
    /// Others were too slow to make room, or nobody waits any more.
    #[error(
        "there is not room enough for `{name}` yet: {granted} of {size}. Others give way slowly; try again"
    )]
    NotInTime {
        /// Which VM.
        name: String,
        /// What there was.
        granted: Bytes,
        /// What it needs.
        size: Bytes,
    },
    /// A VM of this name runs.
    #[error("a VM `{0}` runs already")]
    RunsAlready(String),
    /// Somebody else asked for room for a VM of this name.
    #[error(
        "another request for room for `{0}` took the place of this one: only one VM of this name can run; \
         give the other a name of its own"
    )]
    Replaced(String),
    /// There is nothing to give back.
    #[error("nothing is reserved for `{0}`")]
    NoReservation(String),
    /// Somebody reserves without end.
    #[error("too many reservations are held already")]
    TooManyReservations,
    /// The daemon is about to end.
    #[error("the balancer is stopping")]
    Stopping,
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused { status, error, .. } => Self::OfVm { status, error },
            error => Self::NoAnswer(error.to_string()),
        }
    }
}
