//! A device behind a PCI function, with a bus around it and a host that delivers its messages.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_mmio::*;
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::{DeviceMmio, DevicePio};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::GuestRam;
use super::registers::Registers;
use crate::pci::access::{BarWindow, CONFIG_PORTS, ConfigPorts, Ecam};
use crate::pci::{Bus, HostBridge, MsiMessage, MsiVectors};
use crate::state::StateError;
use crate::virtio::Transport;
use crate::virtio::device::VirtioDevice;
use crate::virtio::pci::{BAR_SIZE, NotifyAddresses, VirtioPci, vectors_wanted};
use crate::virtio::saved::VirtioState;

/// Where BARs may be: room for eight devices.
pub const WINDOW: std::ops::Range<u64> = 0x80_0000_0000..0x80_0000_0000 + 8 * BAR_SIZE;
/// Where the device's BAR is at first.
pub const BAR: u64 = WINDOW.start + BAR_SIZE;
/// The device's slot on the bus.
pub const SLOT: u8 = 1;

/// Configuration space of the device: Command, BAR 0, the capabilities pointer.
pub const COMMAND: u16 = 0x04;
/// BAR 0, of 64 bits.
pub const BAR0: u16 = 0x10;
/// Memory decoding and bus master, in Command.
pub const MEMORY_AND_MASTER: u16 = 0b110;

/// Message control of MSI-X: enabled, and all of the function masked.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// The function's mask.
pub const FUNCTION_MASK: u16 = 1 << 14;

/// Places in the BAR.
pub const ISR: u64 = 0x1000;
/// Device configuration.
pub const DEVICE_CONFIG: u64 = 0x2000;
/// Notifications.
pub const NOTIFY: u64 = 0x3000;
/// The MSI-X table.
pub const TABLE: u64 = 0x4000;
/// Its pending bits.
pub const PENDING: u64 = 0x5000;

/// What the host does with the messages of one function.
pub struct Host {
    events: Vec<EventFd>,
    /// The message of each vector that is unmasked.
    pub messages: Mutex<Vec<Option<MsiMessage>>>,
    /// Which queue's event each address is connected with.
    pub connected: Mutex<BTreeMap<u64, i32>>,
    /// Refuses what it is asked for, as a host without resources does.
    pub refuses: Mutex<bool>,
}

impl Host {
    fn new(vectors: u16) -> Arc<Self> {
        Arc::new(Self {
            events: (0..vectors).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
            messages: Mutex::new(vec![None; usize::from(vectors)]),
            connected: Mutex::default(),
            refuses: Mutex::default(),
        })
    }

    fn may(&self) -> io::Result<()> {
        if *self.refuses.lock().unwrap() { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }

    /// Messages that came through since the last call, by vector.
    pub fn delivered(&self) -> Vec<u64> {
        let messages = self.messages.lock().unwrap();
        let events = self.events.iter().zip(&*messages);
        events.map(|(event, message)| message.map_or(0, |_| event.read().unwrap_or(0))).collect()
    }
}

impl MsiVectors for Host {
    fn count(&self) -> u16 {
        self.events.len() as u16
    }

    fn event(&self, vector: u16) -> Option<&EventFd> {
        self.events.get(usize::from(vector))
    }

    fn unmask(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        self.may()?;
        self.messages.lock().unwrap()[usize::from(vector)] = Some(message);
        Ok(())
    }

    fn mask(&self, vector: u16) -> io::Result<()> {
        self.messages.lock().unwrap()[usize::from(vector)] = None;
        Ok(())
    }
}

impl NotifyAddresses for Host {
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.may()?;
        assert!(WINDOW.contains(&address), "{address:#x} is no place for a queue");
        let before = self.connected.lock().unwrap().insert(address, event.as_raw_fd());
        assert_eq!(before, None, "{address:#x} is connected twice");
        Ok(())
    }

    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        assert_eq!(self.connected.lock().unwrap().remove(&address), Some(event.as_raw_fd()));
        Ok(())
    }
}

/// A device behind a PCI function, and the bus that it is on.
pub struct PciRegisters {
    function: Arc<Mutex<VirtioPci>>,
    /// What the host does for it.
    pub host: Arc<Host>,
    /// The bus, to put more on.
    pub bus: Arc<Bus>,
    ecam: Ecam,
    ports: ConfigPorts,
    window: BarWindow,
    /// Where the driver has put the BAR.
    bar: u64,
}

