//! A file whose writes come in an order that no kill and no power cut turns into damage.
//!
//! imago writes the entry of the first table (L1) that names a new second table (L2) at once, and the count
//! that says that this table's room is taken only when it is flushed. A process that is killed between both
//! leaves a table in room that counts as free, which the next one gives away again. Here such entries wait
//! until the counts have been written. What waits is no loss: nothing that was flushed needs it.
//!
//! While it is flushed, each write is on the medium before the next begins: counts come before the tables that
//! rest on them.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};
use parking_lot::Mutex;

/// Bytes of an entry of the first table.
const ENTRY: usize = 8;

/// The file of an image, for the library and for whoever flushes it.
#[derive(Clone, Debug)]
pub struct Ordered(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    helper: CommonStorageHelper,
    /// Where the first table lies; a place that is no multiple of an entry's size is none.
    table: Range<u64>,
    /// Entries of it that wait, by their place in the file.
    waiting: Mutex<BTreeMap<u64, [u8; ENTRY]>>,
    flushing: AtomicBool,
    /// Something was written since the last time that everything was on the medium.
    unsynced: AtomicBool,
}

impl fmt::Display for Ordered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.file.fmt(f)
    }
}

impl Ordered {
    /// A file with a first table in `table`, or none where that is empty.
    pub fn new(file: File, table: Range<u64>) -> Self {
        Self(Arc::new(Inner {
            file,
            helper: CommonStorageHelper::default(),
            table,
            waiting: Mutex::default(),
            flushing: AtomicBool::new(false),
            unsynced: AtomicBool::new(false),
        }))
    }

    /// Makes all last that was written before. `write_tables` has the library write its counts and second
    /// tables, the former first.
    ///
    /// # Errors
    /// The host's. What waits goes on waiting then.
    pub fn flush_in_order(&self, write_tables: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // Entries that come later may name tables whose counts are not written by this flush.
        let entries: Vec<_> = self.0.waiting.lock().iter().map(|(place, entry)| (*place, *entry)).collect();
        // Data that a table is going to name.
        self.0.sync()?;
        self.0.flushing.store(true, Ordering::Release);
        let written = write_tables();
        self.0.flushing.store(false, Ordering::Release);
        written?;
        self.0.sync()?;
        if entries.is_empty() {
            return Ok(());
        }
        for (place, entry) in &entries {
            self.0.file.write(&entry[..], *place)?;
        }
        let mut waiting = self.0.waiting.lock();
        // One that has changed since goes on waiting.
        for (place, entry) in &entries {
            if waiting.get(place) == Some(entry) {
                waiting.remove(place);
            }
        }
        drop(waiting);
        self.0.unsynced.store(true, Ordering::Release);
        self.0.sync()
    }
}

impl Inner {
    fn sync(&self) -> io::Result<()> {
        if self.unsynced.swap(false, Ordering::AcqRel) {
            return self.file.sync().inspect_err(|_| self.unsynced.store(true, Ordering::Release));
        }
        Ok(())
    }

    /// What is called before something is written.
    fn write_begins(&self) -> io::Result<()> {
        if self.flushing.load(Ordering::Acquire) {
            self.sync()?;
        }
        self.unsynced.store(true, Ordering::Release);
        Ok(())
    }

    /// The part of a piece of the file that is in the first table.
    fn in_table(&self, offset: u64, len: u64) -> Option<Range<u64>> {
        let part = self.table.start.max(offset)..self.table.end.min(offset.saturating_add(len));
        (part.start < part.end).then_some(part)
    }
}

/// The bytes of `part` out of bytes that begin at `offset`.
fn of(bytes: &[u8], offset: u64, part: Range<u64>) -> &[u8] {
    let place = |at: u64| usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
    bytes.get(place(part.start)..place(part.end)).unwrap_or_default()
}

impl Storage for Ordered {
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
        let waiting = inner.waiting.lock();
        let part = inner.in_table(offset, vector.len()).filter(|_| !waiting.is_empty());
        let Some(part) = part else {
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
        inner.write_begins()?;
        let end = offset.saturating_add(vector.len());
        let Some(part) = inner.in_table(offset, vector.len()) else {
            // SAFETY: as the caller promises.
            return unsafe { inner.file.pure_writev(vector, offset) };
        };
        let mut bytes = vec![0; usize::try_from(vector.len()).unwrap_or(0)];
        vector.copy_into_slice(&mut bytes);
        let (entries, _) = of(&bytes, offset, part.clone()).as_chunks::<ENTRY>();
        let mut waiting = inner.waiting.lock();
        for (place, entry) in (part.start..).step_by(ENTRY).zip(entries) {
            waiting.insert(place, *entry);
        }
        drop(waiting);
        for rest in [offset..part.start, part.end..end] {
            let bytes = of(&bytes, offset, rest.clone());
            if !bytes.is_empty() {
                inner.file.write(bytes, rest.start)?;
            }
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.write_begins()?;
        // SAFETY: as the caller promises.
        unsafe { self.0.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.write_begins()?;
        // SAFETY: as the caller promises.
        unsafe { self.0.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.write_begins()?;
        // SAFETY: as the caller promises.
        unsafe { self.0.file.pure_discard(offset, length) }
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
}
