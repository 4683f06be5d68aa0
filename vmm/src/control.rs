//! What can be asked of a running VM from outside: the API and signals end up here.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use balloon::limits::Limits;
use balloon::status::{BalloonCounters, DriverState, MemoryStatus, VmState, VmStatus};
use balloon::units::Bytes;

use crate::config::{Cpus, Name};

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
    /// The target lies outside the limits.
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
    /// The host failed.
    #[error("{0}")]
    Host(String),
}

impl ControlError {
    /// Whether the same request may succeed later without being changed (HTTP 409).
    pub const fn is_conflict(&self) -> bool {
        matches!(self, Self::State { .. } | Self::NoDriver)
    }
}

/// A VM's state in a sentence.
const fn word(state: VmState) -> &'static str {
    match state {
        VmState::Created => "not started yet",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stopped => "stopped",
    }
}

/// One VM, as seen by whoever steers it. Shared by the API, signals and the machine.
pub struct Control {
    name: Name,
    cpus: Cpus,
    map: Bytes,
    started: Instant,
    state: Mutex<VmState>,
    limits: Mutex<Limits>,
}

impl Control {
    /// The control of a VM that has been made and does not run yet.
    pub fn new(name: Name, cpus: Cpus, limits: Limits) -> Self {
        Self {
            name,
            cpus,
            map: limits.max(),
            started: Instant::now(),
            state: Mutex::new(VmState::Created),
            limits: Mutex::new(limits),
        }
    }

    /// What this VM is and where it stands.
    pub fn status(&self) -> VmStatus {
        VmStatus {
            name: self.name.as_str().to_owned(),
            pid: std::process::id(),
            state: *lock(&self.state),
            cpus: self.cpus.get(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Everything about this VM's memory now.
    pub fn memory(&self) -> MemoryStatus {
        let limits = *lock(&self.limits);
        MemoryStatus {
            limits,
            target: limits.startup(),
            actual: self.map,
            host_rss: Bytes::ZERO,
            driver: DriverState::Absent,
            report: None,
            counters: BalloonCounters::default(),
        }
    }

    /// Asks the guest to have `target`.
    ///
    /// # Errors
    /// [`ControlError::OutsideLimits`], and [`ControlError::NoDriver`] where nothing would follow.
    pub fn set_target(&self, target: Bytes) -> Result<(), ControlError> {
        let limits = *lock(&self.limits);
        let (min, max) = (limits.min(), limits.max());
        if !(min..=max).contains(&target) {
            return Err(ControlError::OutsideLimits { target, min, max });
        }
        Err(ControlError::NoDriver)
    }

    /// Sets new limits; a target outside them moves to the nearest that is inside.
    ///
    /// # Errors
    /// [`ControlError::BeyondMap`] when max is more than the mapping.
    pub fn set_limits(&self, limits: Limits) -> Result<(), ControlError> {
        if limits.max() > self.map {
            return Err(ControlError::BeyondMap { max: limits.max(), map: self.map });
        }
        *lock(&self.limits) = limits;
        Ok(())
    }

    /// Stops the vCPUs; returns when all of them stand still.
    ///
    /// # Errors
    /// [`ControlError::State`] unless the VM runs.
    pub fn pause(&self) -> Result<(), ControlError> {
        self.refuse("be paused")
    }

    /// Lets paused vCPUs run on.
    ///
    /// # Errors
    /// [`ControlError::State`] unless the VM is paused.
    pub fn resume(&self) -> Result<(), ControlError> {
        self.refuse("be resumed")
    }

    /// Presses the power button: a guest that listens shuts down in its own time.
    ///
    /// # Errors
    /// [`ControlError::State`] unless the VM runs.
    pub fn power_button(&self) -> Result<(), ControlError> {
        self.refuse("take a press of the power button")
    }

    /// Ends the VM at once, whatever the guest does.
    ///
    /// # Errors
    /// [`ControlError::State`] when it has ended already.
    pub fn shutdown(&self) -> Result<(), ControlError> {
        self.refuse("be shut down")
    }

    fn refuse(&self, action: &'static str) -> Result<(), ControlError> {
        Err(ControlError::State { state: *lock(&self.state), action })
    }
}

/// The value behind `mutex`; a panic elsewhere must not take this VM's control away.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
