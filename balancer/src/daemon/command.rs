//! What clients of the daemon's socket ask the rounds to do.

use api::limits::Limits;
use tokio::sync::oneshot;

use super::api_error::ApiError;
use super::reservation::{ReservationRequest, ReservationView};

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
        answer: oneshot::Sender<Result<(), ApiError>>,
    },
    /// Make room for a VM that is about to start.
    Reserve {
        /// What for.
        request: ReservationRequest,
        /// Told when there is room, or that there will be none.
        answer: oneshot::Sender<Result<ReservationView, ApiError>>,
    },
    /// A VM that was about to start does not.
    Release {
        /// Which.
        name: String,
        /// Told at once.
        answer: oneshot::Sender<Result<(), ApiError>>,
    },
}

impl Command {
    /// Whether nobody waits for its answer any more.
    pub fn is_abandoned(&self) -> bool {
        match self {
            Self::SetLimits { answer, .. } | Self::Release { answer, .. } => answer.is_closed(),
            Self::Reserve { answer, .. } => answer.is_closed(),
        }
    }
}
