//! Dynamic memory over one host.
//!
//! [`policy`] decides, [`host`] reads what there is, [`driver`] speaks to VMs, and [`daemon`] runs all of it
//! once a second. [`fleet`] is what a host tells a cluster of itself. The crate `sim` runs the same policy over simulated
//! VMs, and the same figures over simulated hosts.

pub mod daemon;
pub mod driver;
pub mod fleet;
pub mod host;
pub mod policy;
