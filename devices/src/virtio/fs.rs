//! The file system device (virtio 1.2, section 5.11): a directory of the host that the guest mounts.
//!
//! A backend behind vhost-user does all of the work (`virtiofsd`), as it has to do with every file of a directory,
//! which the VM's own process must not reach. This device hands signals on, so that it works as any other on each
//! transport, stands still where it has to, and outlives its backend.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::{Active, Progress, VirtioDevice, read_part};
use super::vhost_user::FrontEnd;
use crate::sandbox::SandboxNeeds;

/// Bytes of a tag at most (section 5.11.4).
pub const MOST_TAG: usize = 36;

/// One for requests that can't wait behind others, and one for the rest.
const QUEUE_SIZES: [u16; 2] = [128, 1024];

/// How many queues a backend has to serve.
pub const QUEUES: usize = QUEUE_SIZES.len();

/// `struct virtio_fs_config`, without what only a feature makes valid.
const CONFIG: usize = MOST_TAG + 4;

/// The token of the connection's events; those of queues are their numbers.
const CONNECTION: u64 = u64::MAX;

/// Told once, with the reason, where the backend is of no more use: it has to be ended, as it may still be at the
/// guest's memory.
pub type OnLost = Box<dyn FnMut(&str) + Send>;

/// Who does the work.
enum Backend {
    Serving(FrontEnd),
    /// It has gone for good.
    Lost,
}

/// A shared directory.
pub struct Fs {
    config: [u8; CONFIG],
    backend: Backend,
    readiness: Epoll,
    serves: Arc<AtomicBool>,
    on_lost: OnLost,
}

impl Fs {
    /// A device that the guest finds by `tag`, of which [`MOST_TAG`] bytes count, in front of a backend with
    /// [`QUEUES`] queues.
    ///
    /// # Errors
    /// No descriptor can be had to wait with.
    pub fn new(tag: &str, front_end: FrontEnd, on_lost: OnLost) -> io::Result<Self> {
        let mut config = [0; CONFIG];
        let (name, queues) = config.split_at_mut(MOST_TAG);
        for (byte, value) in name.iter_mut().zip(tag.bytes()) {
            *byte = value;
        }
        queues.copy_from_slice(&1u32.to_le_bytes());
        let readiness = Epoll::new()?;
        let (calls, connection) = front_end.descriptors();
        for (token, descriptor) in (0..).zip(calls).chain([(CONNECTION, connection)]) {
            readiness.ctl(ControlOperation::Add, descriptor, EpollEvent::new(EventSet::IN, token))?;
        }
        let serves = Arc::new(AtomicBool::new(true));
        Ok(Self { config, backend: Backend::Serving(front_end), readiness, serves, on_lost })
    }

    /// Whether the backend serves.
    pub fn serves(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.serves)
    }

    fn lose(&mut self, reason: &str) {
        if let Backend::Serving(front_end) = &self.backend {
            let (calls, connection) = front_end.descriptors();
            for descriptor in calls.into_iter().chain([connection]) {
                // Where it is not watched, nothing wakes for it.
                let _ = self.readiness.ctl(ControlOperation::Delete, descriptor, EpollEvent::default());
            }
            self.backend = Backend::Lost;
            self.serves.store(false, Ordering::Relaxed);
            (self.on_lost)(reason);
        }
    }

    /// Has the backend do something; one that fails is lost.
    fn ask<E: ToString>(&mut self, request: impl FnOnce(&mut FrontEnd) -> Result<(), E>) {
        if let Backend::Serving(front_end) = &mut self.backend
            && let Err(error) = request(front_end)
        {
            self.lose(&error.to_string());
        }
    }
}

impl VirtioDevice for Fs {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_part(&self.config, offset, data);
    }

    /// Nothing is the driver's to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self) -> io::Result<()> {
        match &self.backend {
            Backend::Serving(front_end) => front_end.start(),
            Backend::Lost => Ok(()),
        }
    }

    fn activate(&mut self, active: &mut Active) {
        self.ask(|front_end| front_end.activate(active));
    }

    /// The queues are stopped by now.
    fn reset(&mut self) {}

    fn drain(&mut self, _active: &mut Active) {
        self.ask(FrontEnd::stop);
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        self.ask(|front_end| front_end.kick(index, active));
        match self.backend {
            Backend::Serving(_) => Progress::Done,
            Backend::Lost => Progress::Broken,
        }
    }

    fn own_events(&self) -> Vec<RawFd> {
        vec![self.readiness.as_raw_fd()]
    }

    fn own_event(&mut self, _index: usize, active: Option<&mut Active>) {
        let mut events = [EpollEvent::default(); QUEUES + 1];
        let count = self.readiness.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            let Backend::Serving(front_end) = &self.backend else { return };
            if event.data() == CONNECTION {
                if !front_end.is_quiet() {
                    self.lose("its backend has ended, or spoke unasked");
                }
                continue;
            }
            let queue = usize::try_from(event.data()).unwrap_or(usize::MAX);
            if front_end.has_used(queue)
                && let Some(queue) = active.as_ref().and_then(|active| active.queues.get(queue))
            {
                queue.interrupt().raise();
            }
        }
    }

    fn sandbox_needs(&self) -> SandboxNeeds {
        match &self.backend {
            Backend::Serving(front_end) => front_end.sandbox_needs(),
            Backend::Lost => SandboxNeeds::default(),
        }
    }
}
