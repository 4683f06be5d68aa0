//! The VM's interrupt routing table: what KVM does when an interrupt of a number (GSI) is raised.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::pci::MsiMessage;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{Error, VmFd};
use parking_lot::Mutex;

/// Pins of the IOAPIC, whose numbers are their interrupts'.
pub const PINS: u32 = 24;
/// Those of them that the old PICs have too, eight each.
const PIC_PINS: u32 = 16;

/// The table. KVM takes it whole only, and lets all vCPUs pass by first: it is set when it changes, and
/// with no change not at all.
pub struct Routing {
    vm: Arc<VmFd>,
    messages: Mutex<BTreeMap<u32, MsiMessage>>,
}

impl Routing {
    /// The table as KVM made it with the interrupt controllers: each pin is itself.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, messages: Mutex::default() }
    }

    /// Has interrupt `gsi`, which is no pin's, send `message`.
    ///
    /// # Errors
    /// KVM refuses such a message, or there are too many; the table stays as it was.
    pub fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), Error> {
        let mut messages = self.messages.lock();
        if messages.get(&gsi) == Some(&message) {
            return Ok(());
        }
        let before = messages.insert(gsi, message);
        self.set(&messages).inspect_err(|_| {
            match before {
                Some(before) => messages.insert(gsi, before),
                None => messages.remove(&gsi),
            };
        })
    }

    fn set(&self, messages: &BTreeMap<u32, MsiMessage>) -> Result<(), Error> {
        let table = KvmIrqRouting::from_entries(&table(messages)).map_err(|_| Error::new(libc::E2BIG))?;
        self.vm.set_gsi_routing(&table)
    }
}

/// All routes: the pins' as KVM itself sets them up, and then messages.
fn table(messages: &BTreeMap<u32, MsiMessage>) -> Vec<kvm_irq_routing_entry> {
    let pins = (0..PINS).flat_map(|pin| {
        let pic = match pin {
            0..8 => Some((KVM_IRQCHIP_PIC_MASTER, pin)),
            8..PIC_PINS => Some((KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
            _ => None,
        };
        [Some((KVM_IRQCHIP_IOAPIC, pin)), pic].into_iter().flatten().map(move |(chip, chip_pin)| {
            let mut entry =
                kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: chip, pin: chip_pin };
            entry
        })
    });
    let messages = messages.iter().map(|(gsi, message)| {
        let mut entry = kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        entry.u.msi = kvm_irq_routing_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        entry
    });
    pins.chain(messages).collect()
}
