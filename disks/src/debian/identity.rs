//! The identifiers of an image, out of what is installed in it.

use std::fs;
use std::path::Path;

use api::units::Bytes;
use gpt::partition_types::LINUX_ROOT_X64;
use uuid::Uuid;

use super::{BuildError, host};

/// Identifiers that are the same for the same packages.
pub struct Identity {
    /// Installed packages.
    pub packages: usize,
    /// The disk's, in its table of partitions.
    pub disk: Uuid,
    /// The root partition's.
    pub partition: Uuid,
    /// The root file system's.
    pub root: Uuid,
    /// What the file system spreads the names of a directory by.
    pub spread: Uuid,
}

impl Identity {
    /// Those of the packages installed below `root`, on a disk of `size`.
    ///
    /// # Errors
    /// Nothing is installed there.
    pub fn of(root: &Path, size: Bytes) -> Result<Self, BuildError> {
        let path = root.join("var/lib/dpkg/status");
        let status =
            fs::read_to_string(&path).map_err(host("what was installed can't be read".to_owned()))?;
        let hash = |what: &str| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(what.as_bytes()).update(&size.0.to_le_bytes()).update(status.as_bytes());
            let mut bytes = [0; 16];
            hasher.finalize_xof().fill(&mut bytes);
            // Version 8: whose bits are defined by who makes it (RFC 9562, section 5.8).
            uuid::Builder::from_custom_bytes(bytes).into_uuid()
        };
        Ok(Self {
            packages: status.lines().filter(|line| line.starts_with("Package: ")).count(),
            disk: hash("disk"),
            partition: hash(LINUX_ROOT_X64.guid.to_string().as_str()),
            root: hash("root"),
            spread: hash("spread"),
        })
    }
}
