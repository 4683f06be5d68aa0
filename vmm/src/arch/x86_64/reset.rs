//! What stands where a BIOS would have its reset vector.
//!
//! Linux takes hardware-reduced ACPI for a sign of EFI (`efi_reboot_required` in
//! arch/x86/platform/efi/quirks.c) and so reboots by EFI; without EFI it falls back to
//! real mode and a jump to ffff:0000. There, this machine has a few instructions that
//! write to the reset register.

use devices::platform::acpi_power;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::layout;

/// ffff:0000 (SDM volume 3, section 10.1.4, as seen from the first MiB).
const VECTOR: GuestAddress = GuestAddress(0xf_fff0);

/// Writes the instructions into guest memory; they are for real mode.
///
/// # Errors
/// When guest memory refuses the write.
pub fn write(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    let [low, high] = (layout::ACPI_POWER + acpi_power::RESET).to_le_bytes();
    let code = [
        0xba,
        low,
        high, // mov dx, RESET
        0xb0,
        acpi_power::RESET_VALUE, // mov al, RESET_VALUE
        0xee,                    // out dx, al
        0xfa,                    // cli
        0xf4,                    // hlt
        0xeb,
        0xfc, // jmp to cli
    ];
    memory.write_slice(&code, VECTOR)
}
