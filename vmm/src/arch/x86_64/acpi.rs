//! The ACPI tables: what is there, and just as much what is not, so that nothing is probed for.
//!
//! Hardware-reduced ACPI (ACPI 6.5, section 4.1): no PM timer, no fixed events, no SCI.

mod pci;

use acpi_tables::aml::{
    Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace,
    Package, Path, ResourceTemplate, Return, Scope, Store,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::srat::{MemoryAffinity, SRAT};
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use api::units::Bytes;
use devices::platform::{acpi_power, sleep_note};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

pub use self::pci::PciHostBridge;
use crate::arch::x86_64::layout;
use crate::config::Cpus;

const OEM: [u8; 6] = *b"BALLST";
const TABLE: [u8; 8] = *b"BALLAST ";
const REVISION: u32 = 1;

// FADT, IA-PC boot architecture flags (ACPI 6.5, section 5.2.9.3). Not set: 8042 (bit 1).
const LEGACY_DEVICES: u16 = 1 << 0;
const NO_VGA: u16 = 1 << 2;
const NO_MSI: u16 = 1 << 3;
const NO_ASPM: u16 = 1 << 4;
const NO_CMOS_RTC: u16 = 1 << 5;

/// One virtio-mmio device's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Where its window starts.
    pub window: GuestAddress,
    /// How long the window is.
    pub size: u64,
    /// Its interrupt's number.
    pub irq: u32,
}

/// The devices that a guest can't find by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// virtio-mmio devices.
    pub virtio: Vec<VirtioSlot>,
    /// The PCI bus, if there is one.
    pub pci: Option<PciHostBridge>,
    /// Whether there is a first serial port.
    pub serial: bool,
    /// The power button's interrupt.
    pub power_button: u32,
}

/// Memory of the one proximity domain that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Where it starts.
    pub start: GuestAddress,
    /// How long it is.
    pub size: Bytes,
    /// It is not there at boot, and may come later.
    pub pluggable: bool,
}

/// Writes all tables into guest memory, the root pointer at [`layout::ACPI`].
///
/// # Errors
/// When guest memory refuses the write.
pub fn write(
    memory: &GuestMemoryMmap,
    cpus: Cpus,
    platform: &Platform,
    domain: &[Domain],
) -> Result<(), vm_memory::GuestMemoryError> {
    let mut tables = Vec::new();
    let first = layout::ACPI.0 + Rsdp::len().next_multiple_of(16) as u64;
    let mut place = |bytes: Vec<u8>| {
        let address = first + tables.len() as u64;
        tables.extend_from_slice(&bytes);
        tables.resize(tables.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = place(dsdt(platform));
    let fadt = place(fadt(dsdt, platform.pci.is_some()));
    let madt = place(madt(cpus));
    let mcfg = platform.pci.as_ref().map(|bridge| place(pci::mcfg(bridge)));
    let srat = domain.iter().any(|memory| memory.pluggable).then(|| place(srat(domain)));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    mcfg.into_iter().chain(srat).for_each(|table| xsdt.add_entry(table));
    let xsdt = place(bytes(&xsdt));
    memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), layout::ACPI)?;
    memory.write_slice(&tables, GuestAddress(first))
}

fn bytes(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64, has_pci: bool) -> Vec<u8> {
    let port = |register: u16| {
        let address = layout::ACPI_POWER + register;
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        // A fixed button would need the PM1 block; this one is a device in the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let no_msi = if has_pci { 0 } else { NO_MSI };
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | no_msi | NO_ASPM | NO_CMOS_RTC).into();
    fadt.reset_reg = port(acpi_power::RESET);
    fadt.reset_value = acpi_power::RESET_VALUE;
    fadt.sleep_control_reg = port(acpi_power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(acpi_power::SLEEP_STATUS);
    bytes(&fadt.finalize())
}

fn madt(cpus: Cpus) -> Vec<u8> {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LAPIC));
    for cpu in 0..cpus.get() {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    bytes(&madt)
}

/// Says where memory may come later (ACPI 6.5, section 5.2.16), so that the kernel knows the
/// proximity domain of what is plugged, and how far addresses may go.
fn srat(domain: &[Domain]) -> Vec<u8> {
    let mut srat = SRAT::new(OEM, TABLE, REVISION);
    for memory in domain {
        let affinity = MemoryAffinity::new(0, memory.start.0, memory.size.0).enabled();
        srat.add_memory_affinity(if memory.pluggable { affinity.hotpluggable() } else { affinity });
    }
    bytes(&srat)
}

