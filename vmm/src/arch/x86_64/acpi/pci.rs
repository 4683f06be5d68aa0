//! What ACPI says of the PCI bus: where its configuration space is, and what it decodes.

use std::ops::Range;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, ResourceTemplate,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::{Aml, aml};
use devices::pci::access::{CONFIG_PORT_COUNT, CONFIG_PORTS};
use vm_memory::GuestAddress;

use super::{OEM, REVISION, TABLE, bytes};

/// The host bridge of the one bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciHostBridge {
    /// Configuration space as memory, below 4 GiB.
    pub ecam: GuestAddress,
    /// How long that is.
    pub ecam_size: u64,
    /// Where BARs lie, above 4 GiB.
    pub window: Range<u64>,
}

/// The table that says where configuration space is (PCI Firmware 3.2, section 4.1.2).
pub fn mcfg(bridge: &PciHostBridge) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(bridge.ecam.0, 0, 0, 0);
    bytes(&mcfg)
}

/// The bridge and, as a device of the mainboard, its configuration space: Linux looks there for whether
/// anybody else could be at those addresses.
pub fn describe(bridge: &PciHostBridge, body: &mut Vec<u8>) {
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let ports = IO::new(CONFIG_PORTS, CONFIG_PORTS, 1, CONFIG_PORT_COUNT as u8);
    let last = bridge.window.end.saturating_sub(1);
    let window =
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, bridge.window.start, last, None);
    Device::new(
        "PCI0".into(),
        vec![
            // PCI Express, for its configuration space; and PCI, as all that is on it.
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_SEG".into(), &aml::ZERO),
            &Name::new("_BBN".into(), &aml::ZERO),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &ports, &window])),
        ],
    )
    .to_aml_bytes(body);
    let ecam = Memory32Fixed::new(true, bridge.ecam.0 as u32, bridge.ecam_size as u32);
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam])),
        ],
    )
    .to_aml_bytes(body);
}