impl PciRegisters {
    /// As after power-on: nothing is decoded.
    pub fn new(device: Box<dyn VirtioDevice>, ram: &GuestRam) -> Self {
        let host = Host::new(vectors_wanted(&*device));
        let function = VirtioPci::new(device, ram.memory.clone(), host.clone(), host.clone(), BAR).unwrap();
        Self::around(function, host)
    }

    fn around(function: VirtioPci, host: Arc<Host>) -> Self {
        let function = Arc::new(Mutex::new(function));
        let bus = Arc::new(Bus::new(WINDOW));
        bus.insert(0, Arc::new(Mutex::new(HostBridge::default()))).unwrap();
        bus.insert(SLOT, function.clone()).unwrap();
        Self {
            function,
            host,
            ecam: Ecam(bus.clone()),
            ports: ConfigPorts::new(bus.clone()),
            window: BarWindow(bus.clone()),
            bus,
            bar: BAR,
        }
    }

    /// Any access to configuration space by memory.
    pub fn ecam(&self) -> &Ecam {
        &self.ecam
    }

    /// Reads configuration space of the device.
    pub fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.ecam.mmio_read(MmioAddress(0), u64::from(SLOT) << 15 | u64::from(offset), data);
    }

    /// Writes configuration space of the device.
    pub fn write_config(&self, offset: u16, data: &[u8]) {
        self.ecam.mmio_write(MmioAddress(0), u64::from(SLOT) << 15 | u64::from(offset), data);
    }

    /// 16 bits of the device's configuration space.
    pub fn config_word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read_config(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// 32 bits of the device's configuration space.
    pub fn config_dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Any read of the configuration ports.
    pub fn read_port(&self, offset: u16, data: &mut [u8]) {
        self.ports.pio_read(PioAddress(CONFIG_PORTS), offset, data);
    }

    /// Any write to the configuration ports.
    pub fn write_port(&self, offset: u16, data: &[u8]) {
        self.ports.pio_write(PioAddress(CONFIG_PORTS), offset, data);
    }

    /// Any read of memory where BARs may be.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        self.window.mmio_read(MmioAddress(WINDOW.start), address - WINDOW.start, data);
    }

    /// Any write to memory where BARs may be.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        self.window.mmio_write(MmioAddress(WINDOW.start), address - WINDOW.start, data);
    }

    /// Puts BAR 0 somewhere, as Linux does: decoding off, both halves, decoding on.
    pub fn move_bar(&mut self, address: u64) {
        self.write_config(COMMAND, &(MEMORY_AND_MASTER & !0b10).to_le_bytes());
        self.write_config(BAR0, &(address as u32).to_le_bytes());
        self.write_config(BAR0 + 4, &((address >> 32) as u32).to_le_bytes());
        self.write_config(COMMAND, &MEMORY_AND_MASTER.to_le_bytes());
        self.bar = address;
    }

    /// The capability of this ID of whose fourth byte `is` says that it is the right one, by its place.
    pub fn capability(&self, id: u8, is: impl Fn(u8) -> bool) -> Option<u16> {
        let mut at = self.config_word(0x34) & 0xff;
        while at != 0 {
            let [found, next, _, kind] = self.config_dword(at).to_le_bytes();
            if found == id && is(kind) {
                return Some(at);
            }
            at = u16::from(next);
        }
        None
    }

    /// Writes message control of MSI-X.
    pub fn set_msix(&self, control: u16) {
        let at = self.capability(0x11, |_| true).expect("MSI-X");
        self.write_config(at + 2, &control.to_le_bytes());
    }

    /// Writes one entry of the MSI-X table.
    pub fn set_vector(&self, vector: u16, message: MsiMessage, masked: bool) {
        let entry = TABLE + 16 * u64::from(vector);
        // Masked first, as the message may not change while it can be sent.
        self.raw_write(entry + 12, &1u32.to_le_bytes());
        self.raw_write(entry, &message.address.to_le_bytes());
        self.raw_write(entry + 8, &message.data.to_le_bytes());
        self.raw_write(entry + 12, &u32::from(masked).to_le_bytes());
    }
}

