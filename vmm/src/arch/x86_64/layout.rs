//! Where things stand in the guest's physical address space and on its interrupt lines.
//!
//! Below 1 MiB only what booting needs; RAM from there to the hole under 4 GiB;
//! what doesn't fit goes on above 4 GiB.

use std::ops::{Range, RangeInclusive};

use api::units::Bytes;
use vm_memory::GuestAddress;

/// The descriptor table that the first vCPU starts with.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// PVH's start info, with its memory map and module list behind it.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// Linux's boot parameters, the "zero page" (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Six pages of page tables that map the first 4 GiB one to one.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line, up to [`CMDLINE_CAPACITY`].
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The longest command line: what Linux on x86 takes (COMMAND_LINE_SIZE), with its final zero.
pub const CMDLINE_CAPACITY: usize = 2048;
/// End of the memory below 1 MiB that the guest may use.
pub const LOW_END: GuestAddress = GuestAddress(0x9_fc00);
/// The ACPI tables, root pointer first: in the area that a BIOS would fill, where even
/// a kernel that is not told about them looks (ACPI 6.5, section 5.2.5.1).
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// Where RAM proper begins, and kernels are loaded.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// The hole in RAM for devices, up to 4 GiB.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// The windows of virtio-mmio devices.
pub const WINDOWS: Range<u64> = 0xd000_0000..0xd010_0000;
/// PCI's configuration space as memory.
pub const ECAM: GuestAddress = GuestAddress(0xe000_0000);
/// Room for the registers of PCI devices, above all memory. Linux maps nothing of it that is not used.
pub const PCI_WINDOW: Bytes = Bytes::gib(1);
/// KVM's in-kernel IOAPIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs (SDM volume 3, section 11.4.1).
pub const LAPIC: u32 = 0xfee0_0000;
/// A page that KVM on Intel needs for real mode (KVM_SET_IDENTITY_MAP_ADDR).
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM on Intel needs (KVM_SET_TSS_ADDR).
pub const TSS: u64 = 0xfffb_d000;

/// The first serial port.
pub const COM1: u16 = 0x3f8;
/// Its interrupt, as ever since the PC/AT.
pub const COM1_IRQ: u32 = 4;
/// The IOAPIC's pins that are given to devices: above the 16 that the old PIC knows.
pub const FREE_PINS: RangeInclusive<u32> = 16..=23;

/// pvpanic's port, as QEMU places it (docs/specs/pvpanic).
pub const PVPANIC: u16 = 0x505;
/// The ACPI power registers ([`devices::platform::acpi_power`]).
pub const ACPI_POWER: u16 = 0x600;
/// The keyboard controller's command port: nothing is there but its reset line.
pub const KEYBOARD_COMMAND: u16 = 0x64;

/// The RAM of a guest with `size` bytes: one region, or two around the hole.
pub fn ram(size: Bytes) -> Vec<(GuestAddress, Bytes)> {
    let low = Bytes(size.0.min(HOLE.start));
    let high = size.saturating_sub(low);
    let mut regions = vec![(GuestAddress(0), low)];
    if high > Bytes::ZERO {
        regions.push((GuestAddress(HOLE.end), high));
    }
    regions
}

/// Where memory can be plugged into a guest that boots with `boot`, for up to `more`.
///
/// Whole memory blocks of Linux on x86 (`probe_memory_block_size`: 128 MiB, up to 2 GiB in a
/// guest whose boot memory ends at 64 GiB or above), as its driver uses only those. Below the hole where they fit:
/// a guest without memory above 4 GiB spares the 64 MiB that Linux sets aside for devices which
/// can't reach there.
pub fn pluggable(boot: Bytes, more: Bytes) -> (GuestAddress, Bytes) {
    // Linux goes by where memory ends, not by how much there is.
    let end = ram(boot).last().map_or(0, |(start, size)| start.0.saturating_add(size.0));
    let block = if end < Bytes::gib(64).0 { Bytes::mib(128) } else { Bytes::gib(2) };
    let up = |value: u64| value.div_ceil(block.0).saturating_mul(block.0);
    let size = Bytes(up(more.0));
    let start = up(boot.0);
    if start.saturating_add(size.0) <= HOLE.start {
        return (GuestAddress(start), size);
    }
    let high = boot.saturating_sub(Bytes(HOLE.start));
    (GuestAddress(up(HOLE.end.saturating_add(high.0))), size)
}

/// The guest's processor can't address PCI devices above so much memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no room for PCI devices above the guest's memory, as its processor's addresses have {bits} bits: \
     give it less memory, or its devices `--transport mmio`"
)]
pub struct NoPciWindow {
    /// Bits in a guest physical address.
    pub bits: u32,
}

/// Where the registers of PCI devices are, in a guest whose memory (with what may be plugged) ends at `end`.
///
/// # Errors
/// [`NoPciWindow`] where that lies beyond what the processor can address.
pub fn pci_window(end: GuestAddress, bits: u32) -> Result<Range<u64>, NoPciWindow> {
    let no_room = NoPciWindow { bits };
    let size = PCI_WINDOW.0;
    let start = end.0.max(HOLE.end).checked_next_multiple_of(size).ok_or(no_room)?;
    let end = start.checked_add(size).ok_or(no_room)?;
    let reachable = 1u64.checked_shl(bits).is_none_or(|limit| end <= limit);
    if reachable { Ok(start..end) } else { Err(no_room) }
}

