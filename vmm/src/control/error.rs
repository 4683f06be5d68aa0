//! Why something can't be done to a VM.

use api::status::{Pauser, VmState};
use api::units::Bytes;
use balloon::mechanism::steering::SteeringError;

use crate::console::AttachError;
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
    /// The VM has no console that clients could be attached to. A conflict: it may have one once it has started.
    #[error("this VM has no console, or none yet")]
    NoConsole,
    /// The VM has no socket device. A conflict: it may have one once it has started.
    #[error("this VM has no socket device: start it with --vsock")]
    NoVsock,
    /// The console takes no such client now. A conflict: another one may go.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// There is no such disk.
    #[error("the VM has no disk `{asked}`: it has {}", if known.is_empty() { "none" } else { known })]
    NoSuchDisk {
        /// As asked.
        asked: String,
        /// Those that there are.
        known: String,
    },
    /// A disk can't become as large.
    #[error("{0}")]
    DiskSize(String),
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
                | Self::NoConsole
                | Self::NoVsock
                | Self::Attach(_)
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
        VmState::Paused { by: Pauser::Disk } => "paused by a disk that the host failed",
        VmState::Stopped => "stopped",
    }
}
