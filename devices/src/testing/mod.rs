//! A guest for the tests of virtio devices: RAM between canaries, and a driver
//! that can be as honest or as hostile as a test wants. Panics where a test has failed.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod hostile;
pub mod huge_pages;
pub mod note;
pub mod pci;
mod ram;
mod registers;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use crate::events::EventLoop;
use crate::state::StateError;
use crate::virtio::Transport;
use crate::virtio::device::VirtioDevice;
use crate::virtio::saved::VirtioState;
use pci::PciRegisters;
pub use ram::GuestRam;
use registers::{MmioRegisters, Registers};

/// Bytes in each of the two regions of RAM.
pub const REGION: usize = 1 << 20;
/// Where the guest sees the first region.
pub const LOW: u64 = 0;
/// Where the guest sees the second region, beyond a hole.
pub const HIGH: u64 = 4 << 30;
/// Where the rings of queue 0 stand; each queue has [`QUEUE_STRIDE`] bytes.
pub const QUEUES: u64 = 0x1_0000;
/// From one queue's rings to the next one's.
pub const QUEUE_STRIDE: u64 = 0x1_0000;
/// Guest memory from here to the end of the first region is free for buffers.
pub const BUFFERS: u64 = 0x8_0000;

/// Status of a driver that has come all the way.
pub const RUNNING: u32 = 15;
/// DEVICE_NEEDS_RESET in Status.
pub const NEEDS_RESET: u32 = 64;

/// Events after which a device that still isn't quiet counts as spinning: every
/// queue full, one chain an event.
const MOST_EVENTS: usize = 1000;

/// Guest addresses of one queue's parts.
#[derive(Clone, Copy, Debug)]
pub struct Rings {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// Which transport carries the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Memory-mapped registers.
    Mmio,
    /// A PCI function with MSI-X.
    Pci,
}

/// All of them.
pub const CARRIERS: [Carrier; 2] = [Carrier::Mmio, Carrier::Pci];

/// A guest with one virtio device and its driver.
///
/// Registers go by their names in virtio-mmio (virtio 1.2, section 4.2.2), on PCI too: there the
/// driver finds what has the same meaning.
pub struct Guest {
    registers: Box<dyn Registers>,
    events: EventLoop,
    sizes: Vec<u16>,
    available: Vec<u16>,
    used: Vec<u16>,
    /// Dropped last: the device works in it.
    pub ram: GuestRam,
}

fn watch(registers: &dyn Registers) -> EventLoop {
    let mut events = EventLoop::new(64).unwrap();
    events.add(registers.transport()).unwrap();
    events
}

impl Guest {
    /// Puts the device that `make` makes for this RAM behind memory-mapped registers.
    pub fn new(make: impl FnOnce(&GuestRam) -> Box<dyn VirtioDevice>) -> Self {
        Self::on(Carrier::Mmio, make)
    }

    /// Puts the device that `make` makes for this RAM behind registers that the driver can reach.
    pub fn on(carrier: Carrier, make: impl FnOnce(&GuestRam) -> Box<dyn VirtioDevice>) -> Self {
        let ram = GuestRam::new();
        let device = make(&ram);
        let sizes = device.queue_sizes().to_vec();
        let mut registers: Box<dyn Registers> = match carrier {
            Carrier::Mmio => Box::new(MmioRegisters::new(device, &ram)),
            Carrier::Pci => Box::new(PciRegisters::new(device, &ram)),
        };
        registers.open();
        let events = watch(&*registers);
        Self { registers, events, available: vec![0; sizes.len()], used: vec![0; sizes.len()], sizes, ram }
    }

    /// The device's state, as it goes to another process.
    ///
    /// # Errors
    /// As [`Transport::save`].
    pub fn save(&self) -> Result<VirtioState, StateError> {
        self.transport().lock().unwrap().save()
    }

    /// The same guest with a new device that was restored from `state`.
    ///
    /// # Errors
    /// As the transport's.
    pub fn restore(self, device: Box<dyn VirtioDevice>, state: VirtioState) -> Result<Self, StateError> {
        let registers = self.registers.restore(device, &self.ram, state)?;
        Ok(Self { events: watch(&*registers), registers, ..self })
    }

    /// The device, as its owner sees it.
    pub fn transport(&self) -> Arc<Mutex<dyn Transport>> {
        self.registers.transport()
    }

    /// What is special to PCI, where the device is carried by it.
    pub fn pci(&mut self) -> Option<&mut PciRegisters> {
        self.registers.pci()
    }

    /// How many queues the device has.
    pub fn queues(&self) -> usize {
        self.available.len()
    }

    /// Any read of the window, or of the BAR.
    pub fn raw_read(&self, offset: u64, data: &mut [u8]) {
        self.registers.raw_read(offset, data);
    }

    /// Any write to the window, or to the BAR.
    pub fn raw_write(&self, offset: u64, data: &[u8]) {
        self.registers.raw_write(offset, data);
    }

    /// A register, or 4 bytes of the configuration space from 0x100 on.
    pub fn read(&self, register: u32) -> u32 {
        self.registers.read(register)
    }

    /// A register, or 4 bytes of the configuration space from 0x100 on.
    pub fn write(&self, register: u32, value: u32) {
        self.registers.write(register, value);
    }

    /// The Status register.
    pub fn status(&self) -> u32 {
        self.read(VIRTIO_MMIO_STATUS)
    }

