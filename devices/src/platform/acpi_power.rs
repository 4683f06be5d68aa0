//! The registers by which hardware-reduced ACPI sleeps and resets (ACPI 6.5, sections 4.8.3.6 and 4.8.3.7):
//! sleep control, sleep status and reset, one port each, in this order.

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use super::{GuestEnd, OnEnd};

/// Ports that the device takes.
pub const PORTS: u16 = 3;
/// Where the sleep control register is.
pub const SLEEP_CONTROL: u16 = 0;
/// Where the sleep status register is.
pub const SLEEP_STATUS: u16 = 1;
/// Where the reset register is.
pub const RESET: u16 = 2;

/// The sleep type of soft-off (`\_S5`), the one sleeping state.
pub const SOFT_OFF: u8 = 5;
/// What the reset register takes.
pub const RESET_VALUE: u8 = 1;

// Sleep control register (table 4.19).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// The registers.
pub struct AcpiPower(OnEnd);

impl AcpiPower {
    /// Registers that tell `on_end`.
    pub fn new(on_end: OnEnd) -> Self {
        Self(on_end)
    }
}

impl DevicePio for AcpiPower {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        match data {
            // The machine never wakes: it does not sleep.
            [byte] => *byte = 0,
            wider => wider.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL if value == SLEEP_ENABLE | SOFT_OFF << SLEEP_TYPE_SHIFT => {
                (self.0)(GuestEnd::PowerOff);
            }
            RESET if value == RESET_VALUE => (self.0)(GuestEnd::Reset),
            _ => {}
        }
    }
}
