//! Opens disks.

use std::sync::Arc;

use devices::virtio::block::Block;
use devices::virtio::block::disk::{Disk, DiskError};
use devices::virtio::block::qcow2::{Qcow2Disk, Qcow2Options};
use devices::virtio::block::raw::{RawDisk, RawOptions};
use disks::seed::Seed;

use super::{BuildError, refused};
use crate::config::{Cpus, DeviceId, DiskFormat, DiskOptions};

/// Queues at most: what disks gain by more is little, and each has memory of its own in the guest.
const MOST_QUEUES: u8 = 4;

/// The disk of `options` as a device, with a queue for each vCPU as far as that helps.
pub fn open(id: &DeviceId, options: &DiskOptions, cpus: Cpus) -> Result<Block, BuildError> {
    let queues = u16::from(cpus.get().min(MOST_QUEUES));
    let block = Block::new(open_disk(options)?, id.as_str(), queues).map_err(refused("a disk"))?;
    Ok(block.limited(options.limits()).map_err(refused("a timer"))?.on_error(options.on_error()))
}

/// What holds the data of the disk of `options`.
///
/// # Errors
/// [`DiskError`].
pub fn open_disk(options: &DiskOptions) -> Result<Arc<dyn Disk>, DiskError> {
    let (path, read_only, cache) = (&options.path, options.readonly, options.cache());
    Ok(match options.format() {
        DiskFormat::Raw => {
            let stated = options.format == Some(DiskFormat::Raw);
            Arc::new(RawDisk::open(path, RawOptions { read_only, cache, stated })?)
        }
        DiskFormat::Qcow2 => {
            Arc::new(Qcow2Disk::open(path, Qcow2Options { read_only, cache, backing: options.backing })?)
        }
    })
}

/// The disk of a seed for cloud-init, which is in memory and can't be written.
pub fn seed(id: &DeviceId, seed: &Seed) -> Result<Block, BuildError> {
    let disk = seed.disk().and_then(RawDisk::sealed).map_err(refused("a seed for cloud-init"))?;
    // It is read once, from memory.
    Ok(Block::new(Arc::new(disk), id.as_str(), 1).map_err(refused("a disk"))?.on_threads())
}
