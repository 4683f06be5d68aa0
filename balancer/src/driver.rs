//! How the balancer speaks to virtual machines, one module for each kind of VMM.

pub mod ballast;
