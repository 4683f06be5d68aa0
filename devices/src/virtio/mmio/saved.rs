//! The transport's state as data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::Mmio;
use crate::state::{StateError, Version};
use crate::virtio::core::saved::DriverState;
use crate::virtio::device::VirtioDevice;

/// A virtio device behind memory-mapped registers, with all that it needs to go on elsewhere but
/// the guest's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState {
    /// Of this struct; the device's own state has one too.
    pub version: Version<1>,
    /// The device's number (virtio 1.2, section 5).
    pub device_id: u32,
    /// What the driver has made of it.
    pub driver: DriverState,
    /// InterruptStatus (section 4.2.2).
    pub interrupt_status: u32,
    /// What the device itself knows.
    pub device: Value,
}

impl Mmio {
    /// The state of the device and its transport. The guest's vCPUs must stand still and the device be
    /// drained until the guest's memory is saved too.
    ///
    /// # Errors
    /// [`StateError::NotSaved`] where the device has not learnt it.
    pub fn save(&self) -> Result<MmioState, StateError> {
        let (driver, device) = self.core.save()?;
        Ok(MmioState {
            version: Version,
            device_id: self.core.device_id(),
            driver,
            interrupt_status: self.line.save(),
            device,
        })
    }

    /// Puts `device`, which is new, behind registers as they were when `state` was saved.
    /// Each queue gets an event, and the driver an interrupt where one may have been lost.
    ///
    /// # Errors
    /// [`StateError`] says what in `state` no device of this kind can have come to.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        irq: EventFd,
        state: MmioState,
    ) -> Result<Self, StateError> {
        let mut mmio = Self::new(device, memory, irq)?;
        mmio.core.check_device(state.device_id)?;
        let reasons = state.interrupt_status;
        if reasons & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) != 0 {
            return Err(StateError::Register { register: "InterruptStatus", value: reasons });
        }
        mmio.core.restore(state.driver, state.device)?;
        mmio.line.restore(reasons);
        Ok(mmio)
    }
}
