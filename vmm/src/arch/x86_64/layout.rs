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
/// SMBIOS's entry point, with its tables behind it: in the area where kernels look for it (DSP0134, section 5.2), far
/// behind the ACPI tables and before the reset vector.
pub const SMBIOS: GuestAddress = GuestAddress(0xf_0000);
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
/// Where a guest notes that it sleeps ([`devices::platform::sleep_note`]).
pub const SLEEP_NOTE: u16 = 0x604;
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

/// A memory block of Linux on x86, in a guest that boots with `boot` (`probe_memory_block_size`).
fn memory_block(boot: Bytes) -> Bytes {
    // Linux goes by where memory ends, not by how much there is.
    let end = ram(boot).last().map_or(0, |(start, size)| start.0.saturating_add(size.0));
    if end < Bytes::gib(64).0 { Bytes::mib(128) } else { Bytes::gib(2) }
}

/// Where memory can be plugged into a guest that boots with `boot`, for up to `more`.
///
/// Whole memory blocks of Linux on x86 (`probe_memory_block_size`: 128 MiB, up to 2 GiB in a
/// guest whose boot memory ends at 64 GiB or above), as its driver uses only those. Below the hole where they fit:
/// a guest without memory above 4 GiB spares the 64 MiB that Linux sets aside for devices which
/// can't reach there.
pub fn pluggable(boot: Bytes, more: Bytes) -> (GuestAddress, Bytes) {
    let block = memory_block(boot);
    let up = |value: u64| value.div_ceil(block.0).saturating_mul(block.0);
    let size = Bytes(up(more.0));
    let start = up(boot.0);
    if start.saturating_add(size.0) <= HOLE.start {
        return (GuestAddress(start), size);
    }
    let high = boot.saturating_sub(Bytes(HOLE.start));
    (GuestAddress(up(HOLE.end.saturating_add(high.0))), size)
}

/// The most that one memory slot of KVM may have (`KVM_MEM_MAX_NR_PAGES`: 2^31 - 1 pages).
const MOST_IN_SLOT: Bytes = Bytes(((1 << 31) - 1) * 4096);

/// More memory than the guest's processor can address, or than KVM takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest can't have {asked} of memory: on this host, whose processors' addresses have {bits} bits, it can \
     have {most} at most{}; give it less (`max` in --memory)",
    if *.has_pci { ", with 1 GiB above it for PCI devices (--transport mmio does without)" } else { "" }
)]
pub struct TooMuchMemory {
    /// What it should have.
    pub asked: Bytes,
    /// Bits in a guest physical address.
    pub bits: u32,
    /// What it can have.
    pub most: Bytes,
    /// Whether it reaches its devices by PCI.
    pub has_pci: bool,
}

/// Where the memory ends of a guest that boots with `boot` and may plug `more`, and so where PCI devices
/// may begin.
///
/// # Errors
/// [`TooMuchMemory`] where that, with room for PCI devices if it `has_pci`, is beyond what addresses of `bits`
/// bits reach.
pub fn memory_end(boot: Bytes, more: Bytes, bits: u32, has_pci: bool) -> Result<GuestAddress, TooMuchMemory> {
    let window = if has_pci { PCI_WINDOW } else { Bytes::ZERO };
    // Whole GiB, as the window is.
    let reach = Bytes(1u64.checked_shl(bits).unwrap_or(u64::MAX)).saturating_sub(window).0;
    let most_above = reach.saturating_sub(HOLE.end).min(MOST_IN_SLOT.0);
    let most_boot = Bytes(reach.min(HOLE.start).saturating_add(most_above));
    let (asked, has_more) = (boot.saturating_add(more), more > Bytes::ZERO);
    let most = if has_more && boot <= most_boot {
        let (start, size) = pluggable(boot, more);
        if start.0.checked_add(size.0).is_some_and(|end| end <= reach) && size <= MOST_IN_SLOT {
            return Ok(GuestAddress(start.0.saturating_add(size.0)));
        }
        // What is plugged begins where it would, above the hole, and ends at a whole block.
        let (start, _) = pluggable(boot, Bytes(HOLE.end));
        let block = memory_block(boot);
        let whole = Bytes(reach.saturating_sub(start.0).min(MOST_IN_SLOT.0) / block.0 * block.0);
        boot.saturating_add(whole)
    } else {
        most_boot
    };
    if has_more || boot > most_boot {
        // Whole GiB: what is shown is rounded, and must not be rounded up.
        let most = Bytes(most.0 / Bytes::gib(1).0 * Bytes::gib(1).0);
        return Err(TooMuchMemory { asked, bits, most, has_pci });
    }
    let end = ram(boot).last().map_or(0, |(start, size)| start.0.saturating_add(size.0));
    Ok(GuestAddress(end))
}

