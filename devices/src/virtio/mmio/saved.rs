//! The transport's state as data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{Active, Mmio, State};
use crate::state::{StateError, Version};
use crate::virtio::device::VirtioDevice;

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
    /// FAILED, with the bits of Status from before.
    Failed(u32),
}

/// One queue's registers (section 4.2.2), and how far the device has come with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// QueueNum.
    pub size: u32,
    /// QueueDesc, a guest address.
    pub descriptors: u64,
    /// QueueDriver, a guest address.
    pub available: u64,
    /// QueueDevice, a guest address.
    pub used: u64,
    /// QueueReady.
    pub ready: bool,
    /// The place in the available ring that the device reads next, modulo 2^16.
    pub next_available: u16,
    /// The place in the used ring that the device writes next, modulo 2^16.
    pub next_used: u16,
}

/// The interrupt line's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LineState {
    /// InterruptStatus.
    pub reasons: u32,
    /// ConfigGeneration.
    pub generation: u32,
    /// DEVICE_NEEDS_RESET in Status.
    pub broken: bool,
}

/// A virtio device behind memory-mapped registers, with all that it needs to go on elsewhere but
/// the guest's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState {
    /// Of this struct; the device's own state has one too.
    pub version: Version<1>,
    /// The device's number (section 5).
    pub device_id: u32,
    /// How far the driver has come.
    pub stage: Stage,
    /// QueueSel.
    pub queue_select: u32,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// DriverFeatures, both halves.
    pub driver_features: u64,
    /// Each queue.
    pub queues: Vec<QueueState>,
    /// The interrupt line.
    pub line: LineState,
    /// What the device itself knows.
    pub device: Value,
}

impl Mmio {
    /// The state of the device and its transport. The guest's vCPUs must stand still, and no
    /// event may be served, until the guest's memory is saved too.
    ///
    /// # Errors
    /// [`StateError::NotSaved`] where the device has not learnt it.
    pub fn save(&self) -> Result<MmioState, StateError> {
        let running = match &self.state {
            State::Running(active) => Some(active),
            _ => None,
        };
        let queues = self.queues.iter().enumerate().map(|(index, queue)| {
            // One that was stopped while it ran is not ready, whatever its set-up was.
            queue.save(running.and_then(|active| active.queues.get(index)))
        });
        Ok(MmioState {
            version: Version,
            device_id: self.device.device_id(),
            stage: match &self.state {
                State::Reset => Stage::Reset,
                State::Acknowledged => Stage::Acknowledged,
                State::Driver => Stage::Driver,
                State::FeaturesAgreed => Stage::FeaturesAgreed,
                State::Running(_) => Stage::Running,
                State::Failed(before) => Stage::Failed(*before),
            },
            queue_select: self.queue_select,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queues: queues.collect(),
            line: self.line.save(),
            device: self.device.save()?,
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
        mmio.check(&state)?;
        mmio.queue_select = state.queue_select;
        mmio.device_features_select = state.device_features_select;
        mmio.driver_features_select = state.driver_features_select;
        mmio.driver_features = state.driver_features;
        mmio.restore_queues(&state.queues)?;
        mmio.state = match state.stage {
            Stage::Reset => State::Reset,
            Stage::Acknowledged => State::Acknowledged,
            Stage::Driver => State::Driver,
            Stage::FeaturesAgreed => State::FeaturesAgreed,
            Stage::Running => State::Running(mmio.activate()),
            Stage::Failed(before) => State::Failed(before),
        };
        let active = match &mut mmio.state {
            State::Running(active) => Some(active),
            _ => None,
        };
        let driver_ok = active.is_some();
        mmio.device.restore(state.device, active)?;
        mmio.line.restore(state.line, driver_ok);
        mmio.ring_all();
        Ok(mmio)
    }

    fn check(&self, state: &MmioState) -> Result<(), StateError> {
        let expected = self.device.device_id();
        if state.device_id != expected {
            return Err(StateError::OtherDevice { found: state.device_id, expected });
        }
        if state.queues.len() != self.queues.len() {
            return Err(StateError::OtherQueues { found: state.queues.len(), expected: self.queues.len() });
        }
        let agreed = matches!(state.stage, Stage::FeaturesAgreed | Stage::Running);
        let (features, offered) = (state.driver_features, self.offered_features());
        if agreed && (features & !offered != 0 || features & 1 << VIRTIO_F_VERSION_1 == 0) {
            return Err(StateError::Features { features, offered });
        }
        let acknowledged = VIRTIO_CONFIG_S_ACKNOWLEDGE;
        let driver = acknowledged | VIRTIO_CONFIG_S_DRIVER;
        let agreed = driver | VIRTIO_CONFIG_S_FEATURES_OK;
        match state.stage {
            Stage::Failed(before)
                if ![0, acknowledged, driver, agreed, agreed | VIRTIO_CONFIG_S_DRIVER_OK]
                    .contains(&before) =>
            {
                return Err(StateError::Register { register: "Status", value: before });
            }
            _ => {}
        }
        let reasons = state.line.reasons;
        if reasons & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) != 0 {
            return Err(StateError::Register { register: "InterruptStatus", value: reasons });
        }
        Ok(())
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

    /// What the device works on, of the queues that are ready.
    pub(super) fn activate(&mut self) -> Active {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        Active {
            memory: self.memory.clone(),
            queues: self.queues.iter_mut().map(|queue| queue.take(event_idx)).collect(),
            interrupt: self.line.clone(),
            features: self.driver_features,
        }
    }
}
