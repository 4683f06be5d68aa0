//! A virtio device as data, with all that it needs to go on elsewhere but the guest's memory.

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use super::core::saved::{DriverState, QueueState, Stage};
pub use super::pci::saved::PciState;
use crate::state::{StateError, Version};

/// A device behind its transport.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    /// Of this struct; the device's own state has one too.
    pub version: Version<1>,
    /// The device's number (virtio 1.2, section 5).
    pub device_id: u32,
    /// What the driver has made of it.
    pub driver: DriverState,
    /// The registers that only its transport has.
    pub transport: TransportState,
    /// What the device itself knows.
    pub device: Value,
}

/// What a transport knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum TransportState {
    /// Memory-mapped registers.
    Mmio {
        /// InterruptStatus (section 4.2.2).
        interrupt_status: u32,
    },
    /// A PCI function.
    Pci(PciState),
}

impl TransportState {
    /// # Errors
    /// Always: this is of the other transport than `expected`.
    pub(super) fn is_not(&self, expected: &'static str) -> StateError {
        let found = match self {
            Self::Mmio { .. } => "mmio",
            Self::Pci(_) => "PCI",
        };
        StateError::OtherTransport { found, expected }
    }
}