/// Where the registers of PCI devices are, in a guest whose memory (with what may be plugged) ends at `end`.
pub fn pci_window(end: GuestAddress) -> Range<u64> {
    let start = end.0.max(HOLE.end).next_multiple_of(PCI_WINDOW.0);
    start..start.saturating_add(PCI_WINDOW.0)
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
    fn pci_devices_find_room_above_memory() {
        let gib = |end| {
            let window = pci_window(GuestAddress(end));
            (window.start >> 30, window.end >> 30)
        };
        assert_eq!(gib(0), (4, 5));
        assert_eq!(gib((63 << 30) - 4096), (63, 64));
        assert_eq!(gib((63 << 30) + 4096), (64, 65));
    }

    /// On 40 bits: 1 TiB in all, with a hole of 1 GiB, and as much for PCI devices.
    #[test]
    fn more_memory_than_addresses_reach_is_refused_with_what_would_do() {
        let most = |boot, more, has_pci| {
            memory_end(Bytes::gib(boot), Bytes::gib(more), 40, has_pci).map_err(|error| error.most.0 >> 30)
        };
        assert_eq!(most(1022, 0, true), Ok(GuestAddress(1023 << 30)));
        assert_eq!(most(1023, 0, true), Err(1022));
        assert_eq!(most(1023, 0, false), Ok(GuestAddress(1024 << 30)));
        assert_eq!(most(1024, 0, false), Err(1023));
        assert_eq!(most(1, 1023, true), Err(1020));
        assert_eq!(most(1, 1019, true), Ok(GuestAddress(1023 << 30)));
        assert_eq!(most(1024, 1, true), Err(1022));
        let error = memory_end(Bytes::gib(1024), Bytes::ZERO, 40, true).expect_err("too much");
        let text = error.to_string();
        for part in ["1 TiB", "40 bits", "1022 GiB", "max", "--transport mmio"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    /// KVM's slots have an end of their own.
    #[test]
    fn a_slot_of_kvm_is_never_asked_to_hold_more_than_it_takes() {
        let most = |boot, more| memory_end(Bytes(boot), Bytes(more), 52, true).map_err(|error| error.most);
        let highest = HOLE.start + MOST_IN_SLOT.0;
        assert_eq!(most(highest, 0), Ok(GuestAddress(HOLE.end + MOST_IN_SLOT.0)));
        assert_eq!(most(highest + 4096, 0), Err(Bytes::gib(8194)));
        assert_eq!(most(u64::MAX, u64::MAX), Err(Bytes::gib(8194)));
        assert_eq!(most(1 << 30, u64::MAX), Err(Bytes(8 << 40)));
    }

    proptest! {
        /// What is refused would do with as much as is said, and with no block more.
        #[test]
        fn what_is_said_to_fit_fits(
            boot in 64u64..1 << 22, more in 0u64..1 << 22, bits in 36u32..45, has_pci: bool,
        ) {
            let (boot, more) = (Bytes::mib(boot), Bytes::mib(more));
            match memory_end(boot, more, bits, has_pci) {
                Ok(end) => {
                    let window = if has_pci { PCI_WINDOW.0 } else { 0 };
                    prop_assert!(end.0 + window <= 1 << bits);
                }
                Err(TooMuchMemory { most, .. }) => {
                    prop_assert!(most < boot.saturating_add(more));
                    let (boot, more) = (boot.min(most), most.saturating_sub(boot));
                    prop_assert!(memory_end(boot, more, bits, has_pci).is_ok());
                    let more = more.saturating_add(Bytes::gib(4));
                    prop_assert!(memory_end(boot, more, bits, has_pci).is_err());
                }
            }
        }

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
