//! The transport's state as data.

use std::sync::Arc;

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::Mmio;
use crate::state::StateError;
use crate::virtio::device::VirtioDevice;
use crate::virtio::saved::{TransportState, VirtioState};

impl Mmio {
    /// Puts `device`, which is new, behind registers as they were when `state` was saved.
    /// Each queue gets an event, and the driver an interrupt where one may have been lost.
    ///
    /// # Errors
    /// [`StateError`] says what in `state` no device of this kind can have come to.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        irq: EventFd,
        state: VirtioState,
    ) -> Result<Self, StateError> {
        let mut mmio = Self::new(device, memory, irq)?;
        mmio.core.check_device(state.device_id)?;
        let TransportState::Mmio { interrupt_status } = state.transport else {
            return Err(state.transport.is_not("mmio"));
        };
        if interrupt_status & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) != 0 {
            return Err(StateError::Register { register: "InterruptStatus", value: interrupt_status });
        }
        mmio.core.restore(state.driver, state.device)?;
        mmio.line.restore(interrupt_status);
        Ok(mmio)
    }

    pub(super) fn state(&self) -> TransportState {
        TransportState::Mmio { interrupt_status: self.line.save() }
    }
}
