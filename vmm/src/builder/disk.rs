//! Opens disks.

use std::sync::Arc;

use devices::virtio::block::Block;
use devices::virtio::block::raw::{RawDisk, RawOptions};

use super::{BuildError, refused};
use crate::config::{Cpus, DeviceId, DiskFormat, DiskOptions};

/// Queues at most: what disks gain by more is little, and each has memory of its own in the guest.
const MOST_QUEUES: u8 = 4;

/// The disk of `options` as a device, with a queue for each vCPU as far as that helps.
pub fn open(id: &DeviceId, options: &DiskOptions, cpus: Cpus) -> Result<Block, BuildError> {
    let raw = RawOptions {
        read_only: options.readonly,
        cache: options.cache(),
        stated: options.format == Some(DiskFormat::Raw),
    };
    let disk = RawDisk::open(&options.path, raw)?;
    let queues = u16::from(cpus.get().min(MOST_QUEUES));
    Block::new(Arc::new(disk), id.as_str(), queues).map_err(refused("a disk"))
}
