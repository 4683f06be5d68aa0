//! Dynamic memory over one host.
//!
//! [`policy`] decides, [`host`] tells what there is, [`driver`] asks VMs and tells
//! them, and [`daemon`] does all of it once a second. The crate `sim` plays
//! the same policy over simulated VMs.

pub mod daemon;
pub mod driver;
pub mod host;
pub mod policy;
