//! What a guest sees beside memory and CPUs. Nothing here knows KVM.

pub mod bucket;
pub mod events;
pub mod pci;
pub mod platform;
pub mod sandbox;
pub mod state;
#[cfg(feature = "testing")]
pub mod testing;
pub mod virtio;
