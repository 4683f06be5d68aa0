//! A file whose writes come in an order that no kill and no power cut turns into damage.
//!
//! The library writes from its caches whenever it needs room, not only when it is flushed, and in an order that
//! holds as long as the host lives: what a table names is written before the table. A power cut knows no
//! such order. So what names others has a barrier on both sides here:
//!
//! - A second table (L2) is written when the data and the counts that it rests on are on the medium, and nothing
//!   is written to room that a table gave up before that table is there.
//! - The head and the table of counts are on the medium before anything else is written.
//! - Entries of the first table (L1), which the library writes at once, wait for a flush that writes the counts
//!   and the second tables. What waits is no loss: nothing that was flushed needs it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::io_buffers::{IoBuffer, IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};
use parking_lot::{Mutex, RwLock};

use super::layout::{ENTRY, HEAD, Layout, Part};
use crate::virtio::block::barrier::Barrier;

/// The file of an image, for the library and for whoever flushes it.
#[derive(Debug)]
pub struct Ordered<S>(Arc<Inner<S>>);

#[derive(Debug)]
struct Inner<S> {
    file: S,
    helper: CommonStorageHelper,
    layout: RwLock<Layout>,
    /// Entries of the first table that wait, by their place in the file.
    waiting: Mutex<BTreeMap<u64, [u8; ENTRY]>>,
    /// Data or counts were written since all was on the medium.
    plain_unsynced: AtomicBool,
    /// The same of what names others.
    naming_unsynced: AtomicBool,
    /// Held while all is put on the medium: nobody takes for there what is on its way.
    barrier: Mutex<Barrier>,
    /// One flush at a time: the library's caches count as written while they are being written.
    flushing: Mutex<()>,
}

impl<S> Clone for Ordered<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: fmt::Display> fmt::Display for Ordered<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.file.fmt(f)
    }
}

impl<S: Storage> Ordered<S> {
    /// A file with parts as `layout` has them. `cached` where it goes through the host's page cache.
    pub fn new(file: S, layout: Layout, cached: bool) -> Self {
        Self(Arc::new(Inner {
            file,
            helper: CommonStorageHelper::default(),
            layout: RwLock::new(layout),
            waiting: Mutex::default(),
            plain_unsynced: AtomicBool::new(false),
            naming_unsynced: AtomicBool::new(false),
            barrier: Mutex::new(Barrier::new(cached)),
            flushing: Mutex::default(),
        }))
    }

    /// Whether a change of these bytes of the disk needs no new second table.
    pub fn has_tables(&self, disk: &Range<u64>) -> bool {
        self.0.layout.read().has_tables(disk)
    }

    /// These bytes of the disk, in pieces that one second table each is for.
    pub fn pieces(&self, disk: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<S> {
        self.0.layout.read().pieces(disk)
    }

    /// Makes all last that was written before. `write_tables` has the library write its counts and second
    /// tables.
    ///
    /// # Errors
    /// The host's. What waits goes on waiting then.
    pub fn flush_in_order(&self, write_tables: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let inner = &*self.0;
        let _alone = inner.flushing.lock();
        // Entries that come later may name tables whose counts are not written by this flush.
        let entries: Vec<_> = inner.waiting.lock().iter().map(|(place, entry)| (*place, *entry)).collect();
        write_tables()?;
        inner.sync()?;
        if entries.is_empty() {
            return Ok(());
        }
        for (place, entry) in &entries {
            inner.naming_unsynced.store(true, Ordering::Release);
            let end = place.saturating_add(ENTRY as u64);
            // Whatever else is in these blocks is not written meanwhile.
            let _alone = self.strong_write_blocker(inner.blocks(*place..end));
            inner.write_blocks(entry, *place)?;
        }
        inner.naming_unsynced.store(true, Ordering::Release);
        inner.sync()?;
        let mut waiting = inner.waiting.lock();
        // One that has changed since goes on waiting.
        for (place, entry) in &entries {
            if waiting.get(place) == Some(entry) {
                waiting.remove(place);
            }
        }
        Ok(())
    }
}

impl<S: Storage> Inner<S> {
    /// Puts on the medium all that was written before.
    fn sync(&self) -> io::Result<()> {
        let barrier = self.barrier.lock();
        let plain = self.plain_unsynced.swap(false, Ordering::AcqRel);
        let naming = self.naming_unsynced.swap(false, Ordering::AcqRel);
        if !plain && !naming {
            return Ok(());
        }
        barrier.run(|| self.file.sync()).inspect_err(|_| {
            self.plain_unsynced.fetch_or(plain, Ordering::AcqRel);
            self.naming_unsynced.fetch_or(naming, Ordering::AcqRel);
        })
    }

    /// Has `write` write to `len` bytes from `offset` on, after what must be on the medium before.
    fn change(&self, offset: u64, len: u64, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let part = self.layout.read().part(offset, len);
        let must_sync = match part {
            Part::Plain => self.naming_unsynced.load(Ordering::Acquire),
            Part::Table => self.plain_unsynced.load(Ordering::Acquire),
            Part::Mixed => {
                self.plain_unsynced.load(Ordering::Acquire) || self.naming_unsynced.load(Ordering::Acquire)
            }
            Part::Root => true,
        };
        if must_sync {
            self.sync()?;
        }
        let written = write();
        // Only now: a barrier that began meanwhile may not hold it. It may be there in part if it failed.
        if part != Part::Table {
            self.plain_unsynced.store(true, Ordering::Release);
        }
        if part != Part::Plain {
            self.naming_unsynced.store(true, Ordering::Release);
        }
        written?;
        if part == Part::Root {
            self.sync()?;
            self.learn_head()?;
        }
        Ok(())
    }

