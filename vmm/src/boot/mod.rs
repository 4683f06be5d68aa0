//! From a kernel file to a first vCPU that is ready to run it.

pub mod files;
pub mod kernel;
mod sparse;
pub mod unpacked;
