//! virtio over memory-mapped registers, version 2 (virtio 1.2, section 4.2).
//!
//! Every register access comes from a vCPU that may be hostile: an access of an
//! odd width or place reads zero and writes nothing, a write that the protocol
//! forbids at this moment is ignored, and a reset (zero to Status) works always.

mod interrupt;
pub mod saved;
mod setup;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_device::MutDeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Active, Progress, VirtioDevice};
use interrupt::Line;
use setup::{Half, QueueSetup};

/// Bytes of guest address space that one device takes.
pub const WINDOW: u64 = 0x1000;

/// Where in the window the driver writes a queue's index to notify it: wired
/// as an ioeventfd of 4 bytes with the index as datamatch.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// Where in the window the driver acknowledges interrupts. A write of [`ACK_USED`] does nothing,
/// so it may be wired past this process: half of what an interrupt costs.
pub const INTERRUPT_ACK: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;

/// The acknowledgement of used buffers alone (section 4.2.2).
pub const ACK_USED: u32 = VIRTIO_MMIO_INT_VRING;

/// "virt", little-endian (section 4.2.2).
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Says nothing to drivers; Linux only shows it.
const VENDOR: u32 = u32::from_le_bytes(*b"blst");
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
/// What the length of a shared memory region that does not exist reads as (section 4.2.2).
const NO_REGION: u32 = u32::MAX;

/// What the transport itself offers, for every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// How far a driver has come with the device (virtio 1.2, section 3.1.1).
enum State {
    Reset,
    Acknowledged,
    Driver,
    FeaturesAgreed,
    Running(Active),
    /// The driver gave up (FAILED) in the state whose Status bits are kept.
    Failed(u32),
}

impl State {
    /// The Status register (section 2.1), less DEVICE_NEEDS_RESET.
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

/// One virtio device behind memory-mapped registers.
pub struct Mmio {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemoryMmap>,
    line: Arc<Line>,
    notifiers: Vec<EventFd>,
    own_events: Vec<RawFd>,
    state: State,
    queues: Vec<QueueSetup>,
    queue_select: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
}

impl Mmio {
    /// Puts `device` behind registers. `irq` is written once for each edge of its interrupt line.
    ///
    /// # Errors
    /// No eventfd can be had, or a queue's largest size is not a power of two up to 32768.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        irq: EventFd,
    ) -> io::Result<Self> {
        let queues: Vec<_> = device.queue_sizes().iter().copied().map(QueueSetup::new).collect();
        for queue in &queues {
            Queue::new(queue.max_size)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
        }
        let notifiers =
            queues.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<_>>()?;
        Ok(Self {
            own_events: device.own_events(),
            device,
            memory,
            line: Arc::new(Line::new(irq)),
            notifiers,
            state: State::Reset,
            queues,
            queue_select: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
        })
    }

    /// One a queue; a write to it does what a driver's write to QueueNotify does.
    pub fn notifiers(&self) -> &[EventFd] {
        &self.notifiers
    }

