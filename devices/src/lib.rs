//! What a guest sees beside memory and CPUs. Nothing here knows KVM.

pub mod serial;
#[cfg(feature = "testing")]
pub mod testing;
pub mod virtio;
