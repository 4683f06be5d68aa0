//! vCPUs as they are before the guest runs.

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

use crate::arch::x86_64::{cpuid, registers};
use crate::boot::kernel::Entry;
use crate::config::Cpus;
use crate::kvm::{KvmError, refused};

// SDM volume 4, table 2-2.
const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1 << 0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs are on, and all memory is write-back where none says otherwise.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Why there are no vCPUs.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM gives fewer to a VM.
    #[error("a VM can't have {asked} vCPUs here: this host's KVM gives it {most} at most (--cpus)")]
    TooMany {
        /// How many it should have.
        asked: u8,
        /// How many it can have.
        most: usize,
    },
    /// Guest memory has no place for a table.
    #[error("boot data could not be written to guest memory: {0}")]
    Tables(#[from] GuestMemoryError),
}

/// Whether KVM gives a VM so many vCPUs, of which it gives `most`.
///
/// # Errors
/// [`VcpuError::TooMany`].
pub const fn check(cpus: Cpus, most: usize) -> Result<(), VcpuError> {
    let asked = cpus.get();
    if asked as usize <= most { Ok(()) } else { Err(VcpuError::TooMany { asked, most }) }
}

/// All vCPUs of a VM, of what KVM has `supported`. The first starts at `entry`, with its tables in `memory`; the others wait in their
/// local APICs until the guest starts them.
///
/// # Errors
/// [`VcpuError`] says what could not be had.
pub fn create_all(
    vm: &VmFd,
    supported: &CpuId,
    cpus: Cpus,
    memory: &GuestMemoryMmap,
    entry: Entry,
) -> Result<Vec<VcpuFd>, VcpuError> {
    let emulated = cpuid::host_is_emulated();
    let mut vcpus = Vec::new();
    for index in 0..cpus.get() {
        let vcpu = vm.create_vcpu(index.into()).map_err(refused("create a vCPU"))?;
        let cpuid = cpuid::of_vcpu(supported, index, cpus, emulated);
        vcpu.set_cpuid2(&cpuid).map_err(refused("set a vCPU's CPUID"))?;
        set_msrs(&vcpu)?;
        vcpu.set_fpu(&registers::floating_point()).map_err(refused("set a vCPU's FPU"))?;
        if index == 0 {
            let sregs = vcpu.get_sregs().map_err(refused("read a vCPU's registers"))?;
            let sregs = registers::special(entry, sregs, memory)?;
            vcpu.set_sregs(&sregs).map_err(refused("set a vCPU's segments"))?;
            vcpu.set_regs(&registers::general(entry)).map_err(refused("set a vCPU's registers"))?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    for (index, data) in [(IA32_MISC_ENABLE, FAST_STRINGS), (IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK)] {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        // One entry always fits; a processor that lacks the register goes without.
        if let Ok(msrs) = Msrs::from_entries(&[entry]) {
            vcpu.set_msrs(&msrs).map_err(refused("set a vCPU's model-specific registers"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_vcpus_than_kvm_gives_are_refused_by_both_numbers() {
        let cpus = |count: u8| Cpus::try_from(count).expect("a number of vCPUs");
        assert!(check(cpus(16), 16).is_ok());
        let refused = check(cpus(17), 16).expect_err("one too many").to_string();
        assert!(refused.contains("17 vCPUs") && refused.contains("16 at most"), "{refused}");
    }
}
