//! Dynamic memory over one host.
//!
//! [`policy`] decides, [`driver`] asks VMs and tells them.

pub mod driver;
pub mod policy;
