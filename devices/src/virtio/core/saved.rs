//! The state of a virtio device as data, whatever transport carries it.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};

use super::{Core, State};
use crate::state::{StateError, Version};
use crate::virtio::saved::{TransportState, VirtioState};

/// How far the driver has come (virtio 1.2, section 3.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// It has not found the device.
    Reset,
    /// ACKNOWLEDGE.
    Acknowledged,
    /// DRIVER.
    Driver,
    /// FEATURES_OK.
    FeaturesAgreed,
    /// DRIVER_OK.
    Running,
    /// FAILED, with the bits of the device status from before.
    Failed(u32),
}

/// One queue's registers, and how far the device has come with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Its size.
    pub size: u32,
    /// The descriptor area, a guest address.
    pub descriptors: u64,
    /// The driver area, a guest address.
    pub available: u64,
    /// The device area, a guest address.
    pub used: u64,
    /// Whether the driver has enabled it.
    pub ready: bool,
    /// The place in the available ring that the device reads next, modulo 2^16.
    pub next_available: u16,
    /// The place in the used ring that the device writes next, modulo 2^16.
    pub next_used: u16,
}

/// What the driver has made of a device, but for the transport's own registers and what the device
/// itself knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriverState {
    /// How far the driver has come.
    pub stage: Stage,
    /// DEVICE_NEEDS_RESET in the device status.
    pub broken: bool,
    /// The configuration atomicity value.
    pub generation: u32,
    /// The queue that registers about one are about.
    pub queue_select: u32,
    /// Which 32 of the device's feature bits are shown.
    pub device_features_select: u32,
    /// Which 32 of the driver's feature bits are shown.
    pub driver_features_select: u32,
    /// The features that the driver has accepted.
    pub driver_features: u64,
    /// Each queue.
    pub queues: Vec<QueueState>,
}

impl Core {
    /// The state of the device, with what its transport knows.
    pub(in crate::virtio) fn save(&self, transport: TransportState) -> Result<VirtioState, StateError> {
        let running = match &self.state {
            State::Running(active) => Some(active),
            _ => None,
        };
        let queues = self.queues.iter().enumerate();
        let changed = self.config_changed.load(Ordering::Acquire);
        let driver = DriverState {
            stage: match &self.state {
                State::Reset => Stage::Reset,
                State::Acknowledged => Stage::Acknowledged,
                State::Driver => Stage::Driver,
                State::FeaturesAgreed => Stage::FeaturesAgreed,
                State::Running(_) => Stage::Running,
                State::Failed(before) => Stage::Failed(*before),
            },
            broken: self.broken,
            generation: self.generation.wrapping_add(u32::from(changed)),
            queue_select: self.queue_select,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queues: queues
                .map(|(index, queue)| queue.save(running.and_then(|active| active.queues.get(index))))
                .collect(),
        };
        let (device_id, device) = (self.device_id(), self.device.save()?);
        Ok(VirtioState { version: Version, device_id, driver, transport, device })
    }

    /// Takes in what [`save`](Self::save) gave, into a device that is new. Each queue gets an event.
    ///
    /// # Errors
    /// [`StateError`] says what in it no device of this kind can have come to.
    pub(in crate::virtio) fn restore(
        &mut self,
        driver: DriverState,
        device: Value,
    ) -> Result<(), StateError> {
        self.check(&driver)?;
        self.queue_select = driver.queue_select;
        self.device_features_select = driver.device_features_select;
        self.driver_features_select = driver.driver_features_select;
        self.driver_features = driver.driver_features;
        self.generation = driver.generation;
        self.broken = driver.broken;
        self.restore_queues(&driver.queues)?;
        self.state = match driver.stage {
            Stage::Reset => State::Reset,
            Stage::Acknowledged => State::Acknowledged,
            Stage::Driver => State::Driver,
            Stage::FeaturesAgreed => State::FeaturesAgreed,
            Stage::Running => State::Running(self.activate()),
            Stage::Failed(before) => State::Failed(before),
        };
        let active = match &mut self.state {
            State::Running(active) => Some(active),
            _ => None,
        };
        self.device.restore(device, active)?;
        self.ring_all();
        Ok(())
    }

    fn check(&self, driver: &DriverState) -> Result<(), StateError> {
        let (found, expected) = (driver.queues.len(), self.queues.len());
        if found != expected {
            return Err(StateError::OtherQueues { found, expected });
        }
        let agreed = matches!(driver.stage, Stage::FeaturesAgreed | Stage::Running);
        let (features, offered) = (driver.driver_features, self.offered_features());
        if agreed && (features & !offered != 0 || features & 1 << VIRTIO_F_VERSION_1 == 0) {
            return Err(StateError::Features { features, offered });
        }
        let acknowledged = VIRTIO_CONFIG_S_ACKNOWLEDGE;
        let seen = acknowledged | VIRTIO_CONFIG_S_DRIVER;
        let agreed = seen | VIRTIO_CONFIG_S_FEATURES_OK;
        match driver.stage {
            Stage::Failed(before)
                if ![0, acknowledged, seen, agreed, agreed | VIRTIO_CONFIG_S_DRIVER_OK].contains(&before) =>
            {
                Err(StateError::Register { register: "Status", value: before })
            }
            _ => Ok(()),
        }
    }

    fn restore_queues(&mut self, states: &[QueueState]) -> Result<(), StateError> {
        let mut taken = Vec::new();
        for (index, (queue, state)) in self.queues.iter_mut().zip(states).enumerate() {
            if !queue.restore(state, &self.memory, &taken) {
                return Err(StateError::Queue { index });
            }
            if queue.is_ready() {
                taken.extend(queue.areas());
            }
        }
        Ok(())
    }

    /// # Errors
    /// [`StateError::OtherDevice`] where `found` is not what the device is.
    pub(in crate::virtio) fn check_device(&self, found: u32) -> Result<(), StateError> {
        let expected = self.device_id();
        if found == expected { Ok(()) } else { Err(StateError::OtherDevice { found, expected }) }
    }
}
