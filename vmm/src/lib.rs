//! One virtual machine in one process.

pub mod boot;
pub mod config;
pub mod control;
pub mod cpuid;
pub mod exit;
pub mod memory;
