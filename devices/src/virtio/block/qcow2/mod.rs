//! A disk in a qcow2 image, by the library imago.

mod header;
mod layout;
mod ordered;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use imago::file::File as ImageFile;
use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Storage, StorageOpenOptions};
use parking_lot::RwLock;

pub use self::header::{Backing, Head, HeadError};
use self::layout::Layout;
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

type Access<S> = FormatAccess<Ordered<S>>;

/// A disk in a qcow2 image, which lies in an `S`.
pub struct Qcow2Disk<S: Storage + 'static = ImageFile> {
    /// Discards break what others look up at the same time: they have it alone. So has what needs a new second
    /// table.
    access: RwLock<Access<S>>,
    file: Ordered<S>,
    size: AtomicU64,
    /// Bytes of what lies behind it.
    behind: u64,
    read_only: bool,
    /// Something may have been given up since all was on the medium.
    changed: AtomicBool,
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
        Self::open_in(path, options, &|file| file)
    }
}

impl<S: Storage + 'static> Qcow2Disk<S> {
    /// As [`Qcow2Disk::open`], with `storage` around each file.
    ///
    /// # Errors
    /// [`DiskError`]. The image has not changed then.
    pub fn open_in(
        path: &Path,
        options: Qcow2Options,
        storage: &dyn Fn(ImageFile) -> S,
    ) -> Result<Self, DiskError> {
        let mut chain = Vec::new();
        let Opened { access, file, head, behind } = open_image(path, options, &mut chain, storage)?;
        Ok(Self {
            access: RwLock::new(access),
            file,
            size: head.size.into(),
            behind,
            read_only: options.read_only,
            changed: AtomicBool::new(false),
            _locked: chain,
            has_zeros: head.version >= 3,
        })
    }

    /// Has `change` change these bytes of the disk, piece by piece.
    ///
    /// The library takes room for a new second table that others gave up in tables that are not written yet: then
    /// the old tables would name the new one as data. So those are written first.
    fn change(
        &self,
        range: ByteRange,
        mut change: impl FnMut(&Access<S>, ByteRange) -> io::Result<()>,
    ) -> io::Result<()> {
        for piece in self.file.pieces(range) {
            let access = self.access.read();
            if self.file.has_tables(&piece) {
                let done = change(&access, piece);
                self.changed.store(true, Ordering::Release);
                done?;
            } else {
                drop(access);
                self.change_alone(piece, |access, piece| change(access, piece))?;
            }
        }
        Ok(())
    }

    /// As [`change`](Self::change), with nobody else on the disk.
    fn change_alone(
        &self,
        range: ByteRange,
        mut change: impl FnMut(&mut Access<S>, ByteRange) -> io::Result<()>,
    ) -> io::Result<()> {
        for piece in self.file.pieces(range) {
            let mut access = self.access.write();
            if self.changed.load(Ordering::Acquire) && !self.file.has_tables(&piece) {
                self.file.flush_in_order(|| access.flush())?;
                self.changed.store(false, Ordering::Release);
            }
            let done = change(&mut access, piece);
            self.changed.store(true, Ordering::Release);
            done?;
        }
        Ok(())
    }
}

/// An image that was opened.
struct Opened<S: Storage + 'static> {
    access: Access<S>,
    file: Ordered<S>,
    head: Head,
    /// Bytes of what lies behind it.
    behind: u64,
}

