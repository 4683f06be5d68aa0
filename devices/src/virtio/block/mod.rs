//! The block device (virtio 1.2, section 5.2).
//!
//! The device takes requests from its queues and checks them. Threads of its own (`workers`) do them, in any
//! order, on a [`Disk`]: the device never waits for the host's disks, but where it is drained.

mod config;
pub mod disk;
mod lock;
pub mod qcow2;
pub mod raw;
mod request;
mod workers;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

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
use self::request::{Bounds, Parsed};
use self::workers::{Finished, Job, Workers};
use super::device::{Active, Progress, VirtioDevice};
use super::queue::{Budget, Faults, Verdict, complete, serve};
use crate::sandbox::{Call, SandboxNeeds};
use crate::state::{self, StateError, Version};

/// Queues that a device has at most.
pub const MOST_QUEUES: u16 = 16;

const QUEUE_SIZE: u16 = 256;

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
    workers: Workers,
    faults: Faults,
    /// What the driver last asked for by the configuration space.
    writeback: bool,
    /// The driver can flush: only then writes may wait in a cache.
    flushes: bool,
    in_flight: usize,
    /// Room for what is submitted together.
    jobs: Vec<Job>,
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
        Ok(Self {
            workers: Workers::new(Arc::clone(&disk))?,
            disk,
            id: bytes,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues.clamp(1, MOST_QUEUES))],
            faults: Faults::default(),
            writeback: true,
            flushes: false,
            in_flight: 0,
            jobs: Vec::new(),
        })
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

    /// Gives back what is over.
    fn finish(&mut self, active: Option<&mut Active>, finished: Vec<Finished>) {
        self.in_flight = self.in_flight.saturating_sub(finished.len());
        let Some(active) = active else { return };
        let memory = Arc::clone(&active.memory);
        let mut queues: Vec<Vec<_>> = self.queue_sizes.iter().map(|_| Vec::new()).collect();
        for Finished { queue, chain, status, filled } in finished {
            let data: u64 =
                if filled { chain.writable().iter().map(|buffer| u64::from(buffer.len)).sum() } else { 1 };
            let written = if request::write_status(&memory, &chain, status) { data } else { 0 };
            if let Some(queue) = queues.get_mut(queue) {
                queue.push((chain, u32::try_from(written).unwrap_or(u32::MAX)));
            }
        }
        for (index, done) in queues.into_iter().enumerate().filter(|(_, done)| !done.is_empty()) {
            complete(active, index, done);
        }
    }
}

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
        let there = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        for (byte, value) in data.iter_mut().zip(there) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let ([value @ (0 | 1)], true) = (data, offset == config::WRITEBACK as u64) {
            self.writeback = *value == 1;
        }
    }

    fn start(&mut self) -> io::Result<()> {
        self.workers.start()
    }

    fn activate(&mut self, active: &mut Active) {
        self.flushes = active.features & 1 << VIRTIO_BLK_F_FLUSH != 0;
    }

    fn reset(&mut self) {
        self.faults.forgive();
        self.writeback = true;
        self.flushes = false;
    }

    fn drain(&mut self, active: &mut Active) {
        while self.in_flight > 0 {
            let finished = self.workers.wait_finished();
            self.finish(Some(active), finished);
        }
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        let memory = Arc::clone(&active.memory);
        let bounds = Bounds { size: self.disk.size(), read_only: self.disk.is_read_only() };
        let write_through = !(self.flushes && self.writeback);
        let Self { id, jobs, faults, .. } = self;
        let progress = serve(active, index, faults, BUDGET, |_, chain| {
            match request::parse(&memory, chain, bounds, id) {
                Parsed::Malformed => Verdict::Malformed,
                Parsed::Answered(status, written) => {
                    let told = request::write_status(&memory, chain, status);
                    Verdict::Used(if told { written.saturating_add(1) } else { 0 })
                }
                Parsed::Work(work) => {
                    jobs.push(Job { queue: index, chain: chain.keep(), work, write_through });
                    Verdict::Kept
                }
            }
        });
        self.in_flight = self.in_flight.saturating_add(self.jobs.len());
        self.workers.submit(&mut self.jobs);
        progress
    }

    fn own_events(&self) -> Vec<RawFd> {
        vec![self.workers.wake().as_raw_fd()]
    }

    fn own_event(&mut self, _index: usize, active: Option<&mut Active>) {
        let finished = self.workers.take_finished();
        self.finish(active, finished);
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
        SandboxNeeds::calls(&calls.map(Call::any))
    }

    fn save(&self) -> Result<Value, StateError> {
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
