//! The command port of the keyboard controller (i8042): nothing is there but the line that resets the machine.

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use super::{GuestEnd, OnEnd};

/// Ports that the device takes.
pub const PORTS: u16 = 1;

/// The command: pulse output line 0, which is the reset line.
const PULSE_RESET: u8 = 0xfe;

/// The port.
pub struct ResetLine(OnEnd);

impl ResetLine {
    /// A port that tells `on_end`.
    pub fn new(on_end: OnEnd) -> Self {
        Self(on_end)
    }
}

impl DevicePio for ResetLine {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        match data {
            // The input buffer is empty: a command may come.
            [byte] => *byte = 0,
            wider => wider.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
        if data == [PULSE_RESET] {
            (self.0)(GuestEnd::Reset);
        }
    }
}
