//! The ways from a vCPU's access to the bus: each goes on the machine's bus of memory or ports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_device::bus::{MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};
use vm_device::{DeviceMmio, DevicePio};

use super::{Bus, SLOTS};

/// Guest physical addresses that [`Ecam`] takes for its one bus (PCI Firmware 3.2, section 4.1.2).
pub const ECAM_SIZE: u64 = 1 << 20;

/// The first of the ports that [`ConfigPorts`] answers (PCI 3.0, section 3.2.2.3.2).
pub const CONFIG_PORTS: u16 = 0xcf8;
/// How many they are.
pub const CONFIG_PORT_COUNT: u16 = 8;

/// CONFIG_ADDRESS is at the first port, and the four bytes of CONFIG_DATA from here on.
const DATA: u16 = 4;
const ENABLE: u32 = 1 << 31;

/// Configuration space as memory: the enhanced configuration access mechanism (PCI Express 3.0,
/// section 7.2.2) of bus 0, in [`ECAM_SIZE`] bytes.
pub struct Ecam(pub Arc<Bus>);

/// Slot and register of an offset, of function 0 on bus 0.
fn ecam_target(offset: u64) -> Option<(usize, u16)> {
    let (bus, slot, function) = (offset >> 20, offset >> 15 & 0x1f, offset >> 12 & 7);
    let register = u16::try_from(offset & 0xfff).ok()?;
    (bus == 0 && function == 0).then_some((usize::try_from(slot).ok()?, register))
}

impl DeviceMmio for Ecam {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        match ecam_target(offset) {
            Some((slot, register)) => self.0.read_config(slot, register, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if let Some((slot, register)) = ecam_target(offset) {
            self.0.write_config(slot, register, data);
        }
    }
}

/// Configuration space through ports, 256 bytes of each function: CONFIG_ADDRESS, which takes
/// accesses of 4 bytes only, and CONFIG_DATA, whose parts can be accessed one by one.
pub struct ConfigPorts {
    bus: Arc<Bus>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// As after power-on: no address is set.
    pub fn new(bus: Arc<Bus>) -> Self {
        Self::restore(bus, 0)
    }

    /// CONFIG_ADDRESS.
    pub fn save(&self) -> u32 {
        self.address.load(Ordering::Acquire)
    }

    /// With what [`save`](Self::save) gave.
    pub fn restore(bus: Arc<Bus>, address: u32) -> Self {
        let this = Self { bus, address: AtomicU32::new(0) };
        this.set_address(address);
        this
    }

    /// Bits 24 to 30, and the lowest two, read as zero.
    fn set_address(&self, value: u32) {
        self.address.store(value & 0x80ff_fffc, Ordering::Release);
    }

    /// Slot and register that an access to CONFIG_DATA means, if it is of a function 0 on bus 0.
    fn target(&self, port: u16) -> Option<(usize, u16)> {
        let address = self.address.load(Ordering::Acquire);
        let (bus, slot, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
        let register = u16::try_from(address & 0xfc).ok()?.checked_add(port.checked_sub(DATA)?)?;
        let is_there = address & ENABLE != 0 && bus == 0 && function == 0 && slot < u32::from(SLOTS);
        is_there.then_some((usize::try_from(slot).ok()?, register))
    }
}

impl DevicePio for ConfigPorts {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *data = self.address.load(Ordering::Acquire).to_le_bytes();
            return;
        }
        match self.target(offset) {
            Some((slot, register)) => self.bus.read_config(slot, register, data),
            None => data.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let (0, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            return self.set_address(u32::from_le_bytes(data));
        }
        if let Some((slot, register)) = self.target(offset) {
            self.bus.write_config(slot, register, data);
        }
    }
}

/// The window in which BARs lie: registered once, from [`Bus::window`]'s start to its end. Accesses
/// find whatever BAR is there at the moment.
pub struct BarWindow(pub Arc<Bus>);

impl DeviceMmio for BarWindow {
    fn mmio_read(&self, base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        self.0.read_memory(base.0.saturating_add(offset), data);
    }

    fn mmio_write(&self, base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        self.0.write_memory(base.0.saturating_add(offset), data);
    }
}
