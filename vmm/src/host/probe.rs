//! A guest of a few instructions that tells whether the processor itself runs ring 0.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::Verdict;
use crate::arch::x86_64::registers;
use crate::boot::kernel::Entry;

/// Room for the tables of [`registers::special`] and the few bytes below.
const MEMORY: usize = 64 << 10;
const CODE: GuestAddress = GuestAddress(0x1000);
const HANDLER: GuestAddress = GuestAddress(0x2000);
const IDT: GuestAddress = GuestAddress(0x3000);
const STACK: u64 = 0x5000;

/// The vector of a breakpoint (SDM volume 3, table 6-1).
const BREAKPOINT: u64 = 3;

/// What stock kernels do early on and an emulator may not know, with a port written after each.
const STEPS: [(u16, &str); 2] = [(0x10, "lock cmpxchg16b"), (0x11, "int3")];

const INSTRUCTIONS: &[u8] = &[
    0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x00, 0x40, 0x00, 0x00, // lock cmpxchg16b [0x4000]
    0xe6, 0x10, // out 0x10, al
    0xcc, // int3
    0xe6, 0x11, // out 0x11, al
    0xf4, // hlt
];
/// iretq
const RETURN: &[u8] = &[0x48, 0xcf];

/// Runs the guest.
pub fn ring0(kvm: &Kvm) -> Verdict {
    try_ring0(kvm).unwrap_or_else(|why| Verdict::Unclear { why })
}

fn try_ring0(kvm: &Kvm) -> Result<Verdict, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(|e| text(&e))?;
    memory.write_slice(INSTRUCTIONS, CODE).map_err(|e| text(&e))?;
    memory.write_slice(RETURN, HANDLER).map_err(|e| text(&e))?;
    // A 64-bit interrupt gate (SDM volume 3, figure 6-8) to code segment 0x10.
    let gate = (HANDLER.0 & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (HANDLER.0 >> 16 & 0xffff) << 48;
    memory.write_obj(gate, GuestAddress(IDT.0 + BREAKPOINT * 16)).map_err(|e| text(&e))?;

    let vm = kvm.create_vm().map_err(|e| text(&e))?;
    let host = memory.get_host_address(GuestAddress(0)).map_err(|e| text(&e))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the range is `memory`, which lives longer than the VM.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| text(&e))?;
    let mut vcpu = vm.create_vcpu(0).map_err(|e| text(&e))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| text(&e))?;
    vcpu.set_cpuid2(&cpuid).map_err(|e| text(&e))?;
    let entry = Entry::Linux64(CODE);
    let sregs = vcpu.get_sregs().map_err(|e| text(&e))?;
    let mut sregs = registers::special(entry, sregs, &memory).map_err(|e| text(&e))?;
    sregs.idt.base = IDT.0;
    sregs.idt.limit = (BREAKPOINT * 16 + 15) as u16;
    vcpu.set_sregs(&sregs).map_err(|e| text(&e))?;
    let mut regs = registers::general(entry);
    regs.rsp = STACK;
    vcpu.set_regs(&regs).map_err(|e| text(&e))?;

    for (port, instruction) in STEPS {
        let exit = vcpu.run().map_err(|e| text(&e))?;
        if !matches!(exit, VcpuExit::IoOut(seen, _) if seen == port) {
            let evidence = format!("`{instruction}` at ring 0 ended in {exit:?}");
            return Ok(Verdict::EmulatesRing0 { evidence });
        }
    }
    Ok(Verdict::RunsStockKernels)
}
