//! Why something can't be done to a VM.

use api::status::{Pauser, VmState};
use api::units::Bytes;
use balloon::mechanism::steering::SteeringError;

use crate::vcpu_set::VisitError;

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ControlError {
    /// The VM's state does not allow it. A conflict: it may be allowed later.
    #[error("the VM is {}, so it can't {action}", word(*.state))]
    State {
        /// Where the VM stands.
        state: VmState,
        /// What was asked.
        action: &'static str,
    },
    /// No driver works on the balloon. A conflict: one may come.
    #[error("the guest has no balloon driver: load virtio_balloon in the guest")]
    NoDriver,
    /// No driver can plug what the target is above. A conflict: one may come.
    #[error(transparent)]
    CanNotGrow(SteeringError),
    /// The target lies outside the limits. A conflict: those may be changed.
    #[error("the target {target} lies outside the limits {min} to {max}: change the limits first")]
    OutsideLimits {
        /// As asked.
        target: Bytes,
        /// The VM's limit.
        min: Bytes,
        /// The VM's limit.
        max: Bytes,
    },
    /// The limits ask for more than was mapped when the VM was made.
    #[error("max {max} is more than the {map} this VM was started with: start it anew with a larger max")]
    BeyondMap {
        /// As asked.
        max: Bytes,
        /// What is mapped.
        map: Bytes,
    },
    /// Somebody resumed the VM before it was paused. A conflict.
    #[error("the VM was resumed before all of its vCPUs stood still")]
    Resumed,
    /// There is no such vCPU.
    #[error("{0}")]
    NoSuchVcpu(VisitError),
    /// The host failed.
    #[error("{0}")]
    Host(String),
}

impl ControlError {
    /// Whether the same request may succeed later without being changed (HTTP 409).
    pub const fn is_conflict(&self) -> bool {
        matches!(
            self,
            Self::State { .. }
                | Self::NoDriver
                | Self::CanNotGrow(_)
                | Self::OutsideLimits { .. }
                | Self::Resumed
        )
    }
}

/// A VM's state in a sentence.
const fn word(state: VmState) -> &'static str {
    match state {
        VmState::Created => "not started yet",
        VmState::Running => "running",
        VmState::Sleeping => "asleep",
        VmState::Paused { by: Pauser::Operator } => "paused",
        VmState::Paused { by: Pauser::Balancer } => "paused by the balancer",
        VmState::Stopped => "stopped",
    }
}
