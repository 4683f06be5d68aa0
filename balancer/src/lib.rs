//! Dynamic memory over one host.
//!
//! [`driver`] is how VMs are asked and told.

pub mod driver;