    /// The blocks of the file, of which some are written as a whole or not at all, with these bytes in them.
    fn blocks(&self, bytes: Range<u64>) -> Range<u64> {
        let mask = (self.file.req_align() as u64).saturating_sub(1);
        bytes.start & !mask..bytes.end.saturating_add(mask) & !mask
    }

    /// Writes these bytes, and with them the rest of their blocks as it is. The caller keeps others from writing to
    /// the blocks.
    ///
    /// The library's own way takes as much of the file as memory is aligned to, a page: what others write to the
    /// blocks behind would be lost.
    fn write_blocks(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let blocks = self.blocks(offset..offset.saturating_add(bytes.len() as u64));
        let size = |len: u64| usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
        let mut buffer =
            IoBuffer::new(size(blocks.end.saturating_sub(blocks.start))?, self.file.mem_align())?;
        // SAFETY: the buffer is aligned, and so are the offset and the length, which is less at the file's end
        // alone; nobody writes there meanwhile, as the caller says.
        unsafe { self.file.pure_readv(buffer.as_mut().into(), blocks.start)? };
        let start = size(offset.saturating_sub(blocks.start))?;
        let place = buffer.as_mut().into_slice().get_mut(start..start.saturating_add(bytes.len()));
        place.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?.copy_from_slice(bytes);
        // SAFETY: as above.
        unsafe { self.file.pure_writev(buffer.as_ref().into(), blocks.start) }
    }

    fn learn_head(&self) -> io::Result<()> {
        let mut head = [0; HEAD];
        self.file.read(&mut head[..], 0)?;
        if self.layout.write().learn_head(&head) {
            // What waits is in the new table, which the library has written as a whole.
            self.waiting.lock().clear();
        }
        Ok(())
    }
}

/// The bytes of `part` out of bytes that begin at `offset`.
fn of(bytes: &[u8], offset: u64, part: Range<u64>) -> &[u8] {
    let place = |at: u64| usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
    bytes.get(place(part.start)..place(part.end)).unwrap_or_default()
}

impl<S: Storage> Storage for Ordered<S> {
    fn mem_align(&self) -> usize {
        self.0.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.0.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.0.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.0.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.0.file.size()
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.0.file.get_filename()
    }

    unsafe fn pure_readv(&self, mut vector: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let inner = &*self.0;
        let part = inner.layout.read().in_table(offset, vector.len());
        let waiting = inner.waiting.lock();
        let Some(part) = part.filter(|_| !waiting.is_empty()) else {
            drop(waiting);
            // SAFETY: as the caller promises.
            return unsafe { inner.file.pure_readv(vector, offset) };
        };
        let mut bytes = vec![0; usize::try_from(vector.len()).unwrap_or(0)];
        inner.file.read(&mut bytes[..], offset)?;
        for (place, entry) in waiting.range(part) {
            let at = usize::try_from(place - offset).unwrap_or(usize::MAX);
            if let Some(there) = bytes.get_mut(at..at.saturating_add(ENTRY)) {
                there.copy_from_slice(entry);
            }
        }
        vector.copy_from_slice(&bytes);
        Ok(())
    }

    unsafe fn pure_writev(&self, vector: IoVector<'_>, offset: u64) -> io::Result<()> {
        let inner = &*self.0;
        let end = offset.saturating_add(vector.len());
        let Some(part) = inner.layout.read().in_table(offset, vector.len()) else {
            return inner.change(offset, vector.len(), || {
                // SAFETY: as the caller promises.
                unsafe { inner.file.pure_writev(vector, offset) }
            });
        };
        let mut bytes = vec![0; usize::try_from(vector.len()).unwrap_or(0)];
        vector.copy_into_slice(&mut bytes);
        let (entries, _) = of(&bytes, offset, part.clone()).as_chunks::<ENTRY>();
        let (mut layout, mut waiting) = (inner.layout.write(), inner.waiting.lock());
        for (place, entry) in (part.start..).step_by(ENTRY).zip(entries) {
            layout.learn_entry(place, entry);
            waiting.insert(place, *entry);
        }
        drop((layout, waiting));
        for rest in [offset..part.start, part.end..end] {
            let bytes = of(&bytes, offset, rest.clone());
            if !bytes.is_empty() {
                inner.change(rest.start, bytes.len() as u64, || inner.write_blocks(bytes, rest.start))?;
            }
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as the caller promises.
        self.0.change(offset, length, || unsafe { self.0.file.pure_write_zeroes(offset, length) })
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as the caller promises.
        self.0.change(offset, length, || unsafe { self.0.file.pure_write_allocated_zeroes(offset, length) })
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as the caller promises.
        self.0.change(offset, length, || unsafe { self.0.file.pure_discard(offset, length) })
    }

    fn flush(&self) -> io::Result<()> {
        self.0.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.0.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }

    fn resize(&self, new_size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.0.file.resize(new_size, mode)
    }
}
