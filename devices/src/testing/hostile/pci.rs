//! What a hostile guest may do to a device on PCI, beside what it may do to any device.

use proptest::collection::vec;
use proptest::prelude::*;
use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;

use super::super::pci::{
    BAR, BAR0, COMMAND, FUNCTION_MASK, MSIX_ENABLE, NOTIFY, PENDING, PciRegisters, SLOT, TABLE, WINDOW,
};
use super::super::{Guest, REGION};
use super::{Act, any_act};
use crate::pci::access::ECAM_SIZE;
use crate::virtio::pci::BAR_SIZE;

/// One thing a guest does, or its host meanwhile.
#[derive(Clone, Debug)]
pub enum PciAct {
    /// What it may do to any device.
    Any(Act),
    /// Reads anything anywhere in configuration space, through memory.
    ReadConfig {
        /// From the start of the window for it.
        offset: u64,
        /// How many bytes.
        len: usize,
    },
    /// Writes anything anywhere in configuration space, through memory.
    WriteConfig {
        /// From the start of the window for it.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Reads the configuration ports.
    ReadPort {
        /// From the first one.
        offset: u16,
        /// How many bytes.
        len: usize,
    },
    /// Writes the configuration ports.
    WritePort {
        /// From the first one.
        offset: u16,
        /// What.
        data: Vec<u8>,
    },
    /// Reads anything anywhere in the window for BARs.
    ReadMemory {
        /// A guest address.
        address: u64,
        /// How many bytes.
        len: usize,
    },
    /// Writes anything anywhere in the window for BARs.
    WriteMemory {
        /// A guest address.
        address: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Moves the BAR as an honest driver does, to anywhere.
    MoveBar {
        /// A guest address.
        address: u64,
    },
    /// The host refuses what it is asked for, or no longer does.
    Refuse(bool),
    /// The owner has the device stand still, or go on.
    Hold(bool),
}

impl PciAct {
    /// Does it, lets the device work until it is quiet, and checks what holds after anything.
    pub fn apply(&self, guest: &mut Guest) {
        let transport = guest.transport();
        let pci = guest.pci().expect("a device on PCI");
        match self {
            Self::Any(act) => act.apply(guest),
            Self::ReadConfig { offset, len } => {
                pci.ecam().mmio_read(MmioAddress(0), *offset, &mut vec![0; *len]);
            }
            Self::WriteConfig { offset, data } => pci.ecam().mmio_write(MmioAddress(0), *offset, data),
            Self::ReadPort { offset, len } => pci.read_port(*offset, &mut vec![0; *len]),
            Self::WritePort { offset, data } => pci.write_port(*offset, data),
            Self::ReadMemory { address, len } => pci.read_memory(*address, &mut vec![0; *len]),
            Self::WriteMemory { address, data } => pci.write_memory(*address, data),
            Self::MoveBar { address } => pci.move_bar(*address),
            Self::Refuse(refuses) => *pci.host.refuses.lock().unwrap() = *refuses,
            Self::Hold(true) => transport.lock().unwrap().drain(),
            Self::Hold(false) => transport.lock().unwrap().resume(),
        }
        guest.run();
        check(guest.pci().expect("a device on PCI"));
    }
}

/// Queues are connected where the BAR is, if it is anywhere, and nothing is delivered that the guest
/// has masked.
fn check(pci: &PciRegisters) {
    let mut register = [0; 8];
    let (low, high) = register.split_at_mut(4);
    pci.read_config(BAR0, low);
    pci.read_config(BAR0 + 4, high);
    let bar = u64::from_le_bytes(register) & !0xf;
    let decodes = pci.config_word(COMMAND) & 0b10 != 0;
    let connected = pci.host.connected.lock().unwrap();
    let is_inside = (WINDOW.start..=WINDOW.end - BAR_SIZE).contains(&bar);
    assert!(connected.is_empty() || decodes && is_inside, "{bar:#x} is no place to notify a queue");
    for address in connected.keys() {
        assert!((bar + NOTIFY..bar + TABLE).contains(address), "{address:#x} is not in the BAR at {bar:#x}");
    }
    let control = pci.capability(0x11, |_| true).map(|at| pci.config_word(at + 2)).expect("MSI-X");
    let delivers = control & (MSIX_ENABLE | FUNCTION_MASK) == MSIX_ENABLE;
    let messages = pci.host.messages.lock().unwrap();
    assert!(delivers || messages.iter().all(Option::is_none), "a masked vector is delivered");
}

/// Anything a guest may do to a device on PCI with `queues` queues of at most `size` descriptors.
pub fn any_pci_act(queues: usize, size: u16) -> impl Strategy<Value = PciAct> {
    let widths = || prop_oneof![8 => prop::sample::select(vec![1usize, 2, 4, 8]), 1 => 0usize..20];
    let data = |value: u64, width: usize| {
        let mut data = value.to_le_bytes().to_vec();
        data.resize(width, 0xff);
        data
    };
    let offset = prop_oneof![
        12 => register().prop_map(|register| u64::from(SLOT) << 15 | register),
        2 => 0..ECAM_SIZE,
        1 => any::<u64>(),
    ];
    let memory = prop_oneof![8 => place().prop_map(|place| BAR + place), 1 => WINDOW.start..WINDOW.end + 64];
    let port = prop_oneof![4 => Just(0u16), 8 => 4u16..8, 1 => 0u16..16];
    let select = prop_oneof![
        4 => register().prop_map(|register| 1 << 31 | u64::from(SLOT) << 11 | register),
        1 => any::<u64>(),
    ];
    prop_oneof![
        10 => any_act(queues, size).prop_map(PciAct::Any),
        1 => (offset.clone(), widths()).prop_map(|(offset, len)| PciAct::ReadConfig { offset, len }),
        6 => (offset, config_value(), widths())
            .prop_map(move |(offset, value, width)| PciAct::WriteConfig { offset, data: data(value, width) }),
        1 => (port.clone(), widths()).prop_map(|(offset, len)| PciAct::ReadPort { offset, len }),
        3 => (port, prop_oneof![select, config_value()], widths())
            .prop_map(move |(offset, value, width)| PciAct::WritePort { offset, data: data(value, width) }),
        2 => (memory.clone(), widths()).prop_map(|(address, len)| PciAct::ReadMemory { address, len }),
        6 => (memory, memory_value(), widths())
            .prop_map(move |(address, value, width)| PciAct::WriteMemory { address, data: data(value, width) }),
        1 => vec(any::<u8>(), 0..40).prop_map(|data| PciAct::WriteMemory { address: BAR, data }),
        2 => bar().prop_map(|address| PciAct::MoveBar { address }),
        1 => any::<bool>().prop_map(PciAct::Refuse),
        1 => any::<bool>().prop_map(PciAct::Hold),
    ]
}

/// Registers of configuration space: Command, the BAR, MSI-X, the window to the BAR, any.
fn register() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => Just(u64::from(COMMAND)),
        3 => u64::from(BAR0)..0x18,
        3 => 0x40u64..0x4c,
        6 => 0x90u64..0xa4,
        2 => 0u64..0x100,
        1 => 0u64..0x1000,
    ]
}

