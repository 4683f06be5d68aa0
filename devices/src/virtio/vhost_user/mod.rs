//! vhost-user (<https://qemu-project.gitlab.io/qemu/interop/vhost-user.html>): another process, the backend, works on
//! a device's queues. It has the guest's memory mapped, and is told by messages over a socket where the queues stand.
//!
//! A backend is not trusted to answer, or to answer sensibly: each exchange of messages has a time limit, and what is
//! shared with it can keep nobody here waiting. It is told guest addresses only, none of this process.

mod signal;
mod watchdog;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::GuestAddress;

use self::signal::{Call, Kick};
use self::watchdog::Watchdog;
use super::device::Active;
use crate::sandbox::{self, Argument, SandboxNeeds};

/// How long a backend may take over what it is asked: it finishes what is in flight then, maybe on a slow disk.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What every transport here offers, so that a backend has to know it.
const NEEDED: [(u32, &str); 3] = [
    (VIRTIO_F_VERSION_1, "virtio 1"),
    (VIRTIO_RING_F_INDIRECT_DESC, "indirect descriptors"),
    (VIRTIO_RING_F_EVENT_IDX, "event indices"),
];

/// Why a backend is of no use.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// It is not as the protocol has it, did not answer in time, or has gone.
    #[error("it was asked {what}: {source}")]
    Protocol {
        /// What it was asked.
        what: &'static str,
        /// What became of it.
        source: vhost::Error,
    },
    /// It is too old, or for something else.
    #[error("it does not know {0}")]
    Lacks(&'static str),
    /// The host.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// `map_err` with what a backend was asked.
fn asked(what: &'static str) -> impl Fn(vhost::Error) -> BackendError {
    move |source| BackendError::Protocol { what, source }
}

/// Guest memory that another process can map: all that the guest can reach, whatever is plugged.
#[derive(Debug)]
pub struct SharedMemory {
    /// Where it lies.
    pub file: File,
    /// Its parts.
    pub regions: Vec<SharedRegion>,
}

/// A part of guest memory in a file. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedRegion {
    /// Where the guest has it.
    pub guest: GuestAddress,
    /// How large it is.
    pub size: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

/// A queue, as the backend has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ring {
    /// It does not work on it, and goes on there once it does.
    Stopped { next: u16 },
    /// It works on it.
    Running,
}

/// This process's side of the connection to a backend.
pub struct FrontEnd {
    frontend: Frontend,
    watchdog: Arc<Watchdog>,
    rings: Vec<(Ring, Kick, Call)>,
}

impl FrontEnd {
    /// Makes `socket`, at whose other end is a backend of `queues` queues, a connection, and tells it of the guest's
    /// memory. Each of its answers takes `patience` at most.
    ///
    /// # Errors
    /// [`BackendError`].
    pub fn new(
        socket: UnixStream,
        memory: &SharedMemory,
        queues: usize,
        patience: Duration,
    ) -> Result<Self, BackendError> {
        let watchdog = Arc::new(Watchdog::new(socket.try_clone()?, patience));
        let mut frontend = Frontend::from_stream(socket, u64::try_from(queues).unwrap_or(u64::MAX));
        thread::scope(|scope| {
            thread::Builder::new().spawn_scoped(scope, || watchdog.serve())?;
            let agreed = watchdog.within(|| agree(&mut frontend, memory));
            watchdog.end();
            agreed
        })?;
        let ring = |_| Ok::<_, io::Error>((Ring::Stopped { next: 0 }, Kick::new()?, Call::new()?));
        let rings = (0..queues).map(ring).collect::<Result<_, _>>()?;
        Ok(Self { frontend, watchdog, rings })
    }

