//! Dynamic memory in one VM.
//!
//! The words that every part of ballast speaks ([`units`], [`limits`],
//! [`report`], [`agent`], [`status`], [`means`]) and, behind the `device` feature, the devices that
//! move memory between the guest and the host.

#[cfg(feature = "device")]
mod advise;
pub mod agent;
#[cfg(feature = "device")]
pub mod blocks;
#[cfg(feature = "device")]
pub mod collapse;
#[cfg(feature = "device")]
pub mod device;
#[cfg(feature = "device")]
pub mod discard;
pub mod limits;
pub mod means;
#[cfg(feature = "device")]
pub mod pending;
#[cfg(feature = "device")]
pub mod plug;
#[cfg(all(feature = "device", any(test, kani)))]
mod proofs;
#[cfg(feature = "device")]
pub mod ranges;
pub mod report;
#[cfg(feature = "device")]
mod reporting;
pub mod runtime;
#[cfg(feature = "device")]
mod stalls;
#[cfg(feature = "device")]
mod statistics;
pub mod status;
#[cfg(feature = "device")]
mod timer;
pub mod units;
