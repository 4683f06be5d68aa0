//! The reset control register of PC chipsets, port 0xcf9 (Intel ICH10 datasheet, section 13.7.5).

use std::sync::atomic::{AtomicU8, Ordering};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use super::{GuestEnd, OnEnd};

/// Where PC chipsets have it.
pub const PORT: u16 = 0xcf9;

/// A reset, when set, of the whole machine rather than of its processors.
const SYSTEM_RESET: u8 = 1 << 1;
/// Resets where it goes from 0 to 1.
const RESET_CPU: u8 = 1 << 2;
/// A reset takes the power away too.
const FULL_RESET: u8 = 1 << 3;

/// The register.
pub struct ResetControl {
    on_end: OnEnd,
    value: AtomicU8,
}

impl ResetControl {
    /// A register that tells `on_end`.
    pub fn new(on_end: OnEnd) -> Self {
        Self { on_end, value: AtomicU8::new(0) }
    }
}

impl DevicePio for ResetControl {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        match data {
            [byte] => *byte = self.value.load(Ordering::Relaxed),
            wider => wider.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
        let &[value] = data else { return };
        let before = self.value.swap(value & (SYSTEM_RESET | RESET_CPU | FULL_RESET), Ordering::Relaxed);
        if before & RESET_CPU == 0 && value & RESET_CPU != 0 {
            (self.on_end)(GuestEnd::Reset);
        }
    }
}