    /// Writes zero to Status and forgets what the driver knew of its queues.
    pub fn reset(&mut self) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.available.fill(0);
        self.used.fill(0);
        for index in 0..self.queues() {
            self.ram.memory.write_slice(&[0; QUEUE_STRIDE as usize], self.queue_base(index)).unwrap();
        }
    }

    /// Takes the device from reset to DRIVER_OK with every feature it offers but `refused`.
    pub fn start(&mut self, refused: u64) {
        self.agree(refused);
        for index in 0..self.queues() {
            self.set_up(index);
            assert_eq!(self.read(VIRTIO_MMIO_QUEUE_READY), 1, "queue {index}");
        }
        self.write(VIRTIO_MMIO_STATUS, RUNNING);
        assert_eq!(self.status(), RUNNING);
    }

    /// Takes the device from reset to FEATURES_OK.
    pub fn agree(&mut self, refused: u64) {
        self.registers.open();
        self.reset();
        assert_eq!(self.status(), 0);
        self.registers.ask_for_interrupts(self.queues());
        self.write(VIRTIO_MMIO_STATUS, 1);
        self.write(VIRTIO_MMIO_STATUS, 3);
        let features = self.offered() & !refused;
        for (select, half) in [features as u32, (features >> 32) as u32].into_iter().enumerate() {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select as u32);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.write(VIRTIO_MMIO_STATUS, 11);
        assert_eq!(self.status(), 11);
    }

    /// What the device offers.
    pub fn offered(&self) -> u64 {
        [0u32, 1].into_iter().fold(0, |features, select| {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            features | u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES)) << (32 * select)
        })
    }

    /// Describes queue `index` at its usual place, at its largest size, and enables it.
    pub fn set_up(&self, index: usize) {
        self.lay_out(index);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Describes queue `index` at its usual place, at its largest size.
    pub fn lay_out(&self, index: usize) {
        let rings = self.rings(index);
        self.write(VIRTIO_MMIO_QUEUE_SEL, index as u32);
        self.write(VIRTIO_MMIO_QUEUE_NUM, u32::from(self.size(index)));
        for (register, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, rings.descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, rings.available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, rings.used),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
    }

    fn queue_base(&self, index: usize) -> GuestAddress {
        GuestAddress(QUEUES + QUEUE_STRIDE * index as u64)
    }

    /// The largest size of queue `index`.
    pub fn size(&self, index: usize) -> u16 {
        self.sizes[index]
    }

    /// Where the rings of queue `index` stand: as close together as they may (section 2.7.2).
    pub fn rings(&self, index: usize) -> Rings {
        let size = u64::from(self.size(index));
        let descriptors = self.queue_base(index).0;
        let available = descriptors + 16 * size;
        let used = (available + 6 + 2 * size).next_multiple_of(4);
        Rings { descriptors, available, used }
    }

    /// Writes one descriptor of queue `index`.
    pub fn describe(&self, index: usize, place: u16, address: u64, len: u32, flags: u32, next: u16) {
        let table = self.rings(index).descriptors;
        self.describe_at(table + 16 * u64::from(place), address, len, flags, next);
    }

    /// Writes one descriptor anywhere, as indirect tables need.
    pub fn describe_at(&self, place: u64, address: u64, len: u32, flags: u32, next: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags as u16, next));
        self.ram.memory.write_obj(descriptor, GuestAddress(place)).unwrap();
    }

    /// Makes the chain at descriptor `head` available, without a notification.
    pub fn offer(&mut self, index: usize, head: u16) {
        let size = self.size(index);
        let at = self.available[index];
        let ring = self.rings(index).available;
        self.store(ring + 4 + 2 * u64::from(at % size), head);
        self.set_available(index, at.wrapping_add(1));
    }

    /// Writes the available index as it is, however wrong.
    pub fn set_available(&mut self, index: usize, value: u16) {
        self.available[index] = value;
        self.store(self.rings(index).available + 2, value);
    }

    fn store(&self, address: u64, value: u16) {
        self.ram.memory.write_obj(value.to_le(), GuestAddress(address)).unwrap();
    }

    /// Makes a chain available and lets the device work until it is quiet.
    pub fn send(&mut self, index: usize, head: u16) {
        self.offer(index, head);
        self.notify(index);
    }

    /// Notifies queue `index` and lets the device work until it is quiet.
    pub fn notify(&mut self, index: usize) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, index as u32);
        self.run();
    }

    /// Lets the device work until it is quiet; returns how many events that took.
    pub fn run(&mut self) -> usize {
        let mut events = 0;
        loop {
            match self.events.run(0).unwrap() {
                0 => return events,
                more => events += more,
            }
            assert!(events < MOST_EVENTS, "the device does not come to rest");
        }
    }

    /// Waits for an event of the device's own and lets it work; returns whether one came in `milliseconds`.
    pub fn wait(&mut self, milliseconds: u32) -> bool {
        let until = Instant::now() + Duration::from_millis(milliseconds.into());
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // The kernel cuts a wait short when io_uring has done something.
            let events = self.events.run(i32::try_from(left.as_millis()).unwrap_or(i32::MAX)).unwrap();
            if events > 0 || left.is_zero() {
                return events > 0;
            }
        }
    }

    /// Used buffers since the last call: the head and the bytes written, of queue `index`.
    pub fn used(&mut self, index: usize) -> Vec<(u32, u32)> {
        let size = self.size(index);
        let ring = self.rings(index).used;
        let memory = &self.ram.memory;
        let end = u16::from_le(memory.read_obj(GuestAddress(ring + 2)).unwrap());
        let mut used = Vec::new();
        while self.used[index] != end {
            let entry = ring + 4 + 8 * u64::from(self.used[index] % size);
            let [head, len]: [u32; 2] = memory.read_obj(GuestAddress(entry)).unwrap();
            used.push((u32::from_le(head), u32::from_le(len)));
            self.used[index] = self.used[index].wrapping_add(1);
        }
        used
    }

    /// Interrupts since the last call.
    pub fn interrupts(&self) -> u64 {
        self.registers.interrupts()
    }
}
