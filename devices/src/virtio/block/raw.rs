//! A disk whose bytes are those of a file or a block device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use serde::{Deserialize, Serialize};

use super::barrier::Barrier;
use super::disk::{ByteRange, Disk, DiskError, Lane, SECTOR, write_zeros};
use super::lock;
use crate::virtio::queue::IoVectors;

/// How long a disk may still be locked by a process that has ended, where its host's storage does what it should.
const LEFT_BEHIND: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What a qcow2 image begins with.
const QCOW2: [u8; 4] = *b"QFI\xfb";

/// Whether the host keeps a disk's contents in its page cache too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// No (`O_DIRECT`): the guest's cache is the only one.
    Direct,
    /// Yes: guests that read the same file share it, and the host has memory of it that no VM is charged for.
    Buffered,
}

/// How a file is to be opened.
#[derive(Clone, Copy, Debug)]
pub struct RawOptions {
    /// The guest may not write.
    pub read_only: bool,
    /// Whether the host caches it.
    pub cache: Cache,
    /// The user has said that it is raw: then it may begin as it likes.
    pub stated: bool,
}

/// A file or block device.
pub struct RawDisk {
    file: File,
    direct: Option<Direct>,
    size: AtomicU64,
    read_only: bool,
    barrier: Barrier,
}

/// The same, past the host's page cache.
struct Direct {
    file: File,
    /// What places in the file and in memory must be multiples of, in bytes.
    alignment: u32,
    /// Requests that are aligned share it. Others go through the page cache in whole pages, in which a
    /// neighbour's write by the other way would be lost: they have it alone.
    aligned: Arc<RwLock<()>>,
}

