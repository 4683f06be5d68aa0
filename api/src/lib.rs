//! The words that all parts of ballast speak, and the wire between them.

pub mod agent;
#[cfg(feature = "client")]
pub mod client;
pub mod guest_memory;
pub mod limits;
pub mod metrics;
#[cfg(feature = "problem")]
pub mod problem;
pub mod report;
pub mod runtime;
pub mod service_manager;
pub mod signals;
pub mod status;
pub mod text;
pub mod units;
pub mod version;
