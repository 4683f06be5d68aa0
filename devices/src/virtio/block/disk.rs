//! What holds the data of a block device, and why it can't be used.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use parking_lot::RawRwLock;
use parking_lot::lock_api::ArcRwLockReadGuard;

use super::qcow2::HeadError;
use crate::virtio::queue::IoVectors;

/// Bytes of a sector, the unit of virtio-blk's addresses whatever the disk's own block is (section 5.2.4).
pub const SECTOR: u64 = 512;

/// Zeros that are written at a time where a disk has no other way to have them.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Has `write` write zeros to all of `range`, piece by piece, each to its place.
///
/// # Errors
/// As `write`; what came before is written.
pub(super) fn write_zeros(
    range: ByteRange,
    mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut offset = range.start;
    while offset < range.end {
        let left = usize::try_from(range.end - offset).unwrap_or(usize::MAX);
        let piece = ZEROS.get(..left.min(ZEROS.len())).unwrap_or_default();
        write(piece, offset)?;
        offset = offset.saturating_add(piece.len() as u64);
    }
    Ok(())
}

/// Bytes that belong to a disk, from the first to the one past the last.
pub type ByteRange = Range<u64>;

/// Keeps others out of a disk's way as long as a request is on its way.
pub type Hold = ArcRwLockReadGuard<RawRwLock, ()>;

/// Where in a disk's [`file`](Disk::file) the host's kernel can do all of one read or write.
pub struct Lane {
    /// The first byte in the file.
    pub offset: u64,
    /// Is let go when the request is over.
    pub hold: Option<Hold>,
}

/// What holds a disk's data. Its methods are called by several threads at once, for ranges within
/// [`size`](Self::size) alone.
pub trait Disk: Send + Sync {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Whether nothing may be written.
    fn is_read_only(&self) -> bool;

    /// The smallest piece, in bytes, that is read and written without a detour: a power of two from 512 on.
    fn block_size(&self) -> u32;

    /// Fills all of `vectors` from `offset` on.
    ///
    /// # Errors
    /// The host's; `UnexpectedEof` where the disk has less than it had.
    fn read(&self, vectors: &mut IoVectors, offset: u64) -> io::Result<()>;

    /// Writes all of `vectors` from `offset` on. Only a [`flush`](Self::flush) makes it last.
    ///
    /// # Errors
    /// The host's.
    fn write(&self, vectors: &mut IoVectors, offset: u64) -> io::Result<()>;

    /// Makes last what was written before this is called.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> io::Result<()>;

    /// The guest does not need what is in `range`. What it reads there afterwards may be anything.
    ///
    /// # Errors
    /// The host's.
    fn discard(&self, range: ByteRange) -> io::Result<()>;

    /// `range` reads as zeros afterwards. With `unmap` its room may go back to the host, without it stays
    /// taken.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&self, range: ByteRange, unmap: bool) -> io::Result<()>;

    /// Makes the disk larger, to `size` bytes, which are whole sectors and no fewer than it has. What is added
    /// reads as zeros, and is there once this returns. One at a time.
    ///
    /// # Errors
    /// The host's; the disk has the size that it had then.
    fn grow(&self, size: u64) -> io::Result<()>;

    /// The file that the host's kernel may read and write by itself for those requests that have a
    /// [`lane`](Self::lane). The same for all of the disk's life.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Where a read or a write is that the kernel can do by itself, as it would by [`read`](Self::read) and
    /// [`write`](Self::write). None where something else has to be done, or waited for.
    fn lane(&self, _vectors: &IoVectors, _offset: u64) -> Option<Lane> {
        None
    }
}

/// Why a disk can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file can't be opened.
    #[error("the disk {} can't be opened: {source}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It may be read and not written.
    #[error(
        "the disk {} can't be written by this user: give it the right to, or let the guest only read it \
         (`,readonly`)", .path.display()
    )]
    NotWritable {
        /// The file.
        path: PathBuf,
    },
    /// A directory, a pipe, a socket.
    #[error("{} is {what}, and no disk: name a file or a block device", .path.display())]
    NoDisk {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A block device that is mounted, or that somebody else has claimed.
    #[error("the block device {} is mounted, or used by somebody else", .path.display())]
    Claimed {
        /// The device.
        path: PathBuf,
    },
    /// No whole number of sectors.
    #[error(
        "the disk {} has {size} bytes, which is no whole number of 512-byte sectors: make it longer \
         (truncate -s %512 {})", .path.display(), .path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length.
        size: u64,
    },
    /// Nothing is in it.
    #[error("the disk {} is empty: give it a size (truncate -s 4G {})", .path.display(), .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Another process has it, and not only to read.
    #[error(
        "the disk {} is used by another process (a VM, qemu-img or qemu-nbd): stop that first, or, where both \
         only read it, say `,readonly`", .path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// A qcow2 image that can't be used.
    #[error("the disk {} can't be used: {source}", .path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        source: HeadError,
    },
    /// An image names another file, and the user did not say that it may.
    #[error(
        "the disk {} shows another file where it has nothing of its own (a backing file), which it names \
         itself: say `,backing=allow` if you trust who made the image", .path.display()
    )]
    HasBacking {
        /// The image.
        path: PathBuf,
    },
    /// Images that name each other.
    #[error("the image {} lies behind itself", .path.display())]
    BackingLoop {
        /// One of them.
        path: PathBuf,
    },
    /// Too many images behind each other.
    #[error(
        "behind the image {} lie more than {most} others: make one of some with `qemu-img convert`",
        .path.display()
    )]
    BackingDepth {
        /// The last that was looked at.
        path: PathBuf,
        /// As many are allowed.
        most: usize,
    },
    /// Its name says raw, and its contents qcow2. Which of both the guest may have written.
    #[error(
        "the disk {} begins like a qcow2 image, and its name does not end in .qcow2: say what it is, \
         `,format=qcow2` or `,format=raw`. A guest can write such a beginning into a raw disk itself, so it is \
         never guessed", .path.display()
    )]
    LooksLikeQcow2 {
        /// The file.
        path: PathBuf,
    },
}
