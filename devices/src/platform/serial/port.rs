//! A serial port between vCPUs, which wait for each other, and input, which waits for nobody.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_device::{DevicePio, MutDevicePio};
use vmm_sys_util::eventfd::EventFd;

use super::Serial;
use super::line::Line;

/// A serial port for many threads. A vCPU has it for as long as its output takes, which is for
/// ever where nobody reads; input is put down beside it, and whoever has the port takes it in.
pub struct Port {
    serial: Mutex<Serial>,
    line: Arc<Line>,
    /// Input was put down that nobody has taken in.
    news: AtomicBool,
}

impl Port {
    /// Shares `serial`.
    pub fn new(serial: Serial) -> Self {
        let line = Arc::clone(&serial.line);
        Self { serial: Mutex::new(serial), line, news: AtomicBool::new(false) }
    }

    /// Takes input for the guest as [`Serial::enqueue`] does, and never waits: a vCPU that is in
    /// the middle of a write takes it in when it is done.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        let taken = self.line.put(input);
        self.news.store(true, Ordering::SeqCst);
        self.take_in();
        taken
    }

    /// As [`Serial::room_event`].
    pub fn room_event(&self) -> &EventFd {
        self.line.room()
    }

    /// Takes in what was put down, unless someone has the port: who that is comes here afterwards.
    ///
    /// Who brings input tells the news and then finds the port taken, or not; who has the port
    /// gives it back and then looks for news. The fence keeps each in that order for the other,
    /// so one of the two takes it in.
    fn take_in(&self) {
        loop {
            fence(Ordering::SeqCst);
            if !self.news.load(Ordering::SeqCst) {
                return;
            }
            let mut serial = match self.serial.try_lock() {
                Ok(serial) => serial,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            // First: what is put down from here on is news again.
            self.news.swap(false, Ordering::SeqCst);
            serial.refill();
        }
    }

    /// A vCPU's access.
    fn access(&self, access: impl FnOnce(&mut Serial)) {
        // The registers are plain bytes, none of which makes another wrong.
        access(&mut self.serial.lock().unwrap_or_else(PoisonError::into_inner));
        self.take_in();
    }
}

impl DevicePio for Port {
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        self.access(|serial| serial.pio_read(base, offset, data));
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        self.access(|serial| serial.pio_write(base, offset, data));
    }
}
