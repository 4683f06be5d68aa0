//! A disk in a qcow2 image, by the library imago.

mod header;
mod ordered;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::file::File as Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};
use parking_lot::RwLock;

pub use self::header::{Backing, Head, HeadError};
use self::ordered::Ordered;
use super::disk::{ByteRange, Disk, DiskError, SECTOR, write_zeros};
use super::raw::{Cache, open_direct, open_file};
use crate::virtio::queue::IoVectors;

/// Images behind each other at most.
const MOST_BACKING: usize = 8;

/// How an image is to be opened.
#[derive(Clone, Copy, Debug)]
pub struct Qcow2Options {
    /// The guest may not write.
    pub read_only: bool,
    /// Whether the host caches it. What lies behind it is cached always: others read the same.
    pub cache: Cache,
    /// The image may name other files that show through where it has nothing.
    pub backing: bool,
}

type Access = FormatAccess<Ordered>;

/// A disk in a qcow2 image.
pub struct Qcow2Disk {
    /// Discards break what others look up at the same time: they have it alone.
    access: RwLock<Access>,
    file: Ordered,
    size: u64,
    read_only: bool,
    /// Whose locks last as long as this value.
    _locked: Vec<File>,
    /// Version 2 has no way to say that a cluster is zeros.
    has_zeros: bool,
}

impl Qcow2Disk {
    /// Opens and locks an image, and those behind it.
    ///
    /// # Errors
    /// [`DiskError`]. The image has not changed then.
    pub fn open(path: &Path, options: Qcow2Options) -> Result<Self, DiskError> {
        let mut chain = Vec::new();
        let (access, file, head) = open_image(path, options, &mut chain)?;
        Ok(Self {
            access: RwLock::new(access),
            file,
            size: head.size,
            read_only: options.read_only,
            _locked: chain,
            has_zeros: head.version >= 3,
        })
    }
}

fn open_image(
    path: &Path,
    options: Qcow2Options,
    chain: &mut Vec<File>,
) -> Result<(Access, Ordered, Head), DiskError> {
    let Qcow2Options { read_only, cache, backing } = options;
    let image = |source: HeadError| DiskError::Image { path: path.to_owned(), source };
    let failed = |source| DiskError::Open { path: path.to_owned(), source };
    // Through the page cache: the head is no whole block.
    let file = open_file(path, read_only)?;
    let head = Head::read(&file).map_err(image)?;
    let direct = if cache == Cache::Direct { open_direct(path, read_only) } else { None };
    let is_direct = direct.is_some();
    let storage = direct.map_or_else(|| file.try_clone(), Ok).map_err(failed)?;
    remember(file, path, chain)?;
    let behind = match &head.backing {
        None => None,
        Some(_) if !backing => return Err(DiskError::HasBacking { path: path.to_owned() }),
        Some(behind) => Some(open_backing(path, behind, chain)?),
    };
    let opened = StorageOpenOptions::new().filename(path).write(!read_only).direct(is_direct);
    let storage = Storage::from_open_file(storage, opened).map_err(failed)?;
    let storage = Ordered::new(storage, head.table.clone());
    let qcow2 = Qcow2::<Ordered, Arc<Access>>::builder(storage.clone())
        .write(!read_only)
        .backing(behind)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())
        .map_err(failed)?;
    Ok((FormatAccess::new(qcow2), storage, head))
}

fn open_backing(above: &Path, behind: &Backing, chain: &mut Vec<File>) -> Result<Arc<Access>, DiskError> {
    let path = beside(above, &behind.name);
    let options = Qcow2Options { read_only: true, cache: Cache::Buffered, backing: true };
    if behind.is_qcow2 {
        return open_image(&path, options, chain).map(|(access, ..)| Arc::new(access));
    }
    let failed = |source| DiskError::Open { path: path.clone(), source };
    let file = open_file(&path, true)?;
    let storage = file.try_clone().map_err(failed)?;
    remember(file, &path, chain)?;
    let storage =
        Storage::from_open_file(storage, StorageOpenOptions::new().filename(&path)).map_err(failed)?;
    let raw =
        Raw::builder(Ordered::new(storage, 0..0)).open(DenyImplicitOpenGate::default()).map_err(failed)?;
    Ok(Arc::new(FormatAccess::new(raw)))
}

/// Where a name leads from the directory of the image that says it.
fn beside(above: &Path, name: &str) -> PathBuf {
    above.parent().unwrap_or(Path::new("")).join(name)
}

/// Adds a file to those that lie over each other.
fn remember(file: File, path: &Path, chain: &mut Vec<File>) -> Result<(), DiskError> {
    let identity = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
    let failed = |source| DiskError::Open { path: path.to_owned(), source };
    let new = identity(&file).map_err(failed)?;
    for other in chain.iter() {
        if identity(other).map_err(failed)? == new {
            return Err(DiskError::BackingLoop { path: path.to_owned() });
        }
    }
    if chain.len() > MOST_BACKING {
        return Err(DiskError::BackingDepth { path: path.to_owned(), most: MOST_BACKING });
    }
    chain.push(file);
    Ok(())
}

impl Drop for Qcow2Disk {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::error!("the last of what was written to a disk may be lost: {error}");
        }
    }
}

impl Disk for Qcow2Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn block_size(&self) -> u32 {
        SECTOR as u32
    }

    fn read(&self, vectors: &mut IoVectors, offset: u64) -> io::Result<()> {
        let access = self.access.read();
        let slices = vectors.slices();
        let (vector, _mapped) = IoVectorMut::from_volatile_slice(&slices);
        access.readv(vector, offset)
    }

    fn write(&self, vectors: &mut IoVectors, offset: u64) -> io::Result<()> {
        let access = self.access.read();
        let slices = vectors.slices();
        let (vector, _mapped) = IoVector::from_volatile_slice(&slices);
        access.writev(vector, offset)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let access = self.access.read();
        self.file.flush_in_order(|| access.flush())
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        if !self.has_zeros {
            // A hint that this version has no way to follow.
            return Ok(());
        }
        let len = range.end.saturating_sub(range.start);
        match self.access.write().discard_to_any(range.start, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }

    fn write_zeroes(&self, range: ByteRange, unmap: bool) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        if unmap && self.has_zeros {
            return self.access.write().discard_to_zero(range.start, len);
        }
        let access = self.access.read();
        if self.has_zeros {
            return access.write_zeroes(range.start, len);
        }
        write_zeros(range, |zeros, offset| access.write(zeros, offset))
    }
}
