//! Disk images as files: what a guest finds on its disks before it runs.
//!
//! [`debian`] builds a bootable image of a distribution's own packages, and [`seed`] makes the disk that tells its cloud-init who may
//! log in. [`mod@file`] makes disks, and looks at them.

pub mod debian;
pub mod file;
pub mod seed;
mod tool;

pub use tool::{Stop, ToolError};
