//! Kernels as files: what is packed in a bzImage is unpacked on the host and relocated as its own decompressor
//! would. And kernels on disks: what a guest's disk says that it is to be booted with ([`disk`]).
//!
//! Everything here is written by somebody else. So the bytes of a bzImage or a disk are read by a process of their own
//! that can do nothing else ([`helper`], [`disk::helper`]), and what that process gives is checked again.
//!
//! The way of a kernel: [`Unpacking::prepare`] looks into the [`cache`], or has the [`helper`] unpack;
//! [`kernel::placement`] says where the kernel may lie, and [`kernel::prepared::PreparedKernel::load`] puts it there.

#![forbid(unsafe_code)]

mod boot_file;
pub mod cache;
mod confinement;
pub mod disk;
mod error;
pub mod helper;
pub mod kernel;
pub mod modules;
mod preparation;
#[cfg(feature = "testing")]
pub mod testing;

pub use boot_file::BootFile;
pub use error::Error;
pub use preparation::{Origin, Unpacking};