fn open_image<S: Storage + 'static>(
    path: &Path,
    options: Qcow2Options,
    chain: &mut Vec<File>,
    storage: &dyn Fn(ImageFile) -> S,
) -> Result<Opened<S>, DiskError> {
    let Qcow2Options { read_only, cache, backing } = options;
    let image = |source: HeadError| DiskError::Image { path: path.to_owned(), source };
    let failed = |source| DiskError::Open { path: path.to_owned(), source };
    // Through the page cache: the head is no whole block.
    let file = open_file(path, read_only)?;
    let head = Head::read(&file).map_err(image)?;
    if !read_only {
        head.check_counts(&file).map_err(image)?;
    }
    let layout = head.layout(&file).map_err(failed)?;
    let direct = if cache == Cache::Direct { open_direct(path, read_only) } else { None };
    let is_direct = direct.is_some();
    let opened = direct.map_or_else(|| file.try_clone(), Ok).map_err(failed)?;
    remember(file, path, chain)?;
    let behind = match &head.backing {
        None => None,
        Some(_) if !backing => return Err(DiskError::HasBacking { path: path.to_owned() }),
        Some(behind) => Some(open_backing(path, behind, chain, storage)?),
    };
    let size_behind = behind.as_ref().map_or(0, |behind| behind.size());
    let how = StorageOpenOptions::new().filename(path).write(!read_only).direct(is_direct);
    let opened = ImageFile::from_open_file(opened, how).map_err(failed)?;
    let ordered = Ordered::new(storage(opened), layout, !is_direct);
    let qcow2 = Qcow2::<Ordered<S>, Arc<Access<S>>>::builder(ordered.clone())
        .write(!read_only)
        .backing(behind)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())
        .map_err(failed)?;
    Ok(Opened { access: FormatAccess::new(qcow2), file: ordered, head, behind: size_behind })
}

fn open_backing<S: Storage + 'static>(
    above: &Path,
    behind: &Backing,
    chain: &mut Vec<File>,
    storage: &dyn Fn(ImageFile) -> S,
) -> Result<Arc<Access<S>>, DiskError> {
    let path = beside(above, &behind.name);
    let options = Qcow2Options { read_only: true, cache: Cache::Buffered, backing: true };
    if behind.is_qcow2 {
        return open_image(&path, options, chain, storage).map(|opened| Arc::new(opened.access));
    }
    let failed = |source| DiskError::Open { path: path.clone(), source };
    let file = open_file(&path, true)?;
    let opened = file.try_clone().map_err(failed)?;
    remember(file, &path, chain)?;
    let opened =
        ImageFile::from_open_file(opened, StorageOpenOptions::new().filename(&path)).map_err(failed)?;
    let ordered = Ordered::new(storage(opened), Layout::plain(), true);
    let raw = Raw::builder(ordered).open(DenyImplicitOpenGate::default()).map_err(failed)?;
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

impl<S: Storage + 'static> Drop for Qcow2Disk<S> {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::error!("the last of what was written to a disk may be lost: {error}");
        }
    }
}

impl<S: Storage + 'static> Disk for Qcow2Disk<S> {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
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
        let slices = vectors.slices();
        let (vector, _mapped) = IoVector::from_volatile_slice(&slices);
        let mut left = Some(vector);
        self.change(offset..offset.saturating_add(vectors.len() as u64), |access, piece| {
            let Some(vector) = left.take() else { return Ok(()) };
            let (now, later) = vector.split_at(piece.end - piece.start);
            left = Some(later);
            access.writev(now, piece.start)
        })
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
        let discarded = self
            .change_alone(range, |access, piece| access.discard_to_any(piece.start, piece.end - piece.start));
        match discarded {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }

    fn write_zeroes(&self, range: ByteRange, unmap: bool) -> io::Result<()> {
        if !self.has_zeros {
            return self.change(range, |access, piece| {
                write_zeros(piece, |zeros, offset| access.write(zeros, offset))
            });
        }
        // A cluster of which the rest is zeros already becomes one of zeros as a whole. The library looks at the
        // rest first: what somebody writes there meanwhile would be lost.
        self.change_alone(range, |access, piece| {
            let len = piece.end - piece.start;
            if unmap {
                access.discard_to_zero(piece.start, len)
            } else {
                access.write_zeroes(piece.start, len)
            }
        })
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        let is = self.size();
        // The end of what lies behind it would show in what is added.
        let shows = is..size.min(self.behind);
        if !shows.is_empty() && !self.has_zeros {
            return Err(io::Error::other(
                "the image is of version 2 and has a backing file, whose end would show in what is added: convert \
                 the image with `qemu-img convert -O qcow2`",
            ));
        }
        let access = self.access.write();
        // The table of tables moves, and what waits to be written to it with it.
        self.file.flush_in_order(|| access.flush())?;
        access.resize_grow(size, PreallocateMode::None)?;
        drop(access);
        if !shows.is_empty() {
            self.write_zeroes(shows, false)?;
        }
        self.flush()?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