impl RawDisk {
    /// Opens and locks a disk.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(path: &Path, options: RawOptions) -> Result<Self, DiskError> {
        let RawOptions { read_only, cache, stated } = options;
        let failed = |source| DiskError::Open { path: path.to_owned(), source };
        let mut file = open_left(path, read_only)?;
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        match size {
            0 => return Err(DiskError::Empty { path: path.to_owned() }),
            _ if size % SECTOR != 0 => return Err(DiskError::Size { path: path.to_owned(), size }),
            _ => {}
        }
        if !stated && begins_like_qcow2(&file).map_err(failed)? {
            return Err(DiskError::LooksLikeQcow2 { path: path.to_owned() });
        }
        let direct = match cache {
            Cache::Direct => Direct::open(path, read_only),
            Cache::Buffered => None,
        };
        if cache == Cache::Direct && direct.is_none() {
            tracing::warn!(
                "the disk {} goes through the host's page cache: its file system has no O_DIRECT",
                path.display()
            );
        }
        let barrier = Barrier::new(direct.is_none());
        Ok(Self { file, direct, size: size.into(), read_only, barrier })
    }

    /// A disk that may only be read, of a file that this process made and nobody else has: it is not locked.
    ///
    /// # Errors
    /// The host can't tell its length.
    pub fn sealed(file: File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        Ok(Self { file, direct: None, size: size.into(), read_only: true, barrier: Barrier::new(true) })
    }

    /// The descriptor that fits a request, with nobody in its way.
    fn way(&self, vectors: &IoVectors, offset: u64) -> Way<'_> {
        match &self.direct {
            None => Way { file: &self.file, guard: Guard::None },
            Some(direct) if direct.is_aligned(vectors, offset) => {
                Way { file: &direct.file, guard: Guard::Shared(direct.aligned.read()) }
            }
            Some(direct) => Way { file: &self.file, guard: Guard::Alone(direct.aligned.write()) },
        }
    }

    fn fallocate(&self, mode: libc::c_int, range: &ByteRange) -> io::Result<()> {
        let number =
            |value: u64| i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
        let (start, len) = (number(range.start)?, number(range.end.saturating_sub(range.start))?);
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        loop {
            // SAFETY: numbers alone, on a descriptor of our own.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, start, len) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// A descriptor for one request.
struct Way<'a> {
    file: &'a File,
    guard: Guard<'a>,
}

/// What keeps others out as long as a request is on its way.
enum Guard<'a> {
    None,
    Shared(#[expect(dead_code, reason = "held")] RwLockReadGuard<'a, ()>),
    Alone(#[expect(dead_code, reason = "held")] RwLockWriteGuard<'a, ()>),
}

impl Direct {
    /// None where the file system has no such way.
    fn open(path: &Path, read_only: bool) -> Option<Self> {
        let file = open_direct(path, read_only)?;
        let alignment = ALIGNMENTS.into_iter().find(|&alignment| can_read(&file, alignment))?;
        // Of a process that is killed, the kernel may still have writes to it: nobody else comes before their end.
        lock::hold(&file, read_only).ok()?;
        Some(Self { file, alignment, aligned: Arc::default() })
    }

    fn is_aligned(&self, vectors: &IoVectors, offset: u64) -> bool {
        let mask = self.alignment.saturating_sub(1);
        let whole = |vector: &libc::iovec| (vector.iov_base.addr() | vector.iov_len) & mask as usize == 0;
        offset & u64::from(mask) == 0 && vectors.as_slice().iter().all(whole)
    }
}

/// What alignments disks have, in bytes.
const ALIGNMENTS: [u32; 2] = [512, 4096];

/// Whether a read that is aligned so, and no better, comes through.
fn can_read(file: &File, alignment: u32) -> bool {
    let alignment = alignment as usize;
    // Of 4 KiB and more somewhere in it, so that a place can be had that is aligned so, and no better.
    let mut room = vec![0u8; 4 * 4096];
    let best = room.as_ptr().align_offset(4096);
    let Some(place) = room.get_mut(best + alignment % 4096..).and_then(|rest| rest.get_mut(..alignment))
    else {
        return false;
    };
    file.read_at(place, 0).is_ok()
}

/// Opens the file of a disk past the page cache, where its file system has such a way. The disk is locked
/// already.
pub(super) fn open_direct(path: &Path, read_only: bool) -> Option<File> {
    open(path, read_only, libc::O_DIRECT).ok()
}

/// Opens the file of a disk and locks it, as a VM does; the locks go with the file. Others may read it meanwhile, and
/// nobody may write it but who opens it here.
///
/// # Errors
/// [`DiskError`]: [`DiskError::Locked`] where somebody else uses it.
pub fn open_locked(path: &Path, read_only: bool) -> Result<File, DiskError> {
    open_file(path, read_only)
}

/// Opens the file of a disk to look at it, whoever uses it.
///
/// # Errors
/// [`DiskError`].
pub fn open_to_read(path: &Path) -> Result<File, DiskError> {
    let file = open(path, true, libc::O_NONBLOCK)?;
    check_kind(path, &file)?;
    Ok(file)
}

/// Opens and locks the file of a disk, which a process may have left just now: the kernel does its last requests
/// (io_uring) and lets go of the file shortly after its end.
fn open_left(path: &Path, read_only: bool) -> Result<File, DiskError> {
    let until = Instant::now() + LEFT_BEHIND;
    loop {
        match open_file(path, read_only) {
            Err(DiskError::Locked { .. }) if Instant::now() < until => thread::sleep(LOOK_AGAIN),
            opened => return opened,
        }
    }
}

/// Opens and locks the file of a disk.
pub(super) fn open_file(path: &Path, read_only: bool) -> Result<File, DiskError> {
    let failed = |source| DiskError::Open { path: path.to_owned(), source };
    // A pipe would keep its opener waiting.
    let mut file = open(path, read_only, libc::O_NONBLOCK)?;
    check_kind(path, &file)?;
    if file.metadata().map_err(failed)?.file_type().is_block_device() && !read_only {
        file = open(path, read_only, libc::O_NONBLOCK | libc::O_EXCL)?;
    }
    if !lock::lock(&file, read_only).map_err(failed)? {
        return Err(DiskError::Locked { path: path.to_owned() });
    }
    Ok(file)
}

/// Whether it can be a disk at all.
fn check_kind(path: &Path, file: &File) -> Result<(), DiskError> {
    let metadata = file.metadata().map_err(|source| DiskError::Open { path: path.to_owned(), source })?;
    let kind = metadata.file_type();
    let what = if kind.is_fifo() {
        "a pipe"
    } else if kind.is_dir() {
        "a directory"
    } else if !kind.is_file() && !kind.is_block_device() {
        "a device that has no blocks"
    } else {
        return Ok(());
    };
    Err(DiskError::NoDisk { path: path.to_owned(), what })
}

fn open(path: &Path, read_only: bool, flags: libc::c_int) -> Result<File, DiskError> {
    let opened = OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path);
    opened.map_err(|source| {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::EISDIR) => DiskError::NoDisk { path, what: "a directory" },
            Some(libc::EBUSY) => DiskError::Claimed { path },
            Some(libc::EACCES | libc::EROFS | libc::EPERM) if !read_only => DiskError::NotWritable { path },
            _ => DiskError::Open { path, source },
        }
    })
}

