//! Dynamic memory in one VM: the devices that move memory between the guest and the host.

mod advise;
pub mod blocks;
pub mod collapse;
pub mod device;
pub mod discard;
pub mod mechanism;
pub mod pending;
pub mod plug;
#[cfg(any(test, kani))]
mod proofs;
pub mod ranges;
mod reporting;
mod stalls;
mod statistics;
mod timer;
mod unmanaged;
