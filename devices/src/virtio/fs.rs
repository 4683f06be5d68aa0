//! The file system device (virtio 1.2, section 5.11): a directory of the host that the guest mounts.
//!
//! A backend behind vhost-user does all of the work (`virtiofsd`), as it has to do with every file of a directory,
//! which the VM's own process must not reach. This device hands signals on, so that it works as any other on each
//! transport, stands still where it has to, and outlives its backend.
//!
//! Where a backend fails, what the guest has asked of it and asks from then on fails as on a disk that has gone (EIO),
//! until the next backend serves. That one knows nothing of what the guest has mounted: it must mount it again.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::device::{Active, Progress, VirtioDevice, read_part};
use super::queue::{Budget, Chain, Faults, Verdict, serve};
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

/// The place of what wakes it for the next backend among its own events.
const TIMER: usize = 1;

/// Requests that fail at once: all that a queue holds.
const FAILING: Budget = Budget { chains: u16::MAX, bytes: u64::MAX };

/// Bytes of `struct fuse_in_header` up to the end of its `unique` (Linux, include/uapi/linux/fuse.h).
const ASKED: usize = 16;

/// Bytes of `struct fuse_out_header`: length, error, `unique` of what it answers.
const ANSWER: u32 = 16;

/// Who has started the backends, and hears of them.
pub trait Owner: Send {
    /// The one that serves is of no more use for this reason: it has to be ended, as it may still be at the guest's
    /// memory. The next one serves after `next`, if there is one. Returns whether nobody of it can be there any more.
    fn lost(&mut self, reason: &str, next: Option<Duration>) -> bool;

    /// The next one serves.
    fn serves_again(&mut self);
}

/// Who does the work.
enum Backend {
    Serving(FrontEnd),
    /// Nobody, and all requests fail.
    Gone,
    /// It has gone for good, and who knows what it still does to the queues: nobody else may be at them.
    Astray,
}

/// What is known of a share's backends, for who looks at it.
#[derive(Debug)]
pub struct Service {
    serves: AtomicBool,
    restarts: AtomicU32,
}

impl Service {
    /// Whether one serves.
    pub fn serves(&self) -> bool {
        self.serves.load(Ordering::Relaxed)
    }

    /// How many have begun to serve where another one had failed.
    pub fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::Relaxed)
    }
}

/// A backend that waits until it is needed.
pub struct Spare {
    /// To it. It is told of the guest's memory once it is needed.
    pub front_end: FrontEnd,
    /// From the end of the one before on.
    pub after: Duration,
}

/// A shared directory.
pub struct Fs {
    config: [u8; CONFIG],
    backend: Backend,
    spares: VecDeque<Spare>,
    readiness: Epoll,
    timer: TimerFd,
    service: Arc<Service>,
    faults: Faults,
    owner: Box<dyn Owner>,
}

impl Fs {
    /// A device that the guest finds by `tag`, of which [`MOST_TAG`] bytes count, in front of a backend with
    /// [`QUEUES`] queues. Where that fails the `spares` take its place, one after the other.
    ///
    /// # Errors
    /// No descriptor can be had to wait with.
    pub fn new(
        tag: &str,
        front_end: FrontEnd,
        spares: impl IntoIterator<Item = Spare>,
        owner: Box<dyn Owner>,
    ) -> io::Result<Self> {
        let mut config = [0; CONFIG];
        let (name, queues) = config.split_at_mut(MOST_TAG);
        for (byte, value) in name.iter_mut().zip(tag.bytes()) {
            *byte = value;
        }
        queues.copy_from_slice(&1u32.to_le_bytes());
        let readiness = Epoll::new()?;
        watch(&readiness, &front_end)?;
        Ok(Self {
            config,
            backend: Backend::Serving(front_end),
            spares: spares.into_iter().collect(),
            readiness,
            timer: TimerFd::new()?,
            service: Arc::new(Service { serves: AtomicBool::new(true), restarts: AtomicU32::new(0) }),
            faults: Faults::default(),
            owner,
        })
    }

    /// What becomes of its backends.
    pub fn service(&self) -> Arc<Service> {
        Arc::clone(&self.service)
    }

    fn lose(&mut self, reason: &str, active: Option<&mut Active>) {
        let Backend::Serving(front_end) = &mut self.backend else { return };
        let (calls, connection) = front_end.descriptors();
        for descriptor in calls.into_iter().chain([connection]) {
            // Where it is not watched, nothing wakes for it.
            let _ = self.readiness.ctl(ControlOperation::Delete, descriptor, EpollEvent::default());
        }
        self.service.serves.store(false, Ordering::Relaxed);
        let next = self.spares.front().map(|spare| spare.after);
        front_end.cut();
        let is_over = self.owner.lost(reason, next);
        let taken_back = match active {
            None => true,
            Some(active) => {
                let all = is_over.then(|| front_end.take_back(active, fail)).flatten();
                if let Some(count) = all {
                    tracing::debug!("{count} requests of the guest have failed with their backend");
                }
                all.is_some()
            }
        };
        self.backend = if is_over { Backend::Gone } else { Backend::Astray };
        if !is_over || !taken_back {
            tracing::error!("what the guest has asked of it is never answered");
        }
        if let Some(next) = next.filter(|_| is_over) {
            self.wait(next);
        }
    }

    /// Has the next backend serve after that time.
    fn wait(&mut self, time: Duration) {
        // A time of zero would switch it off.
        if let Err(error) = self.timer.reset(time.max(Duration::from_nanos(1)), None) {
            tracing::warn!("nobody can be told when to share a directory again: {error}");
        }
    }

