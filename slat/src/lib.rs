//! Measures what second-level address translation (SLAT: Intel EPT, AMD NPT)
//! does on a host.
//!
//! [`walk`] is the model: what a TLB miss costs in memory references;
//! [`address`] follows a real one.
//! [`counters`] reads KVM's own statistics. Every number that leaves this
//! crate is a [`figure::Figure`]: it says whether it is exact, real time, a
//! direction only, or not available.

pub mod address;
pub mod claims;
pub mod counters;
pub mod figure;
pub mod host;
pub mod lab;
pub mod linux;
pub mod payload;
pub mod probe;
pub mod reload;
pub mod report;
pub mod run;
pub mod walk;
