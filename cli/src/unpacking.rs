//! How kernels are unpacked, as the command line says.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

use image::disk::Finder;
use image::helper::Helper;
use image::{Unpacking, cache};

/// Where unpacked kernels are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelCache {
    /// Nowhere.
    Off,
    /// In this directory.
    In(PathBuf),
}

impl FromStr for KernelCache {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == "off" { Self::Off } else { Self::In(text.into()) })
    }
}

/// This program looks for kernels on disks.
pub fn finder() -> Finder {
    Finder { helper: Helper::own("read-disk") }
}

/// This program unpacks them, and they are kept in the user's cache where nothing else is said.
pub fn unpacking(cache: Option<&KernelCache>) -> Unpacking {
    let cache = match cache {
        Some(KernelCache::Off) => None,
        Some(KernelCache::In(directory)) => Some(directory.clone()),
        None => cache::default_directory(),
    };
    Unpacking { helper: Helper::own("unpack-kernel"), cache }
}
