//! One virtual machine in one process.

pub mod config;
pub mod control;
pub mod exit;
