//! Dynamic memory over one host.
//!
//! [`policy`] decides, [`host`] reads what there is, [`driver`] speaks to VMs, and [`daemon`] runs all of it
//! once a second. The crate `sim` runs the same policy over simulated VMs.

pub mod daemon;
pub mod driver;
pub mod host;
pub mod policy;
