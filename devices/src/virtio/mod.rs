//! virtio 1.2: what a device is ([`device`]), how it works on its queues
//! ([`queue`]), and how a guest reaches it ([`mmio`]).

pub mod device;
pub mod mmio;
pub mod port;
#[cfg(any(test, kani))]
mod proofs;
pub mod queue;
pub mod rng;
