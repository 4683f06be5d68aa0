//! virtio 1.2: what a device is ([`device`]), how it works on its queues ([`queue`]), what its driver
//! makes of it (`core`), and how a guest reaches it ([`mmio`], [`pci`]).

pub mod block;
mod core;
pub mod device;
pub mod fs;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod port;
#[cfg(any(test, kani))]
mod proofs;
pub mod queue;
pub mod rng;
pub mod saved;
pub mod vhost_user;
pub mod vsock;

use crate::events::Subscriber;
use crate::state::StateError;
use saved::VirtioState;

/// A virtio device behind registers, as its owner sees it whatever transport carries it.
pub trait Transport: Subscriber {
    /// Has the device stand still: once this returns it takes no chain, has none in flight, and serves
    /// none of its events. Waits for what is in flight. May come at any time, more than once too.
    fn drain(&mut self);

    /// Lets the device go on, and has it look at every queue once.
    fn resume(&mut self);

    /// The state of the device and its transport. The guest's vCPUs must stand still and the device be
    /// drained until the guest's memory is saved too.
    ///
    /// # Errors
    /// [`StateError::NotSaved`] where the device has not learnt it.
    fn save(&self) -> Result<VirtioState, StateError>;
}
