//! virtio over memory-mapped registers, version 2 (virtio 1.2, section 4.2).
//!
//! Every register access comes from a vCPU that may be hostile: an access of an
//! odd width or place reads zero and writes nothing.

mod line;
mod saved;

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, Result as EventResult};
use virtio_bindings::virtio_mmio::*;
use vm_device::MutDeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::Transport;
use super::core::{Core, Half, Hold, QueueSetup};
use super::device::VirtioDevice;
use super::saved::VirtioState;
use crate::events::Subscriber;
use crate::state::StateError;
use line::Line;

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

/// One virtio device behind memory-mapped registers.
pub struct Mmio {
    core: Core,
    line: Arc<Line>,
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
        let line = Arc::new(Line::new(irq));
        Ok(Self { core: Core::new(device, memory, line.clone())?, line })
    }

    /// One a queue; a write to it does what a driver's write to QueueNotify does.
    pub fn notifiers(&self) -> &[EventFd] {
        self.core.notifiers()
    }

    /// Whether a driver's write to QueueNotify for this queue must come here: no notifier does the same.
    pub fn is_served_by_vcpu(&self, queue: usize) -> bool {
        self.core.is_served_by_vcpu(queue)
    }

    fn read_register(&mut self, register: u32) -> u32 {
        let core = &mut self.core;
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => core.device_id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => core.device_features(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => core.selected().map_or(0, |queue| u32::from(queue.max_size)),
            VIRTIO_MMIO_QUEUE_READY => u32::from(core.selected().is_some_and(QueueSetup::is_ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.line.read_reasons(),
            VIRTIO_MMIO_STATUS => core.status(),
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => NO_REGION,
            VIRTIO_MMIO_CONFIG_GENERATION => core.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        let core = &mut self.core;
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => core.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => core.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => core.write_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => core.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => core.notify(usize::try_from(value).unwrap_or(usize::MAX)),
            VIRTIO_MMIO_INTERRUPT_ACK => self.line.acknowledge(value),
            VIRTIO_MMIO_STATUS => core.write_status(value),
            VIRTIO_MMIO_QUEUE_READY if value == 0 => core.disable_queue(),
            VIRTIO_MMIO_QUEUE_READY => core.enable_queue(),
            _ => self.write_queue_setup(register, value),
        }
    }

    fn write_queue_setup(&mut self, register: u32, value: u32) {
        let Some(queue) = self.core.set_up() else { return };
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
}

impl MutDeviceMmio for Mmio {
    fn mmio_read(&mut self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.core.read_config(offset, data);
        }
        data.fill(0);
        // Registers are 4 bytes wide and aligned (section 4.2.2.2).
        if let (Ok(register), Ok(data)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
            *data = self.read_register(register).to_le_bytes();
        }
    }

    fn mmio_write(&mut self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.core.write_config(offset, data);
        }
        if let (Ok(register), Ok(data)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(register, u32::from_le_bytes(data));
        }
    }
}

impl Subscriber for Mmio {
    fn start(&mut self) -> io::Result<()> {
        self.core.start()
    }

    fn init(&mut self, ops: &mut EventOps) -> EventResult<()> {
        self.core.watch(ops)
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) -> EventResult<()> {
        self.core.process(events, ops)
    }
}

impl Transport for Mmio {
    fn drain(&mut self) {
        self.core.hold(Hold::Owner);
    }

    fn resume(&mut self) {
        self.core.release(Hold::Owner);
    }

    fn save(&self) -> Result<VirtioState, StateError> {
        self.core.save(self.state())
    }
}
