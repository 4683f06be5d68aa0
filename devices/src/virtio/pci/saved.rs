//! The transport's state as data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::GuestMemoryMmap;

use super::vectors::NO_VECTOR;
use super::{NotifyAddresses, VirtioPci};
use crate::pci::{ConfigState, MsiVectors, MsixState};
use crate::state::{StateError, Version};
use crate::virtio::core::saved::DriverState;
use crate::virtio::device::VirtioDevice;
use crate::virtio::interrupt::{Deliver, Source};

/// A virtio device behind a PCI function, with all that it needs to go on elsewhere but the guest's
/// memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciState {
    /// Of this struct; the device's own state has one too.
    pub version: Version<1>,
    /// The device's number (virtio 1.2, section 5).
    pub device_id: u32,
    /// What the driver has made of it.
    pub driver: DriverState,
    /// Configuration space: where the BAR is, whether MSI-X is enabled.
    pub config: ConfigState,
    /// The MSI-X table.
    pub msix: MsixState,
    /// ISR status (section 4.1.4.5).
    pub isr: u8,
    /// config_msix_vector (section 4.1.4.3).
    pub config_vector: u16,
    /// queue_msix_vector of each queue.
    pub queue_vectors: Vec<u16>,
    /// What the device itself knows.
    pub device: Value,
}

impl VirtioPci {
    /// The state of the device and its transport. The guest's vCPUs must stand still and the device be
    /// drained until the guest's memory is saved too.
    ///
    /// # Errors
    /// [`StateError::NotSaved`] where the device has not learnt it.
    pub fn save(&self) -> Result<PciState, StateError> {
        let (driver, device) = self.core.save()?;
        let queues = 0..self.core.queue_count();
        Ok(PciState {
            version: Version,
            device_id: self.core.device_id(),
            driver,
            config: self.config.save(),
            msix: self.msix.save(),
            isr: self.vectors.isr(),
            config_vector: self.vectors.get(Source::Config),
            queue_vectors: queues.map(|queue| self.vectors.get(Source::Queue(queue))).collect(),
            device,
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
        state: PciState,
    ) -> Result<Self, StateError> {
        let mut this = Self::new(device, memory, msi, notify, 0)?;
        this.core.check_device(state.device_id)?;
        this.config.restore(&state.config)?;
        if !this.vectors.restore_isr(state.isr) {
            return Err(StateError::Register { register: "ISR status", value: u32::from(state.isr) });
        }
        let (found, expected) = (state.queue_vectors.len(), this.core.queue_count());
        if found != expected {
            return Err(StateError::OtherQueues { found, expected });
        }
        let queues = state.queue_vectors.iter().enumerate();
        let vectors = queues.map(|(queue, vector)| (Source::Queue(queue), *vector));
        for (source, vector) in vectors.chain([(Source::Config, state.config_vector)]) {
            this.vectors.set(source, vector);
            if this.vectors.get(source) != vector {
                return Err(StateError::Register { register: "an MSI-X vector", value: u32::from(vector) });
            }
        }
        this.core.restore(state.driver, state.device)?;
        this.msix.restore(&state.msix)?;
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
