//! The common configuration structure (virtio 1.2, section 4.1.4.3).

use super::VirtioPci;
use crate::virtio::core::{Core, Half, QueueSetup};
use crate::virtio::interrupt::Source;

/// Bytes of the structure without the fields of features that are not offered.
pub(super) const SIZE: u32 = 56;

/// Widths and places of its fields.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const HIGH: u64 = 4;

impl VirtioPci {
    fn selected_source(&self) -> Source {
        Source::Queue(usize::try_from(self.core.queue_select).unwrap_or(usize::MAX))
    }

    /// A field is read in its own width, an address in two halves; anything else reads zero.
    pub(super) fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match data.len() {
            1 => data.copy_from_slice(&self.read_byte(offset).to_le_bytes()),
            2 => data.copy_from_slice(&self.read_word(offset).to_le_bytes()),
            4 => data.copy_from_slice(&self.read_dword(offset).to_le_bytes()),
            _ => {}
        }
    }

    fn read_byte(&mut self, offset: u64) -> u8 {
        match offset {
            DEVICE_STATUS => self.core.status() as u8,
            CONFIG_GENERATION => self.core.generation() as u8,
            _ => 0,
        }
    }

    fn read_word(&self, offset: u64) -> u16 {
        let core = &self.core;
        match offset {
            CONFIG_MSIX_VECTOR => self.vectors.get(Source::Config),
            NUM_QUEUES => u16::try_from(core.queue_count()).unwrap_or(u16::MAX),
            QUEUE_SELECT => core.queue_select as u16,
            QUEUE_SIZE => core.selected().map_or(0, shown_size),
            QUEUE_MSIX_VECTOR => self.vectors.get(self.selected_source()),
            QUEUE_ENABLE => u16::from(core.selected().is_some_and(QueueSetup::is_ready)),
            // Each queue has an address of its own.
            QUEUE_NOTIFY_OFF => core.selected().map_or(0, |_| core.queue_select as u16),
            _ => 0,
        }
    }

    fn read_dword(&self, offset: u64) -> u32 {
        let core = &self.core;
        let address = |half: Half, part: fn(&QueueSetup) -> u64| {
            core.selected().map_or(0, |queue| half.get(part(queue)))
        };
        match offset {
            DEVICE_FEATURE_SELECT => core.device_features_select,
            DEVICE_FEATURE => core.device_features(),
            DRIVER_FEATURE_SELECT => core.driver_features_select,
            DRIVER_FEATURE => core.driver_features(),
            _ => match split(offset) {
                (QUEUE_DESC, half) => address(half, |queue| queue.descriptors),
                (QUEUE_DRIVER, half) => address(half, |queue| queue.available),
                (QUEUE_DEVICE, half) => address(half, |queue| queue.used),
                _ => 0,
            },
        }
    }

    /// A field is written in its own width, an address in two halves; anything else writes nothing.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) {
        if let Ok(data) = data.try_into() {
            self.write_byte(offset, u8::from_le_bytes(data));
        } else if let Ok(data) = data.try_into() {
            self.write_word(offset, u16::from_le_bytes(data));
        } else if let Ok(data) = data.try_into() {
            write_dword(&mut self.core, offset, u32::from_le_bytes(data));
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        if offset == DEVICE_STATUS {
            self.core.write_status(u32::from(value));
            if value == 0 {
                self.msix.forget_pending();
            }
        }
    }

    fn write_word(&mut self, offset: u64, value: u16) {
        match offset {
            CONFIG_MSIX_VECTOR => self.vectors.set(Source::Config, value),
            QUEUE_SELECT => self.core.queue_select = u32::from(value),
            QUEUE_SIZE => {
                if let Some(queue) = self.core.set_up() {
                    queue.size = u32::from(value);
                }
            }
            QUEUE_MSIX_VECTOR => self.vectors.set(self.selected_source(), value),
            // A driver does not write zero, and nothing is undone by it.
            QUEUE_ENABLE if value == 1 => self.core.enable_queue(),
            _ => {}
        }
    }
}

fn write_dword(core: &mut Core, offset: u64, value: u32) {
    match offset {
        DEVICE_FEATURE_SELECT => core.device_features_select = value,
        DRIVER_FEATURE_SELECT => core.driver_features_select = value,
        DRIVER_FEATURE => core.write_driver_features(value),
        _ => {
            let Some(queue) = core.set_up() else { return };
            match split(offset) {
                (QUEUE_DESC, half) => half.put(&mut queue.descriptors, value),
                (QUEUE_DRIVER, half) => half.put(&mut queue.available, value),
                (QUEUE_DEVICE, half) => half.put(&mut queue.used, value),
                _ => {}
            }
        }
    }
}

/// Which half of which address an offset means.
fn split(offset: u64) -> (u64, Half) {
    if offset & HIGH == 0 { (offset, Half::Low) } else { (offset & !HIGH, Half::High) }
}

/// A size that no queue can have makes the queue unavailable.
fn shown_size(queue: &QueueSetup) -> u16 {
    let size = u16::try_from(queue.size).unwrap_or_default();
    if size.is_power_of_two() && size <= queue.max_size { size } else { 0 }
}
