//! What is asked of KVM for a whole VM: its memory, interrupt controllers and the routes of interrupts.

pub mod routing;
pub mod vectors;

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};

use crate::arch::x86_64::layout;
use crate::memory::Region;

/// KVM refused something.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused to {what}: {source}")]
pub struct KvmError {
    /// What was asked of it.
    pub what: &'static str,
    /// Why.
    pub source: kvm_ioctls::Error,
}

/// KVM for a test; `None`, with a loud word, where the host has none. In the lab it must have.
#[cfg(test)]
pub fn for_tests() -> Option<Kvm> {
    Kvm::new()
        .inspect_err(|error| {
            assert!(std::env::var_os("BALLAST_LAB").is_none(), "the lab's host has no KVM: {error}");
            eprintln!("SKIPPED: this host has no KVM: {error}");
        })
        .ok()
}

/// `map_err` with what was asked of KVM.
pub fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError { what, source }
}

/// A VM with its memory and interrupt controllers.
///
/// # Errors
/// [`KvmError`] says what KVM did not give.
pub fn create_vm(kvm: &Kvm, regions: &[Region]) -> Result<Arc<VmFd>, KvmError> {
    let vm = kvm.create_vm().map_err(refused("create a VM"))?;
    // Both are for Intel without unrestricted guests; elsewhere they do nothing.
    vm.set_identity_map_address(layout::IDENTITY_MAP).map_err(refused("set the identity map"))?;
    vm.set_tss_address(layout::TSS as usize).map_err(refused("set the TSS"))?;
    vm.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
    for (slot, region) in (0..).zip(regions) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.guest.0,
            memory_size: region.size.0,
            userspace_addr: region.host as u64,
        };
        // SAFETY: the range is guest RAM, which stays mapped for the life of the process, and
        // no two regions overlap.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("take the guest's memory"))?;
    }
    Ok(Arc::new(vm))
}