/// One range of the guest's memory map, and whether it is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// Where it starts.
    pub start: GuestAddress,
    /// How long it is.
    pub size: Bytes,
    /// RAM; else reserved.
    pub usable: bool,
}

/// The memory map that the guest is told (e820, or PVH's), with devices at `reserved` where that is not
/// empty: Linux takes no ECAM that the map leaves out.
pub fn memory_map(size: Bytes, reserved: Range<u64>) -> Vec<MapEntry> {
    let entry = |range: Range<u64>, usable| MapEntry {
        start: GuestAddress(range.start),
        size: Bytes(range.end.saturating_sub(range.start)),
        usable,
    };
    let mut map = vec![entry(0..LOW_END.0, true), entry(ACPI.0..HIGH_MEMORY.0, false)];
    for (start, size) in ram(size) {
        map.push(entry(start.0.max(HIGH_MEMORY.0)..start.0.saturating_add(size.0), true));
    }
    if !reserved.is_empty() {
        map.push(entry(reserved, false));
    }
    map.sort_by_key(|entry| entry.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_small_guest_is_plugged_below_the_hole() {
        let (start, size) = pluggable(Bytes::mib(200), Bytes::mib(500));
        assert_eq!((start, size), (GuestAddress(256 << 20), Bytes::mib(512)));
        let (start, size) = pluggable(Bytes::mib(256), Bytes::gib(3));
        assert_eq!((start, size), (GuestAddress(4 << 30), Bytes::gib(3)));
    }

    /// With the hole of 1 GiB, 63 GiB end at 64.
    #[test]
    fn memory_blocks_grow_with_where_memory_ends() {
        let start = |mib| pluggable(Bytes::mib(mib), Bytes::gib(1)).0.0;
        assert_eq!(start((63 << 10) - 128), (64 << 30) - (128 << 20));
        for mib in [63 << 10, (63 << 10) + 128, 64 << 10] {
            assert_eq!(start(mib) % (2 << 30), 0, "{mib} MiB");
        }
        let (start, size) = pluggable(Bytes::gib(63), Bytes::gib(1));
        assert_eq!((start.0, size), (64 << 30, Bytes::gib(2)));
    }

    #[test]
    fn devices_in_the_hole_keep_apart() {
        let ecam = ECAM.0..ECAM.0 + devices::pci::access::ECAM_SIZE;
        assert!(HOLE.start <= WINDOWS.start && WINDOWS.end <= ecam.start && ecam.end <= u64::from(IOAPIC));
    }

    #[test]
    fn pci_devices_find_room_above_memory_or_say_why_not() {
        let gib = |range: Result<Range<u64>, NoPciWindow>| range.map(|r| (r.start >> 30, r.end >> 30));
        assert_eq!(gib(pci_window(GuestAddress(0), 36)), Ok((4, 5)));
        assert_eq!(gib(pci_window(GuestAddress((63 << 30) - 4096), 36)), Ok((63, 64)));
        assert_eq!(gib(pci_window(GuestAddress((63 << 30) + 4096), 36)), Err(NoPciWindow { bits: 36 }));
        assert_eq!(gib(pci_window(GuestAddress((63 << 30) + 4096), 40)), Ok((64, 65)));
        assert!(pci_window(GuestAddress(u64::MAX), 64).is_err());
    }

    proptest! {
        #[test]
        fn pluggable_memory_stands_apart(mib in 64u64..1 << 20, more in 1u64..1 << 20) {
            let boot = Bytes::mib(mib);
            let (start, size) = pluggable(boot, Bytes::mib(more));
            let end = start.0 + size.0;
            prop_assert!(size >= Bytes::mib(more) && size.0 % (128 << 20) == 0 && start.0 % (128 << 20) == 0);
            prop_assert!(end <= HOLE.start || start.0 >= HOLE.end);
            for (ram, len) in ram(boot) {
                prop_assert!(ram.0 + len.0 <= start.0 || end <= ram.0);
            }
        }

        #[test]
        fn the_map_covers_ram_and_leaves_the_hole(mib in 64u64..1 << 20) {
            let size = Bytes::mib(mib);
            let ecam = ECAM.0..ECAM.0 + (1 << 20);
            let regions = ram(size);
            prop_assert_eq!(regions.iter().map(|(_, size)| *size).sum::<Bytes>(), size);
            let map = memory_map(size, ecam.clone());
            prop_assert!(map.iter().any(|entry| !entry.usable && entry.start == ECAM && entry.size == Bytes::mib(1)));
            for entry in &map {
                let end = entry.start.0 + entry.size.0;
                if entry.usable {
                    prop_assert!(end <= HOLE.start || entry.start.0 >= HOLE.end);
                    prop_assert!(regions.iter().any(|(start, size)| start.0 <= entry.start.0 && end <= start.0 + size.0));
                }
            }
            for pair in map.windows(2) {
                prop_assert!(pair[0].start.0 + pair[0].size.0 <= pair[1].start.0);
            }
        }
    }
}