fn dsdt(platform: &Platform) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    let mut body = Vec::new();
    for (uid, slot) in (0..).zip(&platform.virtio) {
        virtio_device(uid, *slot, &mut body);
    }
    if let Some(bridge) = &platform.pci {
        pci::describe(bridge, &mut body);
    }
    if platform.serial {
        serial_port(&mut body);
    }
    panic_device(&mut body);
    power_button(platform.power_button, &mut body);
    sleep_note(&mut body);
    dsdt.append_slice(&Scope::raw(aml::Path::new("\\_SB_"), body));
    let sleep: aml::Byte = acpi_power::SOFT_OFF;
    dsdt.append_slice(&bytes(&Name::new("\\_S5_".into(), &Package::new(vec![&sleep]))));
    dsdt.as_slice().to_vec()
}

fn virtio_device(uid: u32, slot: VirtioSlot, body: &mut Vec<u8>) {
    // The windows lie below 4 GiB.
    let window = Memory32Fixed::new(true, slot.window.0 as u32, slot.size as u32);
    let interrupt = Interrupt::new(true, true, false, false, slot.irq);
    Device::new(
        format!("VR{uid:02}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &uid),
            // Virtio devices read memory through the caches, as vCPUs do.
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window, &interrupt])),
        ],
    )
    .to_aml_bytes(body);
}

fn serial_port(body: &mut Vec<u8>) {
    let ports = IO::new(layout::COM1, layout::COM1, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, layout::COM1_IRQ);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(body);
}

fn panic_device(body: &mut Vec<u8>) {
    let port = IO::new(layout::PVPANIC, layout::PVPANIC, 1, 1);
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &0x0fu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(body);
}

/// A generic event device (ACPI 6.5, section 5.6.9) whose one event is the power button.
///
/// It wakes no Linux guest that sleeps (suspend-to-idle): the driver arms no interrupt for that, whatever the
/// descriptor says of `ExclusiveAndWake` (drivers/acpi/evged.c), and acpi_s2idle_prepare() arms the SCI alone, which
/// hardware-reduced ACPI has not. With an SCI, Linux would look for the legacy interrupt controller and
/// timer too, at each boot (acpi_generic_reduced_hw_init() leaves them out). So the button pulls the serial port's
/// line as well, by which a guest wakes that was told to.
fn power_button(irq: u32, body: &mut Vec<u8>) {
    let interrupt = Interrupt::new(true, true, false, false, irq);
    Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(body);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(
                    &Equal::new(&Arg(0), &irq),
                    // 0x80: "the button was pressed" (table 5.167).
                    vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)],
                )],
            ),
        ],
    )
    .to_aml_bytes(body);
}

