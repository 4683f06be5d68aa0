//! virtio 1.2: what a device is ([`device`]) and how a guest reaches it.

pub mod device;
