//! pvpanic: a port on which a guest's kernel says that it has panicked (QEMU, docs/specs/pvpanic).

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use super::{GuestEnd, OnEnd};

/// Ports that the device takes.
pub const PORTS: u16 = 1;

/// The event: the guest panicked. A read tells which events are understood.
const PANICKED: u8 = 1 << 0;

/// The port.
pub struct PvPanic(OnEnd);

impl PvPanic {
    /// A port that tells `on_end`.
    pub fn new(on_end: OnEnd) -> Self {
        Self(on_end)
    }
}

impl DevicePio for PvPanic {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        match data {
            [byte] => *byte = PANICKED,
            wider => wider.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
        if let [events] = data
            && events & PANICKED != 0
        {
            (self.0)(GuestEnd::Panic);
        }
    }
}
