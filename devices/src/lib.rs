//! What a guest sees beside memory and CPUs. Nothing here knows KVM.

pub mod serial;
pub mod virtio;
