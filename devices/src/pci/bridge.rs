//! The host bridge, which stands in slot 0: guests look there for whether there is a bus at all.

use super::{ConfigSpace, ConfigState, Function, Identity};
use crate::state::StateError;

/// A bridge between the processor and the bus without registers of its own. Its IDs are those of the
/// generic PCI Express host bridge, for which no guest has a quirk.
const IDENTITY: Identity =
    Identity { vendor: 0x1b36, device: 0x0008, subsystem: 0x1100, revision: 0, class: 0x06_00_00 };

/// The function in slot 0.
pub struct HostBridge {
    config: ConfigSpace,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self { config: ConfigSpace::new(IDENTITY) }
    }
}

impl HostBridge {
    /// Its configuration space.
    pub fn save(&self) -> ConfigState {
        self.config.save()
    }

    /// Takes in what [`save`](Self::save) gave.
    ///
    /// # Errors
    /// As [`ConfigSpace::restore`].
    pub fn restore(state: &ConfigState) -> Result<Self, StateError> {
        let mut this = Self::default();
        this.config.restore(state)?;
        Ok(this)
    }
}

impl Function for HostBridge {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
}