/// A system power management controller whose methods Linux and Windows call when they fall asleep and wake, by
/// Microsoft's identifier for them (Linux: drivers/acpi/x86/s2idle.c). They note it at a port.
fn sleep_note(body: &mut Vec<u8>) {
    // 11e00d56-ce64-47ce-837b-1f898f9aa461, as UUIDs lie in memory (ACPI 6.5, section 19.6.142).
    const IDENTIFIER: [u8; 16] =
        [0x56, 0x0d, 0xe0, 0x11, 0x64, 0xce, 0xce, 0x47, 0x83, 0x7b, 0x1f, 0x89, 0x8f, 0x9a, 0xa4, 0x61];
    const ENTRY: u8 = 5;
    const EXIT: u8 = 6;
    // Function 0 tells which there are, itself included.
    const FUNCTIONS: [u8; 4] = [1 << 0 | 1 << ENTRY | 1 << EXIT, 0, 0, 0];
    let note = Path::new("NOTE");
    let region =
        OpRegion::new("NPRT".into(), OpRegionSpace::SystemIO, &layout::SLEEP_NOTE, &sleep_note::PORTS);
    let field = Field::new(
        "NPRT".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"NOTE", 8)],
    );
    let (identifier, functions) = (BufferData::new(IDENTIFIER.to_vec()), BufferData::new(FUNCTIONS.to_vec()));
    let nothing = BufferData::new(vec![0]);
    let is = |function| Equal::new(&Arg(2), function);
    let answer = Return::new(&functions);
    let (asleep, awake) = (Store::new(&note, &sleep_note::ASLEEP), Store::new(&note, &sleep_note::AWAKE));
    let (which, entry, exit) = (is(&aml::ZERO), is(&ENTRY), is(&EXIT));
    let which = If::new(&which, vec![&answer]);
    let (entry, exit) = (If::new(&entry, vec![&asleep]), If::new(&exit, vec![&awake]));
    let meant = Equal::new(&Arg(0), &identifier);
    let meant = If::new(&meant, vec![&which, &entry, &exit]);
    let other = Return::new(&nothing);
    Device::new(
        "SLPN".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0D80")),
            &region,
            &field,
            &Method::new("_DSM".into(), 4, true, vec![&meant, &other]),
        ],
    )
    .to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MOST_CPUS;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// One entry for each (ACPI 6.5, section 5.2.12.2), whose identifier is that of its CPUID. None is 255, which is
    /// everybody, or above, which takes an entry of another kind (section 5.2.12.12).
    #[test]
    fn each_vcpu_of_any_number_is_in_the_table_by_its_identifier() {
        for count in 1..=MOST_CPUS {
            let table = madt(count.try_into().expect("a number of vCPUs"));
            // Behind the header, the local APICs' address and flags.
            let (mut rest, mut ids, mut others) = (&table[44..], Vec::new(), Vec::new());
            while let [kind, length, ..] = *rest {
                let (entry, behind) = rest.split_at(length.into());
                match (kind, entry) {
                    (0, [_, 8, uid, id, flags @ ..]) => {
                        assert_eq!((uid, flags), (id, &[1, 0, 0, 0][..]), "{count}");
                        ids.push(*id);
                    }
                    _ => others.push(kind),
                }
                rest = behind;
            }
            assert_eq!(ids, (0..count).collect::<Vec<_>>());
            assert!(!ids.contains(&255));
            assert_eq!(others, [1], "an I/O APIC");
        }
    }

    #[test]
    fn the_tables_hang_together() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("guest memory");
        let slot = |window, irq| VirtioSlot { window: GuestAddress(window), size: 0x1000, irq };
        let virtio = vec![slot(0xd000_0000, 17), slot(0xd000_1000, 18)];
        let ecam = layout::ECAM;
        let pci = Some(PciHostBridge { ecam, ecam_size: 1 << 20, window: 4 << 30..5 << 30 });
        let platform = Platform { virtio, pci, serial: true, power_button: 16 };
        let domain = [
            Domain { start: GuestAddress(0), size: Bytes::mib(1), pluggable: false },
            Domain { start: GuestAddress(1 << 27), size: Bytes::mib(128), pluggable: true },
        ];
        write(&memory, "4".parse().expect("vCPUs"), &platform, &domain).expect("written");
        let read = |address: u64, length: usize| {
            let mut bytes = vec![0; length];
            memory.read_slice(&mut bytes, GuestAddress(address)).expect("in memory");
            bytes
        };
        let table = |address: u64| {
            let length: u32 = memory.read_obj(GuestAddress(address + 4)).expect("in memory");
            let bytes = read(address, length as usize);
            assert_eq!(sum(&bytes), 0, "{:?}", &bytes[..4]);
            bytes
        };
        let root = read(layout::ACPI.0, Rsdp::len());
        assert_eq!((&root[..8], sum(&root)), (&b"RSD PTR "[..], 0));
        let pointer = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let xsdt = table(pointer(&root, 24));
        let names: Vec<_> =
            xsdt[36..].chunks(8).map(|entry| table(pointer(entry, 0))[..4].to_vec()).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG", b"SRAT"]);
        // One ECAM, of segment 0 and bus 0 alone, behind 8 reserved bytes (PCI Firmware 3.2, table 4-3).
        let mcfg = table(pointer(&xsdt, 52));
        assert_eq!((mcfg.len(), pointer(&mcfg, 44), pointer(&mcfg, 52)), (60, ecam.0, 0));
        let dsdt = table(pointer(&table(pointer(&xsdt, 36)), 140));
        assert_eq!(dsdt.windows(8).filter(|text| text == b"LNRO0005").count(), 2);
    }
}