fn begins_like_qcow2(file: &File) -> io::Result<bool> {
    let mut start = [0; QCOW2.len()];
    match file.read_exact_at(&mut start, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| start == QCOW2),
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn block_size(&self) -> u32 {
        self.direct.as_ref().map_or(SECTOR as u32, |direct| direct.alignment)
    }

    fn read(&self, vectors: &mut IoVectors, offset: u64) -> io::Result<()> {
        let way = self.way(vectors, offset);
        let wanted = vectors.len();
        let read = vectors.fill_from(way.file.as_fd(), offset)?;
        if read < wanted { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn write(&self, vectors: &mut IoVectors, offset: u64) -> io::Result<()> {
        let way = self.way(vectors, offset);
        if let Guard::Alone(_) = way.guard {
            self.barrier.note_cached();
        }
        let wanted = vectors.len();
        let written = vectors.write_to(way.file.as_fd(), offset)?;
        if written < wanted { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.barrier.run(|| self.file.sync_data()) }
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        match self.fallocate(libc::FALLOC_FL_PUNCH_HOLE, &range) {
            // It is a hint.
            Err(error) if is_unsupported(&error) => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, range: ByteRange, unmap: bool) -> io::Result<()> {
        let modes: &[libc::c_int] = if unmap {
            &[libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE]
        } else {
            &[libc::FALLOC_FL_ZERO_RANGE]
        };
        for &mode in modes {
            match self.fallocate(mode, &range) {
                Err(error) if is_unsupported(&error) => {}
                result => return result,
            }
        }
        // Zeros that go through the page cache.
        let _alone = self.direct.as_ref().map(|direct| direct.aligned.write());
        self.barrier.note_cached();
        write_zeros(range, |zeros, offset| self.file.write_all_at(zeros, offset))
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        let there = (&self.file).seek(SeekFrom::End(0))?;
        if there < size {
            // A block device refuses.
            self.file.set_len(size).map_err(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => io::Error::other(format!(
                    "the block device has {there} bytes: make it larger on the host first"
                )),
                _ => error,
            })?;
            self.file.sync_all()?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.direct.as_ref().map_or(&self.file, |direct| &direct.file).as_fd())
    }

    fn lane(&self, vectors: &IoVectors, offset: u64) -> Option<Lane> {
        let hold = match &self.direct {
            None => None,
            // Not aligned, or behind one that is not and waits for those before it: a thread can wait too.
            Some(direct) => {
                let aligned = Some(&direct.aligned).filter(|_| direct.is_aligned(vectors, offset))?;
                Some(aligned.try_read_arc()?)
            }
        };
        Some(Lane { offset, hold })
    }
}
