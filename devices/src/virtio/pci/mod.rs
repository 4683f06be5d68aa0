//! virtio over PCI (virtio 1.2, section 4.1): a function that a modern driver finds, with all its
//! registers in one BAR.
//!
//! Every access comes from a vCPU that may be hostile: one of an odd width or place reads zero and
//! writes nothing. There is no interrupt pin, only MSI-X.

mod common;
pub(super) mod saved;
mod vectors;

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, Result as EventResult};
use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_FS, VIRTIO_ID_NET, VIRTIO_ID_SCSI, VIRTIO_ID_VSOCK,
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::Transport;
use super::core::{Core, Hold};
use super::device::VirtioDevice;
use super::saved::VirtioState;
use crate::events::Subscriber;
use crate::pci::msix::{CONTROL, ENTRY};
use crate::pci::{BarRange, ConfigSpace, Function, Identity, MsiVectors, Msix};
use crate::state::StateError;
use vectors::Vectors;

/// Bytes of guest address space that one device takes, in BAR 0 and aligned to as much.
pub const BAR_SIZE: u64 = 0x8000;

/// Vectors of one device at most: its table has one page.
pub const MOST_VECTORS: u16 = 256;

// What is where in the BAR: each part has a page.
const BAR: u8 = 0;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const END: u64 = 0x6000;

/// From one queue's notification address to the next one's (notify_off_multiplier, section 4.1.4.4).
const NOTIFY_STRIDE: u64 = 4;

/// Section 4.1.2.
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// Not a transitional device.
const REVISION: u8 = 1;

// Capabilities (section 4.1.4): the ID, and what cfg_type says.
const VENDOR_CAPABILITY: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

// Fields of VIRTIO_PCI_CAP_PCI_CFG (section 4.1.4.9), from the capability's start.
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

/// Connects the addresses at which a driver notifies queues with their events, past this process.
///
/// Called with the function's lock held.
pub trait NotifyAddresses: Send + Sync {
    /// Has every write at `address`, of any width and value, write to `event`.
    ///
    /// # Errors
    /// The host can't: notifications reach the function itself then, which does the same.
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Undoes [`connect`](Self::connect).
    ///
    /// # Errors
    /// The host can't.
    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// How many vectors a device can use: one for each queue, and one for changes of its configuration.
pub fn vectors_wanted(device: &dyn VirtioDevice) -> u16 {
    u16::try_from(device.queue_sizes().len().saturating_add(1)).unwrap_or(u16::MAX).min(MOST_VECTORS)
}

/// One virtio device behind a PCI function.
pub struct VirtioPci {
    core: Core,
    vectors: Arc<Vectors>,
    msix: Msix,
    config: ConfigSpace,
    /// Where these capabilities stand in configuration space.
    msix_at: u16,
    window_at: u16,
    notify: Arc<dyn NotifyAddresses>,
    /// Where each queue's notifications are connected.
    connected: Vec<Option<u64>>,
}

impl VirtioPci {
    /// Puts `device` behind a function whose BAR 0 is at `bar`, a multiple of [`BAR_SIZE`], until the
    /// guest moves it. It decodes nothing before the guest tells it to.
    ///
    /// # Errors
    /// No eventfd can be had, a queue's largest size is not a power of two up to 32768, or there are
    /// too many queues or vectors, or no vector at all.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        msi: Arc<dyn MsiVectors>,
        notify: Arc<dyn NotifyAddresses>,
        bar: u64,
    ) -> io::Result<Self> {
        let queues = device.queue_sizes().len();
        if queues > usize::from(MOST_VECTORS) || !(1..=MOST_VECTORS).contains(&msi.count()) {
            let error =
                format!("a virtio device has {queues} queues and {} vectors, of {MOST_VECTORS}", msi.count());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let vectors = Arc::new(Vectors::new(msi.clone(), queues));
        let mut core = Core::new(device, memory, vectors.clone())?;
        core.hold(Hold::BusMaster);
        let msix = Msix::new(msi);
        let mut config = ConfigSpace::new(identity(core.device_id()));
        config.add_bar(usize::from(BAR), BAR_SIZE, bar);
        let msix_at = msix.add_capability(&mut config, BAR, TABLE as u32, PENDING as u32);
        let notify_size = NOTIFY_STRIDE as u32 * queues.max(1) as u32;
        add_structure(&mut config, COMMON_CFG, COMMON, common::SIZE, None);
        add_structure(&mut config, NOTIFY_CFG, NOTIFY, notify_size, Some(NOTIFY_STRIDE as u32));
        add_structure(&mut config, ISR_CFG, ISR, 1, None);
        add_structure(&mut config, DEVICE_CFG, CONFIG, (NOTIFY - CONFIG) as u32, None);
        let window_at = add_window(&mut config);
        Ok(Self { core, vectors, msix, config, msix_at, window_at, notify, connected: vec![None; queues] })
    }

    /// One a queue; a write to it does what the driver's notification does.
    pub fn notifiers(&self) -> &[EventFd] {
        self.core.notifiers()
    }

    /// Takes up what the guest has written to the registers that do something.
    fn follow_config(&mut self) {
        self.msix.set_control(self.config.word(self.msix_at + CONTROL));
        self.vectors.set_enabled(self.msix.is_enabled());
        if self.config.is_bus_master() {
            self.core.release(Hold::BusMaster);
        } else {
            self.core.hold(Hold::BusMaster);
        }
    }

    /// What VIRTIO_PCI_CAP_PCI_CFG looks at: an offset in the BAR and the length of an access there.
    fn window(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        self.config.read(self.window_at + WINDOW_BAR, &mut bar);
        let offset = u64::from(self.config.dword(self.window_at + WINDOW_OFFSET));
        let length = self.config.dword(self.window_at + WINDOW_LENGTH);
        let is_one = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(u64::from(length));
        let length = usize::try_from(length).ok()?;
        (bar == [BAR] && is_one && offset < END).then_some((offset, length))
    }

    /// Whether a configuration access touches the window's data.
    fn is_window_access(&self, offset: u16, len: usize) -> bool {
        let data = usize::from(self.window_at + WINDOW_DATA);
        let start = usize::from(offset);
        start < data + 4 && start.saturating_add(len) > data
    }

    fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => self.read_common(offset - COMMON, data),
            ISR => {
                if let Some(isr) = data.first_mut() {
                    *isr = self.vectors.take_isr();
                }
            }
            CONFIG..NOTIFY => self.core.read_config(offset - CONFIG, data),
            TABLE..PENDING => self.msix.read_table(offset - TABLE, data),
            PENDING..END => self.msix.read_pending(offset - PENDING, data),
            _ => {}
        }
    }

    fn write_memory(&mut self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.write_common(offset - COMMON, data),
            CONFIG..NOTIFY => self.core.write_config(offset - CONFIG, data),
            // The address says which queue.
            NOTIFY..TABLE => {
                let queue = (offset - NOTIFY) / NOTIFY_STRIDE;
                self.core.notify(usize::try_from(queue).unwrap_or(usize::MAX));
            }
            TABLE..PENDING => self.msix.write_table(offset - TABLE, data),
            _ => {}
        }
    }
}

