//! Dynamic memory in one VM.
//!
//! The words that every part of ballast speaks ([`units`], [`limits`],
//! [`report`], [`status`]) and, behind the `device` feature, the devices that
//! move memory between the guest and the host.

pub mod limits;
pub mod report;
pub mod runtime;
pub mod status;
pub mod units;
