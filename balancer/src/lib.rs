//! Dynamic memory over one host.
//!
//! [`policy`] decides, [`host`] tells what there is, [`driver`] asks VMs and tells
//! them, and [`daemon`] does all of it once a second. [`sim`] shows what the same
//! policy does to simulated VMs, beside others' laws.

pub mod daemon;
pub mod driver;
pub mod host;
pub mod policy;
pub mod sim;
