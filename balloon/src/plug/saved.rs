//! The device's state as data.

use devices::state::{self, StateError, Version};
use devices::virtio::device::Active;
use devices::virtio::queue::Faults;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Access, Plug};
use api::status::DriverState;
use api::units::Bytes;

const DEVICE: &str = "the virtio-mem device";

/// Blocks side by side that are plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The number of the first, from the region's start.
    pub first: u64,
    /// How many there are.
    pub count: u64,
}

/// What a virtio-mem device knows, as data. What it has counted belongs to the process that
/// counted, and begins anew in the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlugState {
    /// Of this struct.
    pub version: Version<1>,
    /// Where the region starts, a guest address.
    pub address: u64,
    /// How long it is.
    pub size: Bytes,
    /// The size of a block.
    pub block: Bytes,
    /// What the host has asked the guest to have plugged.
    pub requested: Bytes,
    /// `requested_size` as the guest was last told (virtio 1.2, section 5.15.4).
    pub told: Bytes,
    /// What is plugged, upwards.
    pub plugged: Vec<Run>,
    /// Whether the driver has broken the protocol.
    pub broken: bool,
    /// Malformed chains so far.
    pub faults: Faults,
}

impl Plug {
    pub(super) fn saved(&self) -> Result<Value, StateError> {
        let requested = self.shared.state().requested;
        state::to_value(&PlugState {
            version: Version,
            address: self.region.start.0,
            size: self.region.len,
            block: self.shared.block,
            requested,
            told: self.requested,
            plugged: self
                .blocks
                .runs()
                .map(|run| Run { first: run.start, count: run.end - run.start })
                .collect(),
            broken: self.shared.state().driver == DriverState::Broken,
            faults: self.faults,
        })
    }

    /// Opens what was plugged to the guest again. Its contents are for whoever restores the guest's memory.
    pub(super) fn take_in(&mut self, state: Value, active: Option<&mut Active>) -> Result<(), StateError> {
        let state: PlugState = state::from_value::<_, 1>(DEVICE, state)?;
        self.check(&state).map_err(|what| StateError::Unreadable { device: DEVICE, what })?;
        for run in &state.plugged {
            // No overflow: checked to lie in the region.
            let blocks = run.first..run.first + run.count;
            let range = self.range_of(&blocks);
            (self.set_access)(range, Access::Granted)?;
            self.blocks.set(blocks, true);
        }
        self.faults = state.faults;
        self.requested = state.told;
        {
            let plugged = self.plugged();
            let mut shared = self.shared.state();
            shared.requested = state.requested;
            shared.counters.plugged = plugged;
        }
        let broken = state.broken && active.is_some();
        if let Some(active) = active {
            self.greet(active);
        }
        self.publish(broken);
        // The guest is told where the host has asked for something since. The one failure is a
        // full counter, which is a wake-up already pending.
        let _ = self.shared.wake.write(1);
        Ok(())
    }

    /// Whether this device can have come to `state`.
    fn check(&self, state: &PlugState) -> Result<(), String> {
        let (region, block, most) = (self.region, self.shared.block, self.shared.most);
        if (state.address, state.size, state.block) != (region.start.0, region.len, block) {
            return Err(format!(
                "it is of {} at {:#x} in blocks of {}, and this guest has {} at {:#x} in blocks of {block}: \
                 restore it into a guest with the same memory",
                state.size, state.address, state.block, region.len, region.start.0,
            ));
        }
        for (name, amount) in [("requested", state.requested), ("told", state.told)] {
            if amount > most || !amount.0.is_multiple_of(block.0) {
                return Err(format!("{name} is {amount}, which is not in blocks of {block} up to {most}"));
            }
        }
        let (mut end, mut count) = (0, 0_u64);
        for run in &state.plugged {
            let run_end = run.first.checked_add(run.count).filter(|end| *end <= self.blocks.count());
            let Some(run_end) = run_end.filter(|_| run.first >= end && run.count > 0) else {
                return Err(format!(
                    "blocks {} and up don't follow upon each other in the region",
                    run.first
                ));
            };
            (end, count) = (run_end, count.saturating_add(run.count));
        }
        let plugged = Bytes(count.saturating_mul(block.0));
        if plugged > most {
            return Err(format!("{plugged} are plugged, and the guest may have {most}"));
        }
        Ok(())
    }
}
