//! Devices of the PC platform that are not virtio: what a guest finds at fixed ports.

pub mod serial;
