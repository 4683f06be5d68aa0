//! A made-up device: its configuration space holds a text.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::sandbox::{Call, SandboxNeeds};
use crate::virtio::device::{Active, Progress, VirtioDevice};

/// A number that virtio gives to no device.
pub const DEVICE_ID: u32 = 0x3ff;

/// What such a device is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoteOptions {
    /// The text.
    pub text: String,
    /// A file that it says it reads.
    pub file: PathBuf,
}

/// The device.
pub struct Note(NoteOptions);

impl Note {
    /// A device that holds the text of `options`.
    pub fn new(options: NoteOptions) -> Self {
        Self(options)
    }
}

impl VirtioDevice for Note {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let text = self.0.text.as_bytes();
        let there = usize::try_from(offset).ok().and_then(|offset| text.get(offset..)).unwrap_or_default();
        for (byte, value) in data.iter_mut().zip(there) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _active: &mut Active) {}

    fn reset(&mut self) {}

    fn queue_event(&mut self, _index: usize, _active: &mut Active) -> Progress {
        Progress::Done
    }

    fn sandbox_needs(&self) -> SandboxNeeds {
        SandboxNeeds {
            read: vec![self.0.file.clone()],
            calls: vec![Call::any(libc::SYS_preadv)],
            ..SandboxNeeds::default()
        }
    }
}