    /// Has a thread look after the time that answers take, to the end of the connection.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(&self) -> io::Result<()> {
        self.watchdog.start()
    }

    /// Descriptors to be watched for reading: one of each queue, and the connection itself.
    pub fn descriptors(&self) -> (Vec<RawFd>, RawFd) {
        (self.rings.iter().map(|(_, _, call)| call.as_raw_fd()).collect(), self.frontend.as_raw_fd())
    }

    /// Whether the backend is still there, and says nothing unasked.
    pub fn is_quiet(&self) -> bool {
        self.watchdog.is_quiet()
    }

    /// Has the backend begin with the queues that are ready.
    ///
    /// # Errors
    /// [`BackendError`]: nothing more is to be expected of it.
    pub fn activate(&mut self, active: &Active) -> Result<(), BackendError> {
        let Self { frontend, watchdog, .. } = self;
        let features = active.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        watchdog
            .within(|| frontend.set_features(features))
            .map_err(asked("to take the driver's features"))?;
        for (ring, ..) in &mut self.rings {
            *ring = Ring::Stopped { next: 0 };
        }
        (0..self.rings.len()).try_for_each(|queue| self.run(queue, active))
    }

    /// The driver has put buffers into a queue.
    ///
    /// # Errors
    /// [`BackendError`]: nothing more is to be expected of the backend.
    pub fn kick(&mut self, queue: usize, active: &Active) -> Result<(), BackendError> {
        self.run(queue, active)?;
        if let Some((_, kick, _)) = self.rings.get(queue) {
            kick.signal();
        }
        Ok(())
    }

    /// Whether the backend has used buffers of a queue since the last call.
    pub fn has_used(&self, queue: usize) -> bool {
        self.rings.get(queue).is_some_and(|(_, _, call)| call.take())
    }

    /// Has the backend work on a queue that is ready, if it does not.
    fn run(&mut self, queue: usize, active: &Active) -> Result<(), BackendError> {
        let Self { frontend, watchdog, rings } = self;
        let Some(ready) = active.queues.get(queue).filter(|ready| ready.is_ready()) else { return Ok(()) };
        let Some((ring, kick, call)) = rings.get_mut(queue) else { return Ok(()) };
        let Ring::Stopped { next } = *ring else { return Ok(()) };
        let data = VringConfigData {
            queue_max_size: ready.size(),
            queue_size: ready.size(),
            flags: 0,
            desc_table_addr: ready.queue.desc_table(),
            used_ring_addr: ready.queue.used_ring(),
            avail_ring_addr: ready.queue.avail_ring(),
            log_addr: None,
        };
        let started = watchdog.within(|| {
            frontend.set_vring_num(queue, ready.size())?;
            frontend.set_vring_base(queue, next)?;
            frontend.set_vring_addr(queue, &data)?;
            frontend.set_vring_call(queue, call.theirs())?;
            frontend.set_vring_kick(queue, kick.theirs())?;
            frontend.set_vring_enable(queue, true)
        });
        started.map_err(asked("to begin with a queue"))?;
        *ring = Ring::Running;
        Ok(())
    }

    /// Has the backend finish what it is at, and leave the guest's memory alone.
    ///
    /// # Errors
    /// [`BackendError`]: it may still be at it, and has to be ended.
    pub fn stop(&mut self) -> Result<(), BackendError> {
        let Self { frontend, watchdog, rings } = self;
        for (queue, (ring, ..)) in
            rings.iter_mut().enumerate().filter(|(_, (ring, ..))| *ring == Ring::Running)
        {
            let next = watchdog.within(|| frontend.get_vring_base(queue)).map_err(asked("to stop"))?;
            // An index of 16 bits. What else it may say comes back to itself alone.
            *ring = Ring::Stopped { next: next as u16 };
        }
        Ok(())
    }

    /// Messages go over this one socket.
    pub fn sandbox_needs(&self) -> SandboxNeeds {
        let value = u64::from(self.frontend.as_raw_fd().unsigned_abs());
        let on_it = |number| sandbox::Call { number, argument: Some(Argument { index: 0, value }) };
        SandboxNeeds::calls(&[on_it(libc::SYS_sendmsg), on_it(libc::SYS_recvmsg)])
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        self.watchdog.end();
    }
}

/// Both sides agree on what they know, and the backend learns where the guest's memory is.
fn agree(frontend: &mut Frontend, memory: &SharedMemory) -> Result<(), BackendError> {
    frontend.set_owner().map_err(asked("to serve"))?;
    let features = frontend.get_features().map_err(asked("what it knows"))?;
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
        return Err(BackendError::Lacks("features of the protocol"));
    }
    if let Some((_, name)) = NEEDED.into_iter().find(|(bit, _)| features & 1 << bit == 0) {
        return Err(BackendError::Lacks(name));
    }
    let known = frontend.get_protocol_features().map_err(asked("what it knows of the protocol"))?;
    let wanted = known & VhostUserProtocolFeatures::REPLY_ACK;
    frontend.set_protocol_features(wanted).map_err(asked("to agree"))?;
    if wanted.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    let regions: Vec<_> = memory.regions.iter().map(|region| info(*region, &memory.file)).collect();
    frontend.set_mem_table(&regions).map_err(asked("to map the guest's memory")).map(drop)
}

/// The protocol has addresses of the front end's process; any will do that tell the parts of memory apart, and the
/// guest's tell nothing about this process.
fn info(region: SharedRegion, file: &File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.guest.0,
        memory_size: region.size,
        userspace_addr: region.guest.0,
        mmap_offset: region.offset,
        mmap_handle: file.as_raw_fd(),
    }
}
