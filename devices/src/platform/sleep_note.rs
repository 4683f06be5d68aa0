//! Where a guest that falls asleep notes it, and that it is awake again: one port of ballast's own.
//!
//! Suspend-to-idle is a guest's own affair: its processors halt, and no register tells. But Linux calls methods of
//! an ACPI device before and after (`drivers/acpi/x86/s2idle.c`), and those of ballast's tables write here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

/// Ports that the device takes.
pub const PORTS: u16 = 1;

/// What a guest writes that falls asleep.
pub const ASLEEP: u8 = 1;
/// What it writes when it is awake again.
pub const AWAKE: u8 = 0;

/// The port.
pub struct SleepNote(Arc<AtomicBool>);

impl SleepNote {
    /// A port that keeps in `asleep` what was noted last. It is the guest's word.
    pub fn new(asleep: Arc<AtomicBool>) -> Self {
        Self(asleep)
    }
}

impl DevicePio for SleepNote {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
        match data {
            [ASLEEP] => self.0.store(true, Ordering::Relaxed),
            [AWAKE] => self.0.store(false, Ordering::Relaxed),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_last_holds() {
        let asleep = Arc::new(AtomicBool::new(false));
        let port = SleepNote::new(Arc::clone(&asleep));
        for (data, holds) in
            [(&[ASLEEP][..], true), (&[2], true), (&[AWAKE, AWAKE], true), (&[AWAKE], false), (&[], false)]
        {
            port.pio_write(PioAddress(0), 0, data);
            assert_eq!(asleep.load(Ordering::Relaxed), holds, "{data:?}");
        }
    }
}