    /// The next backend is to serve.
    fn go_on(&mut self, mut active: Option<&mut Active>) {
        let (Backend::Gone, Some(mut spare)) = (&self.backend, self.spares.pop_front()) else { return };
        let met = spare.front_end.meet().map_err(|error| error.to_string());
        let met =
            met.and_then(|()| watch(&self.readiness, &spare.front_end).map_err(|error| error.to_string()));
        self.backend = Backend::Serving(spare.front_end);
        if let Err(reason) = met {
            return self.lose(&reason, active);
        }
        if let Some(active) = &mut active {
            self.ask(active, |front_end, active| front_end.activate(active));
        }
        if matches!(self.backend, Backend::Serving(_)) {
            self.service.restarts.fetch_add(1, Ordering::Relaxed);
            self.service.serves.store(true, Ordering::Relaxed);
            self.owner.serves_again();
        }
    }

    /// Has the backend do something; one that fails is lost.
    fn ask<E: ToString>(
        &mut self,
        active: &mut Active,
        request: impl FnOnce(&mut FrontEnd, &Active) -> Result<(), E>,
    ) {
        if let Backend::Serving(front_end) = &mut self.backend
            && let Err(error) = request(front_end, active)
        {
            self.lose(&error.to_string(), Some(&mut *active));
            let failing = if matches!(self.backend, Backend::Gone) { QUEUES } else { 0 };
            for index in 0..failing {
                // The driver need not notify of what it added while the backend had the queue.
                let _ = self.fail_all(index, active);
            }
        }
    }

    /// Fails what waits in a queue.
    fn fail_all(&mut self, index: usize, active: &mut Active) -> Progress {
        serve(active, index, &mut self.faults, FAILING, fail)
    }

    fn connection_event(&mut self, active: Option<&mut Active>) {
        let Backend::Serving(front_end) = &self.backend else { return };
        if front_end.is_quiet() {
            return;
        }
        let reason = "its backend has ended, or spoke unasked";
        match active {
            None => self.lose(reason, None),
            Some(active) => self.ask(active, |_, _| Err(reason)),
        }
    }
}

/// Watches for what a backend says.
fn watch(readiness: &Epoll, front_end: &FrontEnd) -> io::Result<()> {
    let (calls, connection) = front_end.descriptors();
    for (token, descriptor) in (0..).zip(calls).chain([(CONNECTION, connection)]) {
        readiness.ctl(ControlOperation::Add, descriptor, EpollEvent::new(EventSet::IN, token))?;
    }
    Ok(())
}

/// Answers a request (section 5.11.6.1) that it has failed. One that has no room for an answer wants none.
fn fail(memory: &GuestMemoryMmap, chain: &mut Chain) -> Verdict {
    let mut asked = [0; ASKED];
    if chain.reader(memory).read(&mut asked) < ASKED {
        return Verdict::Malformed;
    }
    let mut writer = chain.writer(memory);
    if writer.left() < u64::from(ANSWER) {
        return Verdict::Used(0);
    }
    let (_, unique) = asked.split_at(ASKED / 2);
    writer.write(&[&ANSWER.to_le_bytes(), &(-libc::EIO).to_le_bytes(), unique].concat());
    Verdict::Used(writer.written())
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
        let serving = if let Backend::Serving(front_end) = &self.backend { Some(front_end) } else { None };
        let all = serving.into_iter().chain(self.spares.iter().map(|spare| &spare.front_end));
        { all }.try_for_each(FrontEnd::start)
    }

    fn activate(&mut self, active: &mut Active) {
        self.ask(active, |front_end, active| front_end.activate(active));
    }

    /// The queues are stopped by now.
    fn reset(&mut self) {
        self.faults.forgive();
    }

    fn drain(&mut self, active: &mut Active) {
        self.ask(active, |front_end, _| front_end.stop());
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        self.ask(active, |front_end, active| front_end.kick(index, active));
        match self.backend {
            Backend::Serving(_) => Progress::Done,
            Backend::Gone => self.fail_all(index, active),
            Backend::Astray => Progress::Broken,
        }
    }

    fn own_events(&self) -> Vec<RawFd> {
        vec![self.readiness.as_raw_fd(), self.timer.as_raw_fd()]
    }

    fn own_event(&mut self, index: usize, mut active: Option<&mut Active>) {
        if index == TIMER {
            // It has rung, so that this does not wait.
            let _ = self.timer.wait();
            return self.go_on(active);
        }
        let mut events = [EpollEvent::default(); QUEUES + 1];
        let count = self.readiness.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            if event.data() == CONNECTION {
                self.connection_event(active.as_deref_mut());
                continue;
            }
            let Backend::Serving(front_end) = &mut self.backend else { return };
            let queue = usize::try_from(event.data()).unwrap_or(usize::MAX);
            if front_end.has_used(queue, active.as_deref())
                && let Some(queue) = active.as_ref().and_then(|active| active.queues.get(queue))
            {
                queue.interrupt().raise();
            }
        }
    }

    fn sandbox_needs(&self) -> SandboxNeeds {
        let mut needs = SandboxNeeds::default();
        if let Backend::Serving(front_end) = &self.backend {
            needs.add(front_end.sandbox_needs());
        }
        for spare in &self.spares {
            needs.add(spare.front_end.sandbox_needs());
        }
        needs
    }
}
