//! The block device (virtio 1.2, section 5.2).
//!
//! The device takes requests from its queues and checks them. An `engine` has them done, in any order, on a
//! [`Disk`]: the kernel by itself (`ring`), or threads (`workers`). The device never waits for the host's disks,
//! but where it is drained.

mod barrier;
mod config;
pub mod disk;
mod engine;
pub mod handle;
mod lock;
pub mod qcow2;
pub mod raw;
mod request;
pub mod ring;
mod waiting;
mod workers;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::config::Config;
use self::disk::Disk;
use self::engine::Engine;
use self::handle::{Handle, OnError, is_of_the_host};
use self::request::{Bounds, Parsed, Status};
use self::waiting::{Failed, Limited};
use self::workers::{Finished, Job, Kind};
use super::device::{Active, Progress, VirtioDevice, read_part};
use super::queue::{ActiveQueue, Budget, Chain, Faults, Verdict, complete, serve};
use crate::bucket::{Bucket, RateLimits};
use crate::sandbox::{Call, SandboxNeeds};
use crate::state::{self, StateError, Version};

/// Queues that a device has at most.
pub const MOST_QUEUES: u16 = 16;

const QUEUE_SIZE: u16 = 256;

/// Sentences about failures in a second, and at once after a silence: a guest may ask for the same again and
/// again.
const SENTENCES: (u64, u64) = (1, 5);

/// Requests that are taken in one event.
const BUDGET: Budget = Budget { chains: QUEUE_SIZE, bytes: u64::MAX };

const DEVICE: &str = "the block device";

/// What a block device knows, as data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    version: Version<1>,
    faults: Faults,
    writeback: bool,
    /// Bytes of the disk: it must be as long where it is restored.
    size: u64,
}

/// A disk behind queues.
pub struct Block {
    disk: Arc<dyn Disk>,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    queue_sizes: Vec<u16>,
    engine: Engine,
    faults: Faults,
    /// What the driver last asked for by the configuration space.
    writeback: bool,
    /// The driver can flush: only then writes may wait in a cache.
    flushes: bool,
    in_flight: usize,
    /// Room for what is submitted together.
    jobs: Vec<Job>,
    /// Room for what is given back together, by queue.
    done: Vec<Vec<(Chain, u32)>>,
    limited: Limited,
    on_error: OnError,
    /// What the host could not do, to be tried again.
    failed: Failed,
    sentences: Bucket,
    handle: Handle,
}

impl Block {
    /// A device with `queues` queues, 1 to [`MOST_QUEUES`]. The guest reads the first 20 bytes of `id` as the
    /// disk's serial number.
    ///
    /// # Errors
    /// No eventfd can be had.
    pub fn new(disk: Arc<dyn Disk>, id: &str, queues: u16) -> io::Result<Self> {
        let mut bytes = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (byte, value) in bytes.iter_mut().zip(id.bytes()) {
            *byte = value;
        }
        let queues = queues.clamp(1, MOST_QUEUES);
        // As many as the queues hold.
        let engine = Engine::new(Arc::clone(&disk), u32::from(queues) * u32::from(QUEUE_SIZE))?;
        Ok(Self {
            handle: Handle::new(id, Arc::clone(&disk), engine.entrance())?,
            engine,
            disk,
            id: bytes,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
            done: (0..queues).map(|_| Vec::new()).collect(),
            faults: Faults::default(),
            writeback: true,
            flushes: false,
            in_flight: 0,
            jobs: Vec::new(),
            limited: Limited::new(RateLimits::default())?,
            on_error: OnError::default(),
            failed: Failed::new(),
            sentences: Bucket::new(SENTENCES.0, SENTENCES.1, Instant::now()),
        })
    }

    /// Holds the device to `limits`.
    ///
    /// # Errors
    /// No timer can be had.
    pub fn limited(self, limits: RateLimits) -> io::Result<Self> {
        Ok(Self { limited: Limited::new(limits)?, ..self })
    }

    /// Has threads do all, as where io_uring is not to be had.
    #[must_use]
    pub fn on_threads(self) -> Self {
        Self { engine: self.engine.on_threads(), ..self }
    }

    /// Whether the host's kernel does reads and writes by itself (io_uring), as far as the disk lets it.
    pub fn has_ring(&self) -> bool {
        self.engine.has_ring()
    }

