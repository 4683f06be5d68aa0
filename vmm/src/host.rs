//! What this host can do for guests, and what to do about what it can't.

use std::io;

use kvm_ioctls::{Cap, Kvm};

/// Why stock guests can't run here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostCannot {
    /// No /dev/kvm.
    #[error(
        "this host has no /dev/kvm: load kvm_intel or kvm_amd (modprobe), or switch on virtualization in the \
         firmware or in the hypervisor above; `make lab` runs guests without it"
    )]
    NoKvm,
    /// No permission.
    #[error("/dev/kvm is not yours to open: join the group kvm (sudo usermod -aG kvm $USER) and log in anew")]
    NotPermitted,
    /// Something else is wrong with it.
    #[error("/dev/kvm can't be used: {0}")]
    Broken(String),
    /// Too old, or of another kind.
    #[error("this host's KVM lacks {0}: use a newer kernel")]
    Lacks(&'static str),
}

/// What every guest needs of KVM, by the names of linux/kvm.h.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
];

/// The stable API (Documentation/virt/kvm/api.rst).
const API_VERSION: i32 = 12;

/// Opens /dev/kvm.
fn open() -> Result<Kvm, HostCannot> {
    Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => HostCannot::NoKvm,
        libc::EACCES | libc::EPERM => HostCannot::NotPermitted,
        other => HostCannot::Broken(io::Error::from_raw_os_error(other).to_string()),
    })
}

/// Opens /dev/kvm where stock guests run.
///
/// # Errors
/// [`HostCannot`] says what is missing and what to do.
pub fn open_for_guests() -> Result<Kvm, HostCannot> {
    let kvm = open()?;
    if kvm.get_api_version() != API_VERSION {
        return Err(HostCannot::Lacks("the stable API (version 12)"));
    }
    if let Some((_, name)) = NEEDED.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        return Err(HostCannot::Lacks(name));
    }
    Ok(kvm)
}