impl Function for VirtioPci {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if self.is_window_access(offset, data.len())
            && let Some((place, length)) = self.window()
        {
            let mut bytes = [0; 4];
            if let Some(bytes) = bytes.get_mut(..length) {
                self.read_memory(place, bytes);
                self.config.write(self.window_at + WINDOW_DATA, bytes);
            }
        }
        if self.vectors.is_pin_pending() {
            self.config.read_with_interrupt(offset, data);
        } else {
            self.config.read(offset, data);
        }
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if self.is_window_access(offset, data.len()) {
            if let Some((place, length)) = self.window() {
                let bytes = self.config.dword(self.window_at + WINDOW_DATA).to_le_bytes();
                self.write_memory(place, bytes.get(..length).unwrap_or_default());
            }
        } else {
            self.follow_config();
        }
    }

    fn bar(&self, bar: usize) -> Option<BarRange> {
        self.config.bar(bar)
    }

    fn place_bar(&mut self, _bar: usize, address: Option<u64>) {
        for (queue, (notifier, connected)) in
            self.core.notifiers().iter().zip(&mut self.connected).enumerate()
        {
            if let Some(address) = connected.take()
                && let Err(error) = self.notify.disconnect(address, notifier)
            {
                tracing::warn!("a queue's old address at {address:#x} still notifies it: {error}");
            }
            let Some(address) = address.filter(|_| !self.core.is_served_by_vcpu(queue)) else { continue };
            let address = address.saturating_add(NOTIFY + NOTIFY_STRIDE * queue as u64);
            match self.notify.connect(address, notifier) {
                Ok(()) => *connected = Some(address),
                Err(error) => tracing::debug!("a queue is notified by way of a vCPU's thread: {error}"),
            }
        }
    }

    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        self.read_memory(offset, data);
    }

    fn write_bar(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        self.write_memory(offset, data);
    }
}

impl Subscriber for VirtioPci {
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

impl Transport for VirtioPci {
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

/// What the function says it is. Class codes are those of PCI 3.0, appendix D: where none fits, it
/// says so.
fn identity(device: u32) -> Identity {
    let class = match device {
        VIRTIO_ID_NET => 0x02_00_00,
        VIRTIO_ID_BLOCK | VIRTIO_ID_FS => 0x01_80_00,
        VIRTIO_ID_SCSI => 0x01_00_00,
        VIRTIO_ID_CONSOLE | VIRTIO_ID_VSOCK => 0x07_80_00,
        _ => 0xff_00_00,
    };
    let device = FIRST_DEVICE.saturating_add(u16::try_from(device).unwrap_or_default());
    Identity { vendor: VENDOR, device, subsystem: device, revision: REVISION, class }
}

/// The body of `struct virtio_pci_cap` from cap_len on, with what stands behind it.
fn structure(kind: u8, offset: u64, length: u32, extra: Option<u32>) -> Vec<u8> {
    let size = if extra.is_some() { 20 } else { 16 };
    let mut body = vec![size, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra.iter().flat_map(|extra| extra.to_le_bytes()));
    body
}

fn add_structure(config: &mut ConfigSpace, kind: u8, offset: u64, length: u32, extra: Option<u32>) {
    config.add_capability(VENDOR_CAPABILITY, &structure(kind, offset, length, extra), &[]);
}

/// The window: BAR, offset, length and data are the driver's to write.
fn add_window(config: &mut ConfigSpace) -> u16 {
    let mut writable = structure(0, u64::MAX, u32::MAX, Some(u32::MAX));
    for (byte, mask) in writable.iter_mut().zip([0, 0, 0xff, 0, 0, 0]) {
        *byte = mask;
    }
    config.add_capability(VENDOR_CAPABILITY, &structure(PCI_CFG, 0, 0, Some(0)), &writable)
}

/// The table and the notifications of the largest device fit in their pages.
const _: () = assert!(
    ENTRY * MOST_VECTORS as u64 <= PENDING - TABLE && NOTIFY_STRIDE * MOST_VECTORS as u64 <= TABLE - NOTIFY
);
