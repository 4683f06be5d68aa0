//! Disk images as files: what a guest finds on its disks before it runs.
//!
//! [`debian`] builds a bootable image of a distribution's own packages, and [`seed`] makes the disk that tells its cloud-init who may
//! log in. [`mod@file`] makes disks, and looks at them.

pub mod debian;
pub mod file;
pub mod seed;
mod tool;

pub use tool::{Stop, ToolError};

/// Where a guest's udev looks for [`WAKE_RULE`].
const WAKE_RULE_PATH: &str = "/etc/udev/rules.d/60-ballast-wake.rules";

/// Has a guest wake by its power button (udev(7)). Nothing in a machine's tables makes Linux do that where the
/// machine lacks ACPI's old hardware (drivers/acpi/evged.c).
const WAKE_RULE: &str = include_str!("../../resources/udev/60-ballast-wake.rules");
