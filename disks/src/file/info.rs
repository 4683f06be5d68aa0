//! What a disk's file says of itself.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use api::units::Bytes;
use devices::virtio::block::disk::DiskError;
use devices::virtio::block::qcow2::Head;
use devices::virtio::block::raw::{open_locked, open_to_read};
use serde::Serialize;

use super::{FileError, Format, io_of};

/// What lies behind an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Backing {
    /// As the image names it, from its own directory.
    pub path: PathBuf,
    /// Its format, as the image says.
    pub format: Format,
}

/// A disk's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Info {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of the disk in it.
    pub size: Bytes,
    /// Bytes that the file takes on the host.
    pub allocated: Bytes,
    /// The version of a qcow2 image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// What shows where it has nothing of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<Backing>,
    /// Somebody may write it now: a VM, or one of QEMU's tools.
    pub in_use: bool,
}

impl Info {
    /// Looks at a file, which may be in use.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn of(path: &Path, format: Format) -> Result<Self, FileError> {
        let failed = io_of(path);
        let mut file = open_to_read(path)?;
        let metadata = file.metadata().map_err(&failed)?;
        let in_use = match open_locked(path, true) {
            Ok(_) => false,
            Err(DiskError::Locked { .. }) => true,
            Err(error) => return Err(error.into()),
        };
        let head = match format {
            Format::Raw => None,
            Format::Qcow2 => {
                let read = Head::read(&file);
                Some(read.map_err(|source| FileError::Head { path: path.to_owned(), source })?)
            }
        };
        let size = match &head {
            Some(head) => Bytes(head.size),
            None => length(&mut file).map_err(&failed)?,
        };
        let version = head.as_ref().map(|head| head.version);
        let backing = head.and_then(|head| head.backing).map(|behind| Backing {
            path: behind.name.into(),
            format: if behind.is_qcow2 { Format::Qcow2 } else { Format::Raw },
        });
        let is_device = metadata.file_type().is_block_device();
        let allocated = if is_device { size } else { Bytes(metadata.blocks().saturating_mul(512)) };
        Ok(Self { path: path.to_owned(), format, size, allocated, version, backing, in_use })
    }
}

/// Bytes in a file or a block device.
fn length(file: &mut File) -> std::io::Result<Bytes> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::End(0)).map(Bytes)
}
