//! Puts devices on the bus and connects their queues and interrupts with KVM.

use std::io;
use std::sync::{Arc, Mutex};

use devices::platform::OnEnd;
use devices::platform::acpi_power::{self, AcpiPower};
use devices::platform::i8042::{self, ResetLine};
use devices::platform::pvpanic::{self, PvPanic};
use devices::virtio::device::VirtioDevice;
use devices::virtio::mmio::{ACK_USED, INTERRUPT_ACK, Mmio};
use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vm_device::DevicePio;
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{MmioManager, PioManager};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::acpi::VirtioSlot;
use crate::arch::x86_64::layout;
use crate::bus::Buses;
use crate::kvm::{KvmError, refused};

/// Why a device could not be wired up.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    /// All interrupts are taken.
    #[error("there is no interrupt left for one more virtio device (there are {})", layout::VIRTIO_DEVICES)]
    NoSlot,
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

/// Wires up one VM's devices, one after the other.
pub struct Wiring<'a> {
    vm: &'a VmFd,
    memory: &'a Arc<GuestMemoryMmap>,
    buses: Buses,
    slots: Vec<VirtioSlot>,
    /// Takes acknowledgements that say nothing: KVM has done with them then.
    sink_event: Option<EventFd>,
}

impl<'a> Wiring<'a> {
    /// A bus without devices.
    pub fn new(vm: &'a VmFd, memory: &'a Arc<GuestMemoryMmap>) -> Self {
        Self { vm, memory, buses: Buses::default(), slots: Vec::new(), sink_event: None }
    }

    /// The bus so far, for devices on ports.
    pub fn buses(&mut self) -> &mut Buses {
        &mut self.buses
    }

    /// An interrupt line: each write to it is one edge.
    ///
    /// # Errors
    /// [`WiringError`] says what could not be had.
    pub fn interrupt(&self, number: u32) -> Result<EventFd, WiringError> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.vm.register_irqfd(&line, number).map_err(refused("connect a device's interrupt"))?;
        Ok(line)
    }

    /// A device that takes `count` ports, from `first` on.
    ///
    /// # Errors
    /// [`WiringError::Bus`] where another device has one of them.
    pub fn ports(
        &mut self,
        first: u16,
        count: u16,
        device: Arc<dyn DevicePio + Send + Sync>,
    ) -> Result<(), WiringError> {
        self.buses.devices.register_pio(PioRange::new(PioAddress(first), count)?, device)?;
        Ok(())
    }

    /// What every machine has by which its guest can end itself.
    ///
    /// # Errors
    /// As [`ports`](Self::ports).
    pub fn power_devices(&mut self, on_end: &OnEnd) -> Result<(), WiringError> {
        self.ports(layout::PVPANIC, pvpanic::PORTS, Arc::new(PvPanic::new(on_end.clone())))?;
        self.ports(layout::ACPI_POWER, acpi_power::PORTS, Arc::new(AcpiPower::new(on_end.clone())))?;
        self.ports(layout::KEYBOARD_COMMAND, i8042::PORTS, Arc::new(ResetLine::new(on_end.clone())))
    }

    /// A virtio device in the next free slot. A notification by its driver goes from KVM
    /// to the device's event loop, past the vCPU's thread, but for queues that this serves itself.
    ///
    /// # Errors
    /// [`WiringError`] says what could not be had.
    pub fn virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<Arc<Mutex<Mmio>>, WiringError> {
        let slot = VirtioSlot::nth(self.slots.len()).ok_or(WiringError::NoSlot)?;
        let line = self.interrupt(slot.irq)?;
        let device = Mmio::new(device, Arc::clone(self.memory), line)?;
        let notify = IoEventAddress::Mmio(slot.window.0 + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        for (queue, notifier) in device.notifiers().iter().enumerate() {
            if device.is_served_by_vcpu(queue) {
                continue;
            }
            self.vm
                .register_ioevent(notifier, &notify, u32::try_from(queue).unwrap_or(u32::MAX))
                .map_err(refused("connect a device's queue"))?;
        }
        self.acknowledge_in_kvm(&slot)?;
        let device = Arc::new(Mutex::new(device));
        let range = MmioRange::new(MmioAddress(slot.window.0), layout::VIRTIO_WINDOW)?;
        self.buses.devices.register_mmio(range, device.clone())?;
        self.slots.push(slot);
        Ok(device)
    }

    /// Has KVM take the acknowledgement that follows each interrupt for used buffers, rather than
    /// leave the guest for it.
    fn acknowledge_in_kvm(&mut self, slot: &VirtioSlot) -> Result<(), WiringError> {
        let nobody = match self.sink_event.take() {
            Some(nobody) => nobody,
            None => EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        };
        let register = IoEventAddress::Mmio(slot.window.0 + INTERRUPT_ACK);
        self.vm
            .register_ioevent(&nobody, &register, ACK_USED)
            .map_err(refused("connect a device's acknowledgement"))?;
        self.sink_event = Some(nobody);
        Ok(())
    }

    /// The bus, and where its virtio devices are.
    pub fn finish(self) -> (Buses, Vec<VirtioSlot>) {
        (self.buses, self.slots)
    }
}
