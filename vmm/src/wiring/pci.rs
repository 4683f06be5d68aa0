//! virtio devices on the PCI bus: their vectors, and where their drivers notify them.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use devices::pci::access::{BarWindow, CONFIG_PORT_COUNT, CONFIG_PORTS, ConfigPorts, ECAM_SIZE, Ecam};
use devices::pci::{Bus, HostBridge};
use devices::platform::OnEnd;
use devices::platform::reset_control::{self, ResetControl};
use devices::virtio::device::VirtioDevice;
use devices::virtio::pci::{BAR_SIZE, NotifyAddresses, VirtioPci, vectors_wanted};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vm_device::DevicePio;
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioAddressOffset, PioRange};
use vm_device::device_manager::{MmioManager, PioManager};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{Virtio, WiringError};
use crate::arch::x86_64::acpi::PciHostBridge;
use crate::arch::x86_64::layout;
use crate::bus::Buses;
use crate::kvm::routing::Routing;
use crate::kvm::vectors::Vectors;
use crate::resources::Resources;

/// The bus of a VM, and what puts functions on it.
pub struct PciBus {
    vm: Arc<VmFd>,
    bus: Arc<Bus>,
    routing: Arc<Routing>,
    notify: Arc<KvmNotifyAddresses>,
}

impl PciBus {
    /// A bus with a host bridge, whose BARs lie in `window`, in all its ways of access.
    ///
    /// # Errors
    /// Another device is at their addresses.
    pub fn new(
        vm: &Arc<VmFd>,
        buses: &mut Buses,
        window: Range<u64>,
        on_end: &OnEnd,
    ) -> Result<Self, WiringError> {
        let size = window.end.saturating_sub(window.start);
        let bars = MmioRange::new(MmioAddress(window.start), size)?;
        let ecam = MmioRange::new(MmioAddress(layout::ECAM.0), ECAM_SIZE)?;
        let ports = PioRange::new(PioAddress(CONFIG_PORTS), CONFIG_PORT_COUNT)?;
        let bus = Arc::new(Bus::new(window));
        bus.insert(0, Arc::new(Mutex::new(HostBridge::default())))?;
        buses.devices.register_mmio(ecam, Arc::new(Ecam(bus.clone())))?;
        buses.devices.register_mmio(bars, Arc::new(BarWindow(bus.clone())))?;
        let config = ConfigPorts::new(bus.clone());
        let reset = ResetControl::new(on_end.clone());
        buses.devices.register_pio(ports, Arc::new(ChipsetPorts { config, reset }))?;
        Ok(Self {
            vm: Arc::clone(vm),
            bus,
            routing: Arc::new(Routing::new(Arc::clone(vm))),
            notify: Arc::new(KvmNotifyAddresses(Arc::clone(vm))),
        })
    }

    /// Puts a device into the next free slot.
    ///
    /// # Errors
    /// [`WiringError`] says what could not be had.
    pub fn add(
        &self,
        device: Box<dyn VirtioDevice>,
        memory: &Arc<GuestMemoryMmap>,
        resources: &mut Resources,
    ) -> Result<Virtio, WiringError> {
        let gsis: Vec<u32> =
            (0..vectors_wanted(&*device)).map(|_| resources.message()).collect::<Result<_, _>>()?;
        let vectors = Vectors::new(self.vm.clone(), self.routing.clone(), &gsis)?;
        let bar = resources.bar(BAR_SIZE)?;
        let function = VirtioPci::new(device, memory.clone(), Arc::new(vectors), self.notify.clone(), bar.0)?;
        let function = Arc::new(Mutex::new(function));
        self.bus.add(function.clone())?;
        Ok(function)
    }

    /// What the guest is told of it.
    pub fn description(&self) -> PciHostBridge {
        PciHostBridge { ecam: layout::ECAM, ecam_size: ECAM_SIZE, window: self.bus.window() }
    }
}

/// The eight ports of the bus's configuration, in one of which PC chipsets have another register, told by
/// the width of the access.
struct ChipsetPorts {
    config: ConfigPorts,
    reset: ResetControl,
}

impl DevicePio for ChipsetPorts {
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        match (base.0.wrapping_add(offset), &data) {
            (reset_control::PORT, [_]) => self.reset.pio_read(base, offset, data),
            _ => self.config.pio_read(base, offset, data),
        }
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        match (base.0.wrapping_add(offset), data) {
            (reset_control::PORT, [_]) => self.reset.pio_write(base, offset, data),
            _ => self.config.pio_write(base, offset, data),
        }
    }
}

/// Has KVM take notifications, whatever their width and value: the address says which queue is meant.
struct KvmNotifyAddresses(Arc<VmFd>);

impl NotifyAddresses for KvmNotifyAddresses {
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let connected = self.0.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
        connected.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let disconnected = self.0.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
        disconnected.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}
