//! The registers as a test's driver reaches them, whatever transport carries the device.

use std::sync::{Arc, Mutex};

use vm_device::MutDeviceMmio;
use vm_device::bus::MmioAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::GuestRam;
use super::pci::PciRegisters;
use crate::state::StateError;
use crate::virtio::Transport;
use crate::virtio::device::VirtioDevice;
use crate::virtio::mmio::Mmio;
use crate::virtio::saved::VirtioState;

/// One transport's side of the driver.
pub(super) trait Registers {
    fn transport(&self) -> Arc<Mutex<dyn Transport>>;

    /// The same registers with a new device that was restored from `state`.
    fn restore(
        &self,
        device: Box<dyn VirtioDevice>,
        ram: &GuestRam,
        state: VirtioState,
    ) -> Result<Box<dyn Registers>, StateError>;

    /// Makes the registers reachable, whatever was before.
    fn open(&mut self);
    /// Has the device interrupt for each of its queues and for its configuration.
    fn ask_for_interrupts(&mut self, queues: usize);

    fn raw_read(&self, offset: u64, data: &mut [u8]);
    fn raw_write(&self, offset: u64, data: &[u8]);
    fn read(&self, register: u32) -> u32;
    fn write(&self, register: u32, value: u32);

    /// Interrupts that came through since the last call.
    fn interrupts(&self) -> u64;

    fn pci(&mut self) -> Option<&mut PciRegisters> {
        None
    }
}

/// A device behind memory-mapped registers.
pub(super) struct MmioRegisters {
    mmio: Arc<Mutex<Mmio>>,
    irq: EventFd,
}

impl MmioRegisters {
    pub(super) fn new(device: Box<dyn VirtioDevice>, ram: &GuestRam) -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let mmio = Mmio::new(device, ram.memory.clone(), irq.try_clone().unwrap()).unwrap();
        Self { mmio: Arc::new(Mutex::new(mmio)), irq }
    }
}

impl Registers for MmioRegisters {
    fn transport(&self) -> Arc<Mutex<dyn Transport>> {
        self.mmio.clone()
    }

    fn restore(
        &self,
        device: Box<dyn VirtioDevice>,
        ram: &GuestRam,
        state: VirtioState,
    ) -> Result<Box<dyn Registers>, StateError> {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let mmio = Mmio::restore(device, ram.memory.clone(), irq.try_clone().unwrap(), state)?;
        Ok(Box::new(Self { mmio: Arc::new(Mutex::new(mmio)), irq }))
    }

    fn open(&mut self) {}

    fn ask_for_interrupts(&mut self, _queues: usize) {}

    fn raw_read(&self, offset: u64, data: &mut [u8]) {
        self.mmio.lock().unwrap().mmio_read(MmioAddress(0), offset, data);
    }

    fn raw_write(&self, offset: u64, data: &[u8]) {
        self.mmio.lock().unwrap().mmio_write(MmioAddress(0), offset, data);
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.raw_read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u32, value: u32) {
        self.raw_write(u64::from(register), &value.to_le_bytes());
    }

    fn interrupts(&self) -> u64 {
        self.irq.read().unwrap_or(0)
    }
}
