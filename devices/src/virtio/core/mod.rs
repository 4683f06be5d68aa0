//! The state machine of a virtio device (virtio 1.2, chapters 2 and 3), whatever transport carries it.
//!
//! Every call comes from a vCPU that may be hostile, or from the device's event loop: what the
//! protocol forbids at this moment is ignored, and a reset (zero to the status) works always.

pub mod saved;
mod setup;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventOps, EventSet, Events, Result as EventResult};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Active, Progress, VirtioDevice};
use super::interrupt::{Deliver, Interrupt, Source};
use super::queue::ActiveQueue;
pub(super) use setup::{Half, QueueSetup};

/// What every transport offers, for every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// How far a driver has come with the device (section 3.1.1).
enum State {
    Reset,
    Acknowledged,
    Driver,
    FeaturesAgreed,
    Running(Active),
    /// The driver gave up (FAILED) in the state whose status bits are kept.
    Failed(u32),
}

impl State {
    /// The device status (section 2.1), less DEVICE_NEEDS_RESET.
    fn status(&self) -> u32 {
        let acknowledged = VIRTIO_CONFIG_S_ACKNOWLEDGE;
        let driver = acknowledged | VIRTIO_CONFIG_S_DRIVER;
        let agreed = driver | VIRTIO_CONFIG_S_FEATURES_OK;
        match self {
            Self::Reset => 0,
            Self::Acknowledged => acknowledged,
            Self::Driver => driver,
            Self::FeaturesAgreed => agreed,
            Self::Running(_) => agreed | VIRTIO_CONFIG_S_DRIVER_OK,
            Self::Failed(before) => before | VIRTIO_CONFIG_S_FAILED,
        }
    }
}

/// Who has the device stand still, though its driver may have it running.
#[derive(Clone, Copy)]
pub(super) enum Hold {
    /// The VM is paused, or ends.
    Owner = 1,
    /// The driver does not let the device reach memory by itself.
    BusMaster = 2,
}

/// A device and how far its driver has come with it.
pub(super) struct Core {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemoryMmap>,
    transport: Arc<dyn Deliver>,
    notifiers: Vec<EventFd>,
    own_events: Vec<OwnEvent>,
    /// Written when the device hears of its own events again.
    released: EventFd,
    /// Bits of [`Hold`].
    holds: u8,
    state: State,
    queues: Vec<QueueSetup>,
    /// DEVICE_NEEDS_RESET is set.
    broken: bool,
    generation: u32,
    /// The configuration space has changed, and `generation` does not say so yet: it says so at the next
    /// look, so that it changes once for each look however narrow a transport shows it (section 4.1.4.3.1).
    config_changed: Arc<AtomicBool>,
    driver_features: u64,
    /// Selects a queue for the registers about one.
    pub(super) queue_select: u32,
    /// Selects 32 of the device's feature bits.
    pub(super) device_features_select: u32,
    /// Selects 32 of the driver's feature bits.
    pub(super) driver_features_select: u32,
}

/// A descriptor of the device's own on its event loop.
struct OwnEvent {
    descriptor: RawFd,
    /// It came during a hold, and is not watched until that is over.
    waits: bool,
}

