//! A disk as its owner sees it: what it has counted, what has stopped it, and how it grows.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::disk::{Disk, SECTOR};
use super::workers::{Entrance, Grown, Kind};

/// What becomes of a request that the host can't do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The guest is told (an I/O error).
    #[default]
    Report,
    /// It waits, and the owner is told, which pauses the VM. It is tried again when the VM goes on.
    Pause,
    /// The latter where the host has no room left for what is written, else the former.
    PauseWhenFull,
}

impl OnError {
    /// Whether a request that failed so waits.
    pub(super) fn waits(self, error: &io::Error) -> bool {
        match self {
            Self::Report => false,
            Self::Pause => is_of_the_host(error),
            Self::PauseWhenFull => is_full(error),
        }
    }
}

/// What to do about a failure for which requests wait.
pub(super) fn advice(error: &io::Error) -> &'static str {
    if is_full(error) { "make room where its file lies" } else { "mend the host's storage" }
}

fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// Whether the host failed, and may do better another time: not where the guest's buffers are no memory, where the
/// file has become shorter, or where data is lost already.
pub(super) fn is_of_the_host(error: &io::Error) -> bool {
    is_full(error)
        || error.raw_os_error().is_some_and(|number| !matches!(number, libc::EFAULT | libc::EINVAL))
}

/// Requests of one kind.
#[derive(Debug, Default)]
pub(super) struct Counter {
    operations: AtomicU64,
    bytes: AtomicU64,
}

/// What is counted while the disk works.
#[derive(Debug, Default)]
pub(super) struct Counters {
    reads: Counter,
    writes: Counter,
    cleared: Counter,
    flushes: AtomicU64,
    errors: AtomicU64,
    limited: AtomicU64,
    limited_ns: AtomicU64,
}

impl Counters {
    /// A request was done.
    pub fn done(&self, kind: Kind, bytes: u64) {
        let counter = match kind {
            Kind::Read => &self.reads,
            Kind::Write => &self.writes,
            Kind::Clear => &self.cleared,
            Kind::Flush => {
                self.flushes.fetch_add(1, Ordering::Relaxed);
                return;
            }
        };
        counter.operations.fetch_add(1, Ordering::Relaxed);
        counter.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The host could not do a request.
    pub fn failed(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// A request has to wait for its limits.
    pub fn waits(&self) {
        self.limited.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests have waited for so long.
    pub fn waited(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.limited_ns.fetch_add(time, Ordering::Relaxed);
    }
}

/// Requests that were done, and the bytes in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests.
    pub operations: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What a disk has counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: Count,
    /// Writes.
    pub writes: Count,
    /// Discards and writes of zeros.
    pub cleared: Count,
    /// Flushes.
    pub flushes: u64,
    /// Times that the host could not do a request.
    pub errors: u64,
    /// Requests that waited for the limits.
    pub limited: u64,
    /// How long some request waited for them.
    pub limited_for: Duration,
}

/// Why a disk can't be made larger.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// The guest may only read it.
    #[error("the disk {0} can't be written by its guest, so it can't grow")]
    ReadOnly(String),
    /// No whole number of sectors.
    #[error("a disk has a whole number of 512-byte sectors, and {0} bytes are none")]
    Size(u64),
    /// It would become smaller.
    #[error("the disk {id} has {is} bytes, and disks are never made smaller: ask for more than that")]
    Smaller {
        /// The disk.
        id: String,
        /// Its bytes.
        is: u64,
    },
    /// The host can't.
    #[error("the disk {id} could not grow: {source}")]
    Host {
        /// The disk.
        id: String,
        /// Why.
        source: io::Error,
    },
}

/// What the device and its owner share.
pub(super) struct Shared {
    pub id: String,
    pub disk: Arc<dyn Disk>,
    pub counters: Counters,
    /// What keeps requests waiting.
    pub failure: Mutex<Option<String>>,
    /// Readable for the owner once a request waits that failed.
    pub failed: EventFd,
    /// Readable for the device when those are to be tried again.
    pub retry: EventFd,
    /// The disk has become larger, and the driver was not told.
    pub grown: AtomicBool,
    pub entrance: Entrance,
}

/// A disk as its owner sees it.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Shared>);

impl Handle {
    pub(super) fn new(id: &str, disk: Arc<dyn Disk>, entrance: Entrance) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self(Arc::new(Shared {
            id: id.to_owned(),
            disk,
            counters: Counters::default(),
            failure: Mutex::default(),
            failed: event()?,
            retry: event()?,
            grown: AtomicBool::new(false),
            entrance,
        })))
    }

    /// What the disk is called in its VM.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.0.disk.size()
    }

    /// Whether the guest may only read it.
    pub fn is_read_only(&self) -> bool {
        self.0.disk.is_read_only()
    }

    /// What it has counted.
    pub fn counts(&self) -> Counts {
        let Counters { reads, writes, cleared, flushes, errors, limited, limited_ns } = &self.0.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let count =
            |counter: &Counter| Count { operations: get(&counter.operations), bytes: get(&counter.bytes) };
        Counts {
            reads: count(reads),
            writes: count(writes),
            cleared: count(cleared),
            flushes: get(flushes),
            errors: get(errors),
            limited: get(limited),
            limited_for: Duration::from_nanos(get(limited_ns)),
        }
    }

    /// Why requests wait until [`retry`](Self::retry), where they do: what the host said.
    pub fn failure(&self) -> Option<String> {
        self.0.failure.lock().clone()
    }

    /// Readable once a request waits that the host could not do.
    pub fn failed(&self) -> &EventFd {
        &self.0.failed
    }

    /// Has requests tried again that the host could not do.
    pub fn retry(&self) {
        // The one failure is a full counter, which is readable too.
        let _ = self.0.retry.write(1);
    }

    /// Makes the disk larger and tells the driver; `done` hears what came of it, on a thread of the disk's.
    ///
    /// # Errors
    /// [`GrowError`] where it is not even tried; `done` hears nothing then.
    pub fn grow(
        &self,
        size: u64,
        done: impl FnOnce(Result<(), GrowError>) + Send + 'static,
    ) -> Result<(), GrowError> {
        let id = || self.0.id.clone();
        if self.is_read_only() {
            return Err(GrowError::ReadOnly(id()));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(GrowError::Size(size));
        }
        let is = self.size();
        if size < is {
            return Err(GrowError::Smaller { id: id(), is });
        }
        let shared = Arc::clone(&self.0);
        let done = Box::new(move |grown: io::Result<()>| {
            shared.grown.store(grown.is_ok(), Ordering::Release);
            done(grown.map_err(|source| GrowError::Host { id: shared.id.clone(), source }));
        });
        self.0.entrance.grow(Grown { size, done });
        Ok(())
    }
}
