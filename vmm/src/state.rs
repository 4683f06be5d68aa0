//! Pausing and letting run on: what a request does to a VM, by where it stands and who asks.
//!
//! | stands | operator pauses | balancer pauses | disk pauses | operator resumes | balancer resumes |
//! |---|---|---|---|---|---|
//! | running | paused | paused by the balancer | paused by a disk | refused | nothing to do |
//! | paused | refused | refused | nothing to do | running | refused |
//! | paused by the balancer | paused | nothing to do | paused by a disk | running | running |
//! | paused by a disk | refused | refused | nothing to do | running | refused |
//!
//! All else is refused. An operator acts, as ever: a second pause is told from the first. The
//! balancer asks for a state: one whose answer was lost may ask again, and a refusal means that
//! the VM is not its to steer. A disk that the host fails pauses whatever runs, and never resumes.

use api::status::{Pauser, VmState};

/// What is to be done to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Hold its vCPUs.
    Hold {
        /// In whose name.
        by: Pauser,
    },
    /// Let its vCPUs run.
    Run,
    /// It stays paused, in another name.
    TakeOver {
        /// In whose name.
        by: Pauser,
    },
    /// It is as it was asked to be.
    Nothing,
}

impl Change {
    /// Where a VM stands after this, that stood at `before`.
    pub const fn end(self, before: VmState) -> VmState {
        match self {
            Self::Hold { by } | Self::TakeOver { by } => VmState::Paused { by },
            Self::Run => VmState::Running,
            Self::Nothing => before,
        }
    }
}

/// What it takes to pause.
///
/// # Errors
/// What the VM can't do, for "the VM is ..., so it can't ...".
pub const fn pause(state: VmState, by: Pauser) -> Result<Change, &'static str> {
    match (state, by) {
        (VmState::Running, by) => Ok(Change::Hold { by }),
        (VmState::Paused { by: Pauser::Balancer }, Pauser::Operator) => Ok(Change::TakeOver { by }),
        (VmState::Paused { by: Pauser::Balancer }, Pauser::Balancer)
        | (VmState::Paused { by: Pauser::Operator | Pauser::Disk }, Pauser::Disk) => Ok(Change::Nothing),
        (VmState::Paused { by: Pauser::Balancer }, Pauser::Disk) => Ok(Change::TakeOver { by }),
        (_, Pauser::Operator) => Err("be paused"),
        (_, Pauser::Disk) => Err("be paused by a disk"),
        (_, Pauser::Balancer) => Err("be paused by the balancer"),
    }
}

/// What it takes to let run on.
///
/// # Errors
/// As [`pause`].
pub const fn resume(state: VmState, by: Pauser) -> Result<Change, &'static str> {
    match (state, by) {
        (VmState::Paused { .. }, Pauser::Operator)
        | (VmState::Paused { by: Pauser::Balancer }, Pauser::Balancer) => Ok(Change::Run),
        (VmState::Running, Pauser::Balancer) => Ok(Change::Nothing),
        (VmState::Paused { by: Pauser::Operator | Pauser::Disk }, Pauser::Balancer) => {
            Err("be resumed by anyone but an operator")
        }
        (_, Pauser::Operator) => Err("be resumed"),
        (_, Pauser::Disk) => Err("be resumed by a disk"),
        (_, Pauser::Balancer) => Err("be resumed by the balancer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSED: VmState = VmState::Paused { by: Pauser::Operator };
    const LAID_DOWN: VmState = VmState::Paused { by: Pauser::Balancer };
    const FAILED: VmState = VmState::Paused { by: Pauser::Disk };

    /// Where each request leads from each state; `None` where it is refused.
    #[test]
    fn every_request_in_every_state() {
        let after = |state, result: Result<Change, _>| result.ok().map(|change| change.end(state));
        for (state, [operator_pauses, balancer_pauses, operator_resumes, balancer_resumes]) in [
            (VmState::Created, [None; 4]),
            (VmState::Stopped, [None; 4]),
            (VmState::Running, [Some(PAUSED), Some(LAID_DOWN), None, Some(VmState::Running)]),
            (PAUSED, [None, None, Some(VmState::Running), None]),
            (LAID_DOWN, [Some(PAUSED), Some(LAID_DOWN), Some(VmState::Running), Some(VmState::Running)]),
            (FAILED, [None, None, Some(VmState::Running), None]),
        ] {
            assert_eq!(after(state, pause(state, Pauser::Operator)), operator_pauses, "{state:?}");
            assert_eq!(after(state, pause(state, Pauser::Balancer)), balancer_pauses, "{state:?}");
            assert_eq!(after(state, resume(state, Pauser::Operator)), operator_resumes, "{state:?}");
            assert_eq!(after(state, resume(state, Pauser::Balancer)), balancer_resumes, "{state:?}");
        }
    }

    #[test]
    fn a_disk_pauses_and_never_resumes() {
        for (state, after) in [
            (VmState::Created, None),
            (VmState::Stopped, None),
            (VmState::Running, Some(FAILED)),
            (PAUSED, Some(PAUSED)),
            (LAID_DOWN, Some(FAILED)),
            (FAILED, Some(FAILED)),
        ] {
            assert_eq!(pause(state, Pauser::Disk).ok().map(|change| change.end(state)), after, "{state:?}");
            assert!(resume(state, Pauser::Disk).is_err());
        }
    }

    #[test]
    fn vcpus_are_touched_only_where_they_change() {
        assert_eq!(pause(LAID_DOWN, Pauser::Operator), Ok(Change::TakeOver { by: Pauser::Operator }));
        assert_eq!(pause(LAID_DOWN, Pauser::Balancer), Ok(Change::Nothing));
        assert_eq!(resume(VmState::Running, Pauser::Balancer), Ok(Change::Nothing));
    }
}