impl Core {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        transport: Arc<dyn Deliver>,
    ) -> io::Result<Self> {
        let queues: Vec<_> = device.queue_sizes().iter().copied().map(QueueSetup::new).collect();
        for queue in &queues {
            Queue::new(queue.max_size)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
        }
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let own_events = device.own_events();
        Ok(Self {
            device,
            memory,
            transport,
            notifiers: queues.iter().map(|_| event()).collect::<io::Result<_>>()?,
            own_events: own_events
                .into_iter()
                .map(|descriptor| OwnEvent { descriptor, waits: false })
                .collect(),
            released: event()?,
            holds: 0,
            state: State::Reset,
            queues,
            broken: false,
            generation: 0,
            config_changed: Arc::new(AtomicBool::new(false)),
            driver_features: 0,
            queue_select: 0,
            device_features_select: 0,
            driver_features_select: 0,
        })
    }

    /// One a queue; a write to it does what the driver's notification does.
    pub(super) fn notifiers(&self) -> &[EventFd] {
        &self.notifiers
    }

    pub(super) fn is_served_by_vcpu(&self, queue: usize) -> bool {
        self.device.is_served_by_vcpu(queue)
    }

    pub(super) fn device_id(&self) -> u32 {
        self.device.device_id()
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// The selected half of the features that the device offers.
    pub(super) fn device_features(&self) -> u32 {
        Half::of(self.device_features_select).map_or(0, |half| half.get(self.offered_features()))
    }

    /// The selected half of the features that the driver has accepted.
    pub(super) fn driver_features(&self) -> u32 {
        Half::of(self.driver_features_select).map_or(0, |half| half.get(self.driver_features))
    }

    pub(super) fn write_driver_features(&mut self, value: u32) {
        if let (State::Acknowledged | State::Driver, Some(half)) =
            (&self.state, Half::of(self.driver_features_select))
        {
            half.put(&mut self.driver_features, value);
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.state.status() | if self.broken { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
    }

    pub(super) fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The registers of the selected queue.
    pub(super) fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// The same, to be changed: while the driver sets queues up, and until this one is ready, as it
    /// stays as it was checked.
    pub(super) fn set_up(&mut self) -> Option<&mut QueueSetup> {
        let State::FeaturesAgreed = self.state else { return None };
        self.queues.get_mut(usize::try_from(self.queue_select).ok()?).filter(|queue| !queue.is_ready())
    }

    /// The driver says that the selected queue is ready. One that is none needs a reset.
    pub(super) fn enable_queue(&mut self) {
        let State::FeaturesAgreed = self.state else { return };
        let Ok(index) = usize::try_from(self.queue_select) else { return };
        let others = self.queues.iter().enumerate();
        let ready = others.filter(|(other, queue)| *other != index && queue.is_ready());
        let taken: Vec<_> = ready.flat_map(|(_, queue)| queue.areas()).collect();
        let Some(queue) = self.queues.get_mut(index) else { return };
        if !queue.enable(&self.memory, &taken) {
            self.needs_reset();
        }
    }

    /// The driver takes the selected queue back. It can't be started again before a reset.
    pub(super) fn disable_queue(&mut self) {
        let Ok(index) = usize::try_from(self.queue_select) else { return };
        let Some(queue) = self.queues.get_mut(index) else { return };
        match &mut self.state {
            State::FeaturesAgreed => queue.disable(),
            State::Running(active) => {
                // What is in flight may be in its buffers.
                self.device.drain(active);
                queue.disable();
                if let Some(queue) = active.queues.get_mut(index) {
                    queue.stop();
                }
            }
            _ => {}
        }
    }

    /// The driver has notified a queue: wakes the device's event loop, for queues that the vCPU itself
    /// does not serve.
    pub(super) fn notify(&mut self, queue: usize) {
        if let Some(notifier) = self.notifiers.get(queue) {
            if self.device.is_served_by_vcpu(queue) {
                return self.work_on(queue);
            }
            // The one failure is a full counter, which is a notification already pending.
            let _ = notifier.write(1);
        }
    }

    /// The driver writes the device status. Zero has reset the device once this returns: nothing is in
    /// flight any more.
    pub(super) fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let now = self.state.status();
        // The driver may not clear a bit but all of them (section 2.1.1).
        if value & now != now {
            return;
        }
        if matches!(self.state, State::Failed(_)) {
            return;
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            self.stop();
            self.state = State::Failed(now);
            return;
        }
        self.advance(value);
    }

    /// Walks the states whose bits stand in `wanted`, as far as each lets the next.
    fn advance(&mut self, wanted: u32) {
        let has = |bit| wanted & bit != 0;
        loop {
            self.state = match self.state {
                State::Reset if has(VIRTIO_CONFIG_S_ACKNOWLEDGE) => State::Acknowledged,
                State::Acknowledged if has(VIRTIO_CONFIG_S_DRIVER) => State::Driver,
                State::Driver if has(VIRTIO_CONFIG_S_FEATURES_OK) && self.features_acceptable() => {
                    State::FeaturesAgreed
                }
                State::FeaturesAgreed if has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.broken => {
                    return self.run();
                }
                _ => return,
            };
        }
    }

    /// FEATURES_OK stays clear where this is false (section 3.1.1, step 6).
    fn features_acceptable(&self) -> bool {
        let version_1 = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        version_1 && self.driver_features & !self.offered_features() == 0
    }

    fn run(&mut self) {
        let mut active = self.activate();
        self.device.activate(&mut active);
        self.state = State::Running(active);
        // Linux's balloon driver fills its statistics queue before DRIVER_OK,
        // when notifications count for nothing: look at every queue once.
        self.ring_all();
    }

    /// What the device works on, of the queues that are ready.
    fn activate(&mut self) -> Active {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let interrupt = |source| Interrupt::new(self.transport.clone(), source, self.config_changed.clone());
        let queues = self.queues.iter_mut().enumerate();
        Active {
            memory: self.memory.clone(),
            queues: queues
                .map(|(index, queue)| {
                    ActiveQueue::new(queue.take(event_idx), interrupt(Source::Queue(index)))
                })
                .collect(),
            config_interrupt: interrupt(Source::Config),
            features: self.driver_features,
        }
    }

    /// As if the driver had notified every queue.
    fn ring_all(&self) {
        for notifier in &self.notifiers {
            let _ = notifier.write(1);
        }
    }

    /// Takes the device out of its driver's hands, with nothing in flight.
    fn stop(&mut self) {
        if let State::Running(active) = &mut self.state {
            self.device.drain(active);
        }
        self.device.reset();
        // Without a driver its events are served, held or not.
        let _ = self.released.write(1);
    }

    fn reset(&mut self) {
        self.stop();
        self.state = State::Reset;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
        self.queue_select = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.broken = false;
        // A driver that reads across the reset must notice.
        self.config_changed.store(true, Ordering::Release);
        self.transport.reset();
    }

    /// DEVICE_NEEDS_RESET, told to a driver that listens (section 2.1.2).
    fn needs_reset(&mut self) {
        self.broken = true;
        if let State::Running(_) = self.state {
            self.transport.deliver(Source::Config);
        }
    }

    /// The configuration atomicity value (section 2.5.1).
    pub(super) fn generation(&mut self) -> u32 {
        if self.config_changed.swap(false, Ordering::AcqRel) {
            self.generation = self.generation.wrapping_add(1);
        }
        self.generation
    }

    pub(super) fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.generation();
        data.fill(0);
        self.device.read_config(offset, data);
    }

    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        if matches!(self.state, State::FeaturesAgreed | State::Running(_)) {
            self.device.write_config(offset, data);
        }
    }

    /// Has the device stand still: when this returns it takes no chain, has none in flight, and hears
    /// of no event of its own while its driver has it running.
    pub(super) fn hold(&mut self, hold: Hold) {
        self.holds |= hold as u8;
        if let State::Running(active) = &mut self.state {
            self.device.drain(active);
        }
        if matches!(hold, Hold::Owner) {
            self.device.pause();
        }
    }

    /// Lets the device go on. Once nobody holds it, every queue is looked at: a notification may have
    /// come to nothing meanwhile.
    pub(super) fn release(&mut self, hold: Hold) {
        let held = self.holds != 0;
        self.holds &= !(hold as u8);
        if held && self.holds == 0 {
            let _ = self.released.write(1);
            self.ring_all();
        }
    }

    fn queue_event(&mut self, index: usize) {
        let Some(notifier) = self.notifiers.get(index) else { return };
        // Empty already where a reset or an earlier event has read it.
        let _ = notifier.read();
        self.work_on(index);
    }

    fn work_on(&mut self, index: usize) {
        let Some(notifier) = self.notifiers.get(index) else { return };
        let State::Running(active) = &mut self.state else { return };
        let is_ready = active.queues.get(index).is_some_and(ActiveQueue::is_ready);
        if self.broken || self.holds != 0 || !is_ready {
            return;
        }
        match self.device.queue_event(index, active) {
            Progress::Done => {}
            Progress::More => drop(notifier.write(1)),
            Progress::Broken => self.needs_reset(),
        }
    }

    fn own_event(&mut self, index: usize, ops: &mut EventOps) -> EventResult<()> {
        let active = match &mut self.state {
            State::Running(_) if self.holds != 0 => {
                if let Some(event) = self.own_events.get_mut(index).filter(|event| !event.waits) {
                    ops.remove(Events::empty_raw(event.descriptor))?;
                    event.waits = true;
                }
                return Ok(());
            }
            State::Running(active) if !self.broken => Some(active),
            _ => None,
        };
        self.device.own_event(index, active);
        Ok(())
    }

    /// As [`VirtioDevice::start`].
    pub(super) fn start(&mut self) -> io::Result<()> {
        self.device.start()
    }

    /// Watches the notifiers and the device's own descriptors from the start: a
    /// driver comes and goes without a word to the event loop.
    pub(super) fn watch(&mut self, ops: &mut EventOps) -> EventResult<()> {
        let own = self.own_events.iter().map(|event| event.descriptor);
        let notifiers = self.notifiers.iter().map(AsRawFd::as_raw_fd);
        let all = [self.released.as_raw_fd()].into_iter().chain(notifiers).chain(own);
        for (number, descriptor) in (0..).zip(all) {
            ops.add(Events::with_data_raw(descriptor, number, EventSet::IN))?;
        }
        Ok(())
    }

    /// Serves one of what [`watch`](Self::watch) watches.
    pub(super) fn process(&mut self, events: Events, ops: &mut EventOps) -> EventResult<()> {
        let Ok(number) = usize::try_from(events.data()) else { return Ok(()) };
        let Some(number) = number.checked_sub(1) else { return self.watch_again(ops) };
        match number.checked_sub(self.notifiers.len()) {
            None => self.queue_event(number),
            Some(own) => self.own_event(own, ops)?,
        }
        Ok(())
    }

    fn watch_again(&mut self, ops: &mut EventOps) -> EventResult<()> {
        let _ = self.released.read();
        let first = u32::try_from(1 + self.notifiers.len()).unwrap_or(u32::MAX);
        for (number, event) in (first..).zip(&mut self.own_events) {
            if std::mem::take(&mut event.waits) {
                ops.add(Events::with_data_raw(event.descriptor, number, EventSet::IN))?;
            }
        }
        Ok(())
    }
}