    /// Says what becomes of requests that the host can't do.
    #[must_use]
    pub fn on_error(self, on_error: OnError) -> Self {
        Self { on_error, ..self }
    }

    /// The disk, for its owner.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Malformed chains handed back since the device was made.
    pub fn malformed(&self) -> u64 {
        self.faults.total()
    }

    fn config(&self) -> Config {
        Config {
            size: self.disk.size(),
            most_segments: request::MOST_SEGMENTS,
            most_segment: request::MOST_SEGMENT,
            block: self.disk.block_size(),
            writeback: self.writeback,
            queues: u16::try_from(self.queue_sizes.len()).unwrap_or(1),
            most_cleared: request::MOST_CLEARED_SECTORS,
        }
    }

    /// Gives back what is over, but for what is to be tried again.
    fn finish(&mut self, active: Option<&mut Active>, finished: Vec<Finished>) {
        self.in_flight = self.in_flight.saturating_sub(finished.len());
        let Some(active) = active else { return };
        let memory = Arc::clone(&active.memory);
        for Finished { queue, chain, kind, bytes, done } in finished {
            let status = match done {
                Ok(()) => {
                    self.handle.0.counters.done(kind, bytes);
                    Status::Ok
                }
                Err(error) => {
                    if self.waits_after(&error) {
                        self.failed.push((queue, chain));
                        continue;
                    }
                    Status::IoError
                }
            };
            let data: u64 = if kind == Kind::Read {
                chain.writable().iter().map(|buffer| u64::from(buffer.len)).sum()
            } else {
                1
            };
            let written = if request::write_status(&memory, &chain, status) { data } else { 0 };
            if let Some(queue) = self.done.get_mut(queue) {
                queue.push((chain, u32::try_from(written).unwrap_or(u32::MAX)));
            }
        }
        for (index, done) in self.done.iter_mut().enumerate().filter(|(_, done)| !done.is_empty()) {
            complete(active, index, done.drain(..));
        }
    }

    /// Takes note of a failure; returns whether its request is to be tried again.
    fn waits_after(&mut self, error: &io::Error) -> bool {
        let shared = &self.handle.0;
        shared.counters.failed();
        let waits = self.on_error.waits(error);
        if waits {
            let mut failure = shared.failure.lock();
            if failure.is_none() {
                *failure = Some(format!("{error}: {}", handle::advice(error)));
                // The one failure is a full counter, which is readable too.
                let _ = shared.failed.write(1);
            }
        } else if !is_of_the_host(error) {
            tracing::debug!("a request to the disk {} failed: {error}", shared.id);
        } else if self.sentences.take(Instant::now()) {
            tracing::warn!(
                "the host failed the disk {}, and its guest is told (an I/O error): {error}",
                shared.id
            );
        }
        waits
    }

    /// Tries again what the host could not do.
    fn retry(&mut self, active: Option<&mut Active>) {
        let _ = self.handle.0.retry.read();
        *self.handle.0.failure.lock() = None;
        let failed = std::mem::take(&mut self.failed);
        let Some(active) = active else { return };
        let memory = Arc::clone(&active.memory);
        for (index, chain) in failed {
            // Its driver may have taken the queue back.
            if !active.queues.get(index).is_some_and(ActiveQueue::is_ready) {
                continue;
            }
            match request::parse(&memory, &chain, self.bounds(), &self.id) {
                Parsed::Work(work) => {
                    let write_through = self.is_write_through();
                    self.jobs.push(Job::new(index, chain, work, write_through));
                }
                // The driver has changed it since.
                Parsed::Answered(..) | Parsed::Malformed => complete(active, index, [(chain, 0)]),
            }
        }
        self.submit();
    }

    fn bounds(&self) -> Bounds {
        Bounds { size: self.disk.size(), read_only: self.disk.is_read_only() }
    }

    fn is_write_through(&self) -> bool {
        !(self.flushes && self.writeback)
    }

    /// Has done what stands in `jobs`.
    fn submit(&mut self) {
        self.in_flight = self.in_flight.saturating_add(self.jobs.len());
        self.engine.submit(&mut self.jobs);
    }

    /// Has requests of `jobs` pass the limits, and those that wait for them.
    fn pass(&mut self) {
        self.limited.pass(&mut self.jobs, &self.handle.0.counters);
        self.submit();
    }
}

