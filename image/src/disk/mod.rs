//! A disk's own kernel: what a guest's disk says that it is to be booted with.
//!
//! A guest wrote every byte of it. So a process of its own ([`helper`]) reads the partition table ([`partitions`]), the
//! file systems ([`ext4`], [`fat`]) and the files that tell ([`search`]), and gets the disk's bytes, and nothing else, from the
//! process that opened the disk ([`reader`]).

mod error;
pub mod ext4;
pub mod fat;
mod fields;
pub mod files;
pub mod helper;
pub mod partitions;
mod protocol;
pub mod reader;
pub mod search;
pub mod signature;
pub mod source;

pub use error::SearchError;
pub use reader::{Finder, Found};