/// Where the common configuration (virtio 1.2, section 4.1.4.3) has what a register of virtio-mmio
/// means, and how wide it is.
fn place(register: u32) -> Option<(u64, usize)> {
    Some(match register {
        VIRTIO_MMIO_DEVICE_FEATURES_SEL => (0x00, 4),
        VIRTIO_MMIO_DEVICE_FEATURES => (0x04, 4),
        VIRTIO_MMIO_DRIVER_FEATURES_SEL => (0x08, 4),
        VIRTIO_MMIO_DRIVER_FEATURES => (0x0c, 4),
        VIRTIO_MMIO_STATUS => (0x14, 1),
        VIRTIO_MMIO_CONFIG_GENERATION => (0x15, 1),
        VIRTIO_MMIO_QUEUE_SEL => (0x16, 2),
        VIRTIO_MMIO_QUEUE_NUM | VIRTIO_MMIO_QUEUE_NUM_MAX => (0x18, 2),
        VIRTIO_MMIO_QUEUE_READY => (0x1c, 2),
        VIRTIO_MMIO_QUEUE_DESC_LOW => (0x20, 4),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => (0x24, 4),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => (0x28, 4),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => (0x2c, 4),
        VIRTIO_MMIO_QUEUE_USED_LOW => (0x30, 4),
        VIRTIO_MMIO_QUEUE_USED_HIGH => (0x34, 4),
        VIRTIO_MMIO_INTERRUPT_STATUS => (ISR, 1),
        VIRTIO_MMIO_CONFIG.. => (DEVICE_CONFIG + u64::from(register - VIRTIO_MMIO_CONFIG), 4),
        _ => return None,
    })
}

impl Registers for PciRegisters {
    fn transport(&self) -> Arc<Mutex<dyn Transport>> {
        self.function.clone()
    }

    fn restore(
        &self,
        device: Box<dyn VirtioDevice>,
        ram: &GuestRam,
        state: VirtioState,
    ) -> Result<Box<dyn Registers>, StateError> {
        let host = Host::new(vectors_wanted(&*device));
        let function = VirtioPci::restore(device, ram.memory.clone(), host.clone(), host.clone(), state)?;
        Ok(Box::new(Self { bar: self.bar, ..Self::around(function, host) }))
    }

    fn open(&mut self) {
        *self.host.refuses.lock().unwrap() = false;
        self.move_bar(BAR);
    }

    fn ask_for_interrupts(&mut self, queues: usize) {
        self.set_msix(MSIX_ENABLE);
        for vector in 0..self.host.count() {
            let message = MsiMessage { address: 0xfee0_0000, data: u32::from(vector) + 0x30 };
            self.set_vector(vector, message, false);
        }
        self.host.delivered();
        self.raw_write(0x10, &0u16.to_le_bytes());
        for queue in 0..queues as u16 {
            self.write(VIRTIO_MMIO_QUEUE_SEL, u32::from(queue));
            self.raw_write(0x1a, &(queue + 1).to_le_bytes());
        }
    }

    fn raw_read(&self, offset: u64, data: &mut [u8]) {
        self.read_memory(self.bar.saturating_add(offset).max(WINDOW.start), data);
    }

    fn raw_write(&self, offset: u64, data: &[u8]) {
        self.write_memory(self.bar.saturating_add(offset).max(WINDOW.start), data);
    }

    fn read(&self, register: u32) -> u32 {
        let (offset, width) = place(register).expect("a register that PCI has too");
        let mut data = [0; 4];
        self.raw_read(offset, &mut data[..width]);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u32, value: u32) {
        match (register, place(register)) {
            // A queue has an address of its own, and MSI-X interrupts are not acknowledged.
            (VIRTIO_MMIO_QUEUE_NOTIFY, _) => {
                self.raw_write(NOTIFY + 4 * u64::from(value), &(value as u16).to_le_bytes());
            }
            (VIRTIO_MMIO_INTERRUPT_ACK, _) => {}
            (_, Some((offset, width))) => self.raw_write(offset, &value.to_le_bytes()[..width]),
            (_, None) => panic!("PCI has no register {register:#x}"),
        }
    }

    fn interrupts(&self) -> u64 {
        self.host.delivered().into_iter().sum()
    }

    fn pci(&mut self) -> Option<&mut PciRegisters> {
        Some(self)
    }
}