/// The device's own events.
const WAKE: usize = 0;
const RETRY: usize = 1;
const MAY_PASS: usize = 2;
/// Only with a ring.
const RING: usize = 3;

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_MQ;
        if self.disk.is_read_only() {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_CONFIG_WCE | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.config().bytes();
        read_part(&bytes, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let ([value @ (0 | 1)], true) = (data, offset == config::WRITEBACK as u64) {
            self.writeback = *value == 1;
        }
    }

    fn start(&mut self) -> io::Result<()> {
        self.engine.start()
    }

    fn activate(&mut self, active: &mut Active) {
        self.flushes = active.features & 1 << VIRTIO_BLK_F_FLUSH != 0;
    }

    fn reset(&mut self) {
        self.faults.forgive();
        self.writeback = true;
        self.flushes = false;
        self.failed.clear();
        self.limited.clear();
        *self.handle.0.failure.lock() = None;
    }

    fn drain(&mut self, active: &mut Active) {
        while self.in_flight > 0 {
            let finished = self.engine.wait_finished();
            self.finish(Some(active), finished);
        }
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        let memory = Arc::clone(&active.memory);
        let (bounds, write_through) = (self.bounds(), self.is_write_through());
        let Self { id, jobs, faults, .. } = self;
        let progress = serve(active, index, faults, BUDGET, |_, chain| {
            match request::parse(&memory, chain, bounds, id) {
                Parsed::Malformed => Verdict::Malformed,
                Parsed::Answered(status, written) => {
                    let told = request::write_status(&memory, chain, status);
                    Verdict::Used(if told { written.saturating_add(1) } else { 0 })
                }
                Parsed::Work(work) => {
                    jobs.push(Job::new(index, chain.keep(), work, write_through));
                    Verdict::Kept
                }
            }
        });
        self.pass();
        // What is in the host's page cache is done already.
        let finished = self.engine.take_from_ring();
        self.finish(Some(active), finished);
        progress
    }

    fn own_events(&self) -> Vec<RawFd> {
        let mut events =
            vec![self.engine.threads_event(), self.handle.0.retry.as_raw_fd(), self.limited.event()];
        events.extend(self.engine.ring_event());
        events
    }

    fn own_event(&mut self, index: usize, active: Option<&mut Active>) {
        match index {
            WAKE => {
                let finished = self.engine.take_from_threads();
                if self.handle.0.grown.swap(false, Ordering::AcqRel)
                    && let Some(active) = active.as_deref()
                {
                    active.config_interrupt.raise();
                }
                self.finish(active, finished);
            }
            RETRY => self.retry(active),
            MAY_PASS => self.pass(),
            RING => {
                let finished = self.engine.take_from_ring();
                self.finish(active, finished);
            }
            _ => {}
        }
    }

    fn sandbox_needs(&self) -> SandboxNeeds {
        // The last two are an image's: it is made last with all that is known of its file, and grows.
        let calls = [
            libc::SYS_preadv,
            libc::SYS_pwritev,
            libc::SYS_fdatasync,
            libc::SYS_fallocate,
            libc::SYS_fsync,
            libc::SYS_ftruncate,
        ];
        let mut calls = calls.map(Call::any).to_vec();
        if self.has_ring() {
            calls.extend(ring::CALLS);
        }
        SandboxNeeds::calls(&calls)
    }

    fn save(&self) -> Result<Value, StateError> {
        if !self.failed.is_empty() || self.limited.any() {
            return Err(StateError::Waits { device: DEVICE });
        }
        let Self { faults, writeback, .. } = *self;
        state::to_value(&BlockState { version: Version, faults, writeback, size: self.disk.size() })
    }

    fn restore(&mut self, state: Value, active: Option<&mut Active>) -> Result<(), StateError> {
        let state: BlockState = state::from_value::<_, 1>(DEVICE, state)?;
        if state.size != self.disk.size() {
            let what = format!("its disk had {} bytes, and this one has {}", state.size, self.disk.size());
            return Err(StateError::Unreadable { device: DEVICE, what });
        }
        self.faults = state.faults;
        self.writeback = state.writeback;
        if let Some(active) = active {
            self.activate(active);
        }
        Ok(())
    }
}
