//! The transport's state as data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::vectors::NO_VECTOR;
use super::{NotifyAddresses, VirtioPci};
use crate::pci::{ConfigState, MsiVectors, MsixState};
use crate::state::StateError;
use crate::virtio::device::VirtioDevice;
use crate::virtio::interrupt::{Deliver, Source};
use crate::virtio::saved::{TransportState, VirtioState};

/// The registers of a virtio device behind a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciState {
    /// Configuration space: where the BAR is, whether MSI-X is enabled.
    pub config: ConfigState,
    /// The MSI-X table.
    pub msix: MsixState,
    /// ISR status (virtio 1.2, section 4.1.4.5).
    pub isr: u8,
    /// config_msix_vector (section 4.1.4.3).
    pub config_vector: u16,
    /// queue_msix_vector of each queue.
    pub queue_vectors: Vec<u16>,
}

impl VirtioPci {
    pub(super) fn state(&self) -> TransportState {
        let queues = 0..self.core.queue_count();
        TransportState::Pci(PciState {
            config: self.config.save(),
            msix: self.msix.save(),
            isr: self.vectors.isr(),
            config_vector: self.vectors.get(Source::Config),
            queue_vectors: queues.map(|queue| self.vectors.get(Source::Queue(queue))).collect(),
        })
    }

    /// Puts `device`, which is new, behind a function as it was when `state` was saved. Its BAR is
    /// where the guest had it. Each queue gets an event, and the driver an interrupt for each queue.
    ///
    /// # Errors
    /// [`StateError`] says what in `state` no device of this kind can have come to.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        msi: Arc<dyn MsiVectors>,
        notify: Arc<dyn NotifyAddresses>,
        state: VirtioState,
    ) -> Result<Self, StateError> {
        let mut this = Self::new(device, memory, msi, notify, 0)?;
        this.core.check_device(state.device_id)?;
        let TransportState::Pci(registers) = state.transport else {
            return Err(state.transport.is_not("PCI"));
        };
        this.config.restore(&registers.config)?;
        if !this.vectors.restore_isr(registers.isr) {
            return Err(StateError::Register { register: "ISR status", value: u32::from(registers.isr) });
        }
        let (found, expected) = (registers.queue_vectors.len(), this.core.queue_count());
        if found != expected {
            return Err(StateError::OtherQueues { found, expected });
        }
        let queues = registers.queue_vectors.iter().enumerate();
        let vectors = queues.map(|(queue, vector)| (Source::Queue(queue), *vector));
        for (source, vector) in vectors.chain([(Source::Config, registers.config_vector)]) {
            this.vectors.set(source, vector);
            if this.vectors.get(source) != vector {
                return Err(StateError::Register { register: "an MSI-X vector", value: u32::from(vector) });
            }
        }
        this.core.restore(state.driver, state.device)?;
        this.msix.restore(&registers.msix)?;
        this.follow_config();
        this.interrupt_again();
        Ok(this)
    }

    /// Has every queue's interrupt delivered once more, as one may have been lost on the way. What is
    /// masked is pending or not, as it was.
    fn interrupt_again(&self) {
        for source in (0..self.core.queue_count()).map(Source::Queue) {
            let vector = self.vectors.get(source);
            if vector != NO_VECTOR && self.msix.delivers(vector) {
                self.vectors.deliver(source);
            }
        }
    }
}