    /// Whether a driver's write to QueueNotify for this queue must come here: no notifier does the same.
    pub fn is_served_by_vcpu(&self, queue: usize) -> bool {
        self.device.is_served_by_vcpu(queue)
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn status(&self) -> u32 {
        let broken = if self.line.is_broken() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
        self.state.status() | broken
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn queue_ready(&self) -> bool {
        match &self.state {
            State::Running(active) => {
                let index = usize::try_from(self.queue_select).unwrap_or(usize::MAX);
                active.queues.get(index).is_some_and(Queue::ready)
            }
            _ => self.selected().is_some_and(QueueSetup::is_ready),
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |queue| u32::from(queue.max_size)),
            VIRTIO_MMIO_QUEUE_READY => u32::from(self.queue_ready()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.line.read_reasons(),
            VIRTIO_MMIO_STATUS => self.status(),
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => NO_REGION,
            VIRTIO_MMIO_CONFIG_GENERATION => self.line.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.line.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(value),
            _ => self.write_queue_setup(register, value),
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        if !matches!(self.state, State::Acknowledged | State::Driver) {
            return;
        }
        let half = match self.driver_features_select {
            0 => Half::Low,
            1 => Half::High,
            _ => return,
        };
        half.put(&mut self.driver_features, value);
    }

    /// Wakes the device's event loop, for queues that the vCPU itself does not serve.
    fn notify(&mut self, queue: u32) {
        let Ok(index) = usize::try_from(queue) else { return };
        if let Some(notifier) = self.notifiers.get(index) {
            if self.device.is_served_by_vcpu(index) {
                return self.work_on(index);
            }
            // The one failure is a full counter, which is a notification already pending.
            let _ = notifier.write(1);
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let now = self.state.status();
        // The driver may not clear a bit but all of them (section 2.1.1).
        if value & now != now {
            return;
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            return self.fail(now);
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
                State::FeaturesAgreed if has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.line.is_broken() => {
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
        self.line.set_driver_ok();
        self.device.activate(&mut active);
        self.state = State::Running(active);
        // Linux's balloon driver fills its statistics queue before DRIVER_OK,
        // when notifications count for nothing: look at every queue once.
        self.ring_all();
    }

    /// As if the driver had notified every queue.
    fn ring_all(&self) {
        for notifier in &self.notifiers {
            let _ = notifier.write(1);
        }
    }

    fn fail(&mut self, status: u32) {
        if let State::Running(_) = self.state {
            self.device.reset();
        }
        self.state = State::Failed(status);
    }

    fn reset(&mut self) {
        self.device.reset();
        self.state = State::Reset;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
        self.queue_select = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.line.reset();
    }

    fn write_queue_ready(&mut self, value: u32) {
        let Ok(index) = usize::try_from(self.queue_select) else { return };
        match &mut self.state {
            State::Running(active) => {
                // A running queue can be stopped (section 4.2.2), not started.
                if let (Some(queue), 0) = (active.queues.get_mut(index), value) {
                    queue.set_ready(false);
                }
            }
            State::FeaturesAgreed => {
                let others = self.queues.iter().enumerate();
                let ready = others.filter(|(other, queue)| *other != index && queue.is_ready());
                let taken: Vec<_> = ready.flat_map(|(_, queue)| queue.areas()).collect();
                let Some(queue) = self.queues.get_mut(index) else { return };
                match value {
                    0 => queue.disable(),
                    _ if queue.enable(&self.memory, &taken) => {}
                    _ => self.line.needs_reset(),
                }
            }
            _ => {}
        }
    }

    fn write_queue_setup(&mut self, register: u32, value: u32) {
        if !matches!(self.state, State::FeaturesAgreed) {
            return;
        }
        let Ok(index) = usize::try_from(self.queue_select) else { return };
        // A queue that is ready stays as it was checked (section 4.2.2.2).
        let Some(queue) = self.queues.get_mut(index).filter(|queue| !queue.is_ready()) else { return };
        match register {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => Half::Low.put(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => Half::High.put(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => Half::Low.put(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => Half::High.put(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => Half::Low.put(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => Half::High.put(&mut queue.used, value),
            _ => {}
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
        if self.line.is_broken() || !active.queues.get(index).is_some_and(Queue::ready) {
            return;
        }
        match self.device.queue_event(index, active) {
            Progress::Done => {}
            Progress::More => drop(notifier.write(1)),
            Progress::Broken => self.line.needs_reset(),
        }
    }

    fn own_event(&mut self, index: usize) {
        let active = match &mut self.state {
            State::Running(active) if !self.line.is_broken() => Some(active),
            _ => None,
        };
        self.device.own_event(index, active);
    }
}

impl MutDeviceMmio for Mmio {
    fn mmio_read(&mut self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.device.read_config(offset, data);
        }
        // Registers are 4 bytes wide and aligned (section 4.2.2.2).
        if let (Ok(register), Ok(data)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
            *data = self.read_register(register).to_le_bytes();
        }
    }

    fn mmio_write(&mut self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            if matches!(self.state, State::FeaturesAgreed | State::Running(_)) {
                self.device.write_config(offset, data);
            }
            return;
        }
        if let (Ok(register), Ok(data)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(register, u32::from_le_bytes(data));
        }
    }
}

/// Watches the notifiers and the device's own descriptors from the start: a
/// driver comes and goes without a word to the event loop.
impl MutEventSubscriber for Mmio {
    fn init(&mut self, ops: &mut EventOps) {
        let descriptors =
            self.notifiers.iter().map(AsRawFd::as_raw_fd).chain(self.own_events.iter().copied());
        for (number, descriptor) in (0u32..).zip(descriptors) {
            if let Err(error) = ops.add(Events::with_data_raw(descriptor, number, EventSet::IN)) {
                tracing::error!("virtio device {}: can't watch an event: {error}", self.device.device_id());
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let Ok(number) = usize::try_from(events.data()) else { return };
        match number.checked_sub(self.notifiers.len()) {
            None => self.queue_event(number),
            Some(own) => self.own_event(own),
        }
    }
}
