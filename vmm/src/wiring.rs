//! Puts devices on the bus and connects their queues and interrupts with KVM.

mod pci;

use std::io;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::pci::SlotError;
use devices::platform::OnEnd;
use devices::platform::acpi_power::{self, AcpiPower};
use devices::platform::i8042::{self, ResetLine};
use devices::platform::pvpanic::{self, PvPanic};
use devices::platform::serial;
use devices::platform::sleep_note::{self, SleepNote};
use devices::virtio::Transport;
use devices::virtio::device::VirtioDevice;
use devices::virtio::mmio::{ACK_USED, INTERRUPT_ACK, Mmio, QUEUE_NOTIFY, WINDOW};
use kvm_ioctls::{IoEventAddress, VmFd};
use vm_device::DevicePio;
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{MmioManager, PioManager};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::pci::PciBus;
use crate::arch::x86_64::acpi::{Platform, VirtioSlot};
use crate::arch::x86_64::layout;
use crate::bus::Buses;
use crate::kvm::{KvmError, refused};
use crate::resources::{ResourceError, Resources};

/// Why a device could not be wired up.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    /// There is no interrupt or no address left.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// The PCI bus has no slot left.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// Two devices want the same address.
    #[error("a device's addresses are taken: {0}")]
    Bus(#[from] vm_device::bus::Error),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No eventfd.
    #[error("a device's events can't be set up: {0}")]
    Event(#[from] io::Error),
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// A virtio device behind its transport.
pub type Virtio = Arc<Mutex<dyn Transport>>;

/// The device, for its owner alone.
pub fn lock(device: &Virtio) -> MutexGuard<'_, dyn Transport + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wires up one VM's devices, one after the other.
pub struct Wiring {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemoryMmap>,
    buses: Buses,
    resources: Resources,
    platform: Platform,
    /// Where virtio devices go, if not behind memory-mapped registers of their own.
    pci: Option<PciBus>,
    /// Takes acknowledgements that say nothing: KVM has done with them then.
    sink_event: EventFd,
}

impl Wiring {
    /// A bus with what every machine has: the ways in which its guest ends it, told to `on_end`, and a
    /// power button, the line to which is returned too. Virtio devices go on a PCI bus whose BARs lie in
    /// `pci`, and without it behind memory-mapped registers.
    ///
    /// # Errors
    /// [`WiringError`] says what could not be had.
    pub fn new(
        vm: Arc<VmFd>,
        memory: Arc<GuestMemoryMmap>,
        on_end: &OnEnd,
        asleep: Arc<AtomicBool>,
        pci: Option<Range<u64>>,
    ) -> Result<(Self, EventFd), WiringError> {
        let resources = Resources::new(pci.as_ref())?;
        let mut buses = Buses::default();
        let pci = pci.map(|window| PciBus::new(&vm, &mut buses, window, on_end)).transpose()?;
        let mut wiring = Self {
            vm,
            memory,
            buses,
            resources,
            platform: Platform { pci: pci.as_ref().map(PciBus::description), ..Platform::default() },
            pci,
            sink_event: event()?,
        };
        wiring.ports(layout::PVPANIC, pvpanic::PORTS, Arc::new(PvPanic::new(on_end.clone())))?;
        wiring.ports(layout::ACPI_POWER, acpi_power::PORTS, Arc::new(AcpiPower::new(on_end.clone())))?;
        wiring.ports(layout::SLEEP_NOTE, sleep_note::PORTS, Arc::new(SleepNote::new(asleep)))?;
        wiring.ports(layout::KEYBOARD_COMMAND, i8042::PORTS, Arc::new(ResetLine::new(on_end.clone())))?;
        wiring.platform.power_button = wiring.resources.pin()?;
        let power = wiring.interrupt(wiring.platform.power_button)?;
        Ok((wiring, power))
    }

    /// The bus so far.
    pub fn buses(&mut self) -> &mut Buses {
        &mut self.buses
    }

    /// An interrupt line: each write to it is one edge.
    fn interrupt(&self, number: u32) -> Result<EventFd, WiringError> {
        let line = event()?;
        self.vm.register_irqfd(&line, number).map_err(refused("connect a device's interrupt"))?;
        Ok(line)
    }

    /// A device that takes `count` ports, from `first` on.
    fn ports(
        &mut self,
        first: u16,
        count: u16,
        device: Arc<dyn DevicePio + Send + Sync>,
    ) -> Result<(), WiringError> {
        self.buses.devices.register_pio(PioRange::new(PioAddress(first), count)?, device)?;
        Ok(())
    }

    /// The interrupt line of the first serial port.
    ///
    /// # Errors
    /// [`WiringError`] says what could not be had.
    pub fn serial_interrupt(&self) -> Result<EventFd, WiringError> {
        self.interrupt(layout::COM1_IRQ)
    }

    /// The first serial port.
    ///
    /// # Errors
    /// [`WiringError::Bus`] where there is one.
    pub fn serial(&mut self, port: Arc<serial::Port>) -> Result<(), WiringError> {
        self.ports(layout::COM1, serial::PORTS, port)?;
        self.platform.serial = true;
        Ok(())
    }

    /// A virtio device where the guest finds it. A notification by its driver goes from KVM
    /// to the device's event loop, past the vCPU's thread, but for queues that this serves itself.
    ///
    /// # Errors
    /// [`WiringError`] says what could not be had.
    pub fn virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<Virtio, WiringError> {
        match &self.pci {
            Some(pci) => pci.add(device, &self.memory, &mut self.resources),
            None => self.virtio_mmio(device),
        }
    }

    fn virtio_mmio(&mut self, device: Box<dyn VirtioDevice>) -> Result<Virtio, WiringError> {
        let irq = self.resources.pin()?;
        let slot = VirtioSlot { window: self.resources.window(WINDOW)?, size: WINDOW, irq };
        let device = Mmio::new(device, Arc::clone(&self.memory), self.interrupt(irq)?)?;
        let notify = IoEventAddress::Mmio(slot.window.0 + QUEUE_NOTIFY);
        for (queue, notifier) in (0u32..).zip(device.notifiers()) {
            if device.is_served_by_vcpu(queue as usize) {
                continue;
            }
            self.vm
                .register_ioevent(notifier, &notify, queue)
                .map_err(refused("connect a device's queue"))?;
        }
        // The acknowledgement that follows each interrupt for used buffers ends in KVM.
        let register = IoEventAddress::Mmio(slot.window.0 + INTERRUPT_ACK);
        self.vm
            .register_ioevent(&self.sink_event, &register, ACK_USED)
            .map_err(refused("connect a device's acknowledgement"))?;
        let device = Arc::new(Mutex::new(device));
        let range = MmioRange::new(MmioAddress(slot.window.0), slot.size)?;
        self.buses.devices.register_mmio(range, device.clone())?;
        self.platform.virtio.push(slot);
        Ok(device)
    }

    /// The bus, and the devices that a guest must be told of.
    pub fn finish(self) -> (Buses, Platform) {
        (self.buses, self.platform)
    }
}