fn config_value() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => prop::sample::select(vec![0, 2, 4, 6, 0x8000, 0xc000, u64::MAX]),
        2 => bar(),
        1 => bar().prop_map(|address| address >> 32),
        3 => place(),
        1 => any::<u64>(),
    ]
}

/// Where a BAR may be: mostly in the window, else where RAM or something else is.
fn bar() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..9).prop_map(|n| WINDOW.start + n * BAR_SIZE),
        2 => prop::sample::select(vec![0, REGION as u64, 0xfee0_0000, WINDOW.start - BAR_SIZE, u64::MAX]),
        1 => any::<u64>(),
    ]
}

/// Places in the BAR: each structure's registers, and what lies between.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0u64..0x3a,
        4 => (0u64..12).prop_map(|n| TABLE + 4 * n),
        1 => (0u64..4).prop_map(|n| PENDING + n),
        2 => (0u64..8).prop_map(|n| NOTIFY + 4 * n),
        1 => 0x1000u64..0x1004,
        1 => 0x2000u64..0x2010,
        1 => 0u64..BAR_SIZE + 16,
    ]
}

fn memory_value() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => prop::sample::select(vec![0, 1, 3, 7, 11, 15, 0x8f, 0xffff, u64::MAX]),
        2 => 0u64..256,
        2 => (0u64..REGION as u64 / 0x1000).prop_map(|page| page * 0x1000),
        1 => any::<u64>(),
    ]
}
