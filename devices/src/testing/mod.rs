//! A guest for the tests of virtio devices: RAM between canaries, and a driver
//! that can be as honest or as hostile as a test wants. Panics where a test has failed.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod hostile;
pub mod note;

use std::ptr;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};
use virtio_bindings::virtio_mmio::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_device::MutDeviceMmio;
use vm_device::bus::MmioAddress;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::state::StateError;
use crate::virtio::device::VirtioDevice;
use crate::virtio::mmio::Mmio;
use crate::virtio::mmio::saved::MmioState;

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

const CANARY: usize = 16 << 10;
const CANARY_BYTE: u8 = 0xa5;
const ARENA: usize = 3 * CANARY + 2 * REGION;

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

/// RAM of a guest that lies between canaries in one mapping.
pub struct GuestRam {
    arena: *mut u8,
    /// The guest's view.
    pub memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the mapping belongs to this value, and only its owner changes what the pointer says.
unsafe impl Send for GuestRam {}

impl Default for GuestRam {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestRam {
    /// Two regions of zeros.
    pub fn new() -> Self {
        let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: a new anonymous mapping, wherever the kernel likes.
        let arena =
            unsafe { libc::mmap(ptr::null_mut(), ARENA, read_write, private | libc::MAP_ANONYMOUS, -1, 0) };
        assert_ne!(arena, libc::MAP_FAILED);
        let arena: *mut u8 = arena.cast();
        for canary in Self::canaries() {
            // SAFETY: inside the arena, which nobody else knows yet.
            unsafe { ptr::write_bytes(arena.add(canary), CANARY_BYTE, CANARY) };
        }
        let regions = Self::regions().map(|(guest, offset)| {
            // SAFETY: inside the arena, which lives as long as this value.
            let mapping = unsafe { MmapRegion::build_raw(arena.add(offset), REGION, read_write, private) };
            GuestRegionMmap::new(mapping.unwrap(), GuestAddress(guest)).unwrap()
        });
        let memory = Arc::new(GuestMemoryMmap::from_regions(regions.into()).unwrap());
        Self { arena, memory }
    }

    fn canaries() -> [usize; 3] {
        [0, CANARY + REGION, 2 * (CANARY + REGION)]
    }

    /// Guest address and offset in the arena of each region.
    fn regions() -> [(u64, usize); 2] {
        [(LOW, CANARY), (HIGH, 2 * CANARY + REGION)]
    }

    /// Panics where anything beside guest RAM was written or dropped.
    pub fn assert_canaries(&self) {
        for canary in Self::canaries() {
            // SAFETY: inside the arena, and canaries are only read after they were made.
            let bytes = unsafe { std::slice::from_raw_parts(self.arena.add(canary), CANARY) };
            assert!(bytes.iter().all(|byte| *byte == CANARY_BYTE), "memory outside the guest was touched");
        }
    }

    /// Where the byte at `guest` is mapped in this process.
    pub fn host(&self, guest: u64) -> *mut u8 {
        self.memory.get_host_address(GuestAddress(guest)).unwrap()
    }

    /// Whether the host has a page for the byte at `guest` (`mincore(2)`).
    pub fn resident(&self, guest: u64) -> bool {
        let page = self.host(guest & !4095);
        let mut resident = 0u8;
        // SAFETY: asks for one page inside the arena, one byte of answer.
        let result = unsafe { libc::mincore(page.cast(), 4096, &mut resident) };
        assert_eq!(result, 0);
        resident & 1 != 0
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; whoever kept a clone of `memory` past this broke the test.
        unsafe { libc::munmap(self.arena.cast(), ARENA) };
    }
}

/// A guest with one virtio-mmio device and its driver.
pub struct Guest {
    mmio: Arc<Mutex<Mmio>>,
    events: EventManager<Arc<Mutex<Mmio>>>,
    irq: EventFd,
    available: Vec<u16>,
    used: Vec<u16>,
    /// Dropped last: the device works in it.
    pub ram: GuestRam,
}

impl Guest {
    /// Puts the device that `make` makes for this RAM behind registers.
    pub fn new(make: impl FnOnce(&GuestRam) -> Box<dyn VirtioDevice>) -> Self {
        let ram = GuestRam::new();
        let device = make(&ram);
        let queues = device.queue_sizes().len();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let mmio = Mmio::new(device, ram.memory.clone(), irq.try_clone().unwrap()).unwrap();
        let mmio = Arc::new(Mutex::new(mmio));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(mmio.clone());
        Self { mmio, events, irq, available: vec![0; queues], used: vec![0; queues], ram }
    }

    /// The device's state, as it goes to another process.
    pub fn save(&self) -> Result<MmioState, StateError> {
        self.mmio.lock().unwrap().save()
    }

    /// The same guest with a new device that was restored from `state`.
    ///
    /// # Errors
    /// As [`Mmio::restore`].
    pub fn restore(self, device: Box<dyn VirtioDevice>, state: MmioState) -> Result<Self, StateError> {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let mmio = Mmio::restore(device, self.ram.memory.clone(), irq.try_clone().unwrap(), state)?;
        let mmio = Arc::new(Mutex::new(mmio));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(mmio.clone());
        Ok(Self { mmio, events, irq, ..self })
    }

    /// How many queues the device has.
    pub fn queues(&self) -> usize {
        self.available.len()
    }

    /// Any read of the window.
    pub fn raw_read(&self, offset: u64, data: &mut [u8]) {
        self.mmio.lock().unwrap().mmio_read(MmioAddress(0), offset, data);
    }

    /// Any write to the window.
    pub fn raw_write(&self, offset: u64, data: &[u8]) {
        self.mmio.lock().unwrap().mmio_write(MmioAddress(0), offset, data);
    }

    /// A register, or 4 bytes of the configuration space from 0x100 on.
    pub fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.raw_read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    /// A register, or 4 bytes of the configuration space from 0x100 on.
    pub fn write(&self, register: u32, value: u32) {
        self.raw_write(u64::from(register), &value.to_le_bytes());
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
        self.reset();
        assert_eq!(self.status(), 0);
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
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn queue_base(&self, index: usize) -> GuestAddress {
        GuestAddress(QUEUES + QUEUE_STRIDE * index as u64)
    }

    /// The largest size of queue `index`.
    pub fn size(&self, index: usize) -> u16 {
        self.write(VIRTIO_MMIO_QUEUE_SEL, index as u32);
        self.read(VIRTIO_MMIO_QUEUE_NUM_MAX) as u16
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
            match self.events.run_with_timeout(0).unwrap() {
                0 => return events,
                more => events += more,
            }
            assert!(events < MOST_EVENTS, "the device does not come to rest");
        }
    }

    /// Waits for an event of the device's own and lets it work; returns whether one came in `milliseconds`.
    pub fn wait(&mut self, milliseconds: i32) -> bool {
        self.events.run_with_timeout(milliseconds).unwrap() > 0
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
        self.irq.read().unwrap_or(0)
    }
}
