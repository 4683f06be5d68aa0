//! PCI as a guest sees it (PCI Local Bus 3.0): one bus with a host bridge and up to 31 functions.
//!
//! A [`Bus`] is reached through the objects of [`access`]: the window of the enhanced configuration
//! access mechanism, the two ports of the first one, and the window in which memory BARs lie.
//! A guest may write anything to configuration space. What comes of it stays inside these windows.

pub mod access;
mod bridge;
mod bus;
mod config;
pub(crate) mod msix;

use std::io;

use vmm_sys_util::eventfd::EventFd;

pub use bridge::HostBridge;
pub use bus::{Bus, SlotError};
pub use config::{BARS, ConfigSpace, ConfigState, Identity};
pub use msix::{Msix, MsixState, VectorState};

/// Devices on the bus, the host bridge among them. Each has one function.
pub const SLOTS: u8 = 32;

/// What a message-signalled interrupt writes, and where (PCI 3.0, section 6.8.2). The guest's
/// words: any address, any data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Guest physical address.
    pub address: u64,
    /// The 32 bits written there.
    pub data: u32,
}

/// Delivers the message-signalled interrupts of one function.
///
/// A vector is masked until [`unmask`](Self::unmask). Its eventfd is what raises it, and holds it
/// pending while it is masked: nothing is lost by masking.
pub trait MsiVectors: Send + Sync {
    /// How many there are: from 1 to 2048.
    fn count(&self) -> u16;

    /// The eventfd whose write raises `vector`; nonblocking. `None` past the last one.
    fn event(&self, vector: u16) -> Option<&EventFd>;

    /// Delivers `message` on each write to the eventfd from now on, and at once where one is pending.
    /// A vector that is unmasked already changes its message.
    ///
    /// # Errors
    /// The host can't: the vector counts as masked then.
    fn unmask(&self, vector: u16, message: MsiMessage) -> io::Result<()>;

    /// Delivers nothing from now on; writes to the eventfd stay there.
    ///
    /// # Errors
    /// The host can't.
    fn mask(&self, vector: u16) -> io::Result<()>;
}

/// Which memory a function decodes, as the guest has programmed a base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// Guest physical address; a multiple of `size`.
    pub address: u64,
    /// Bytes; a power of two.
    pub size: u64,
}

/// One function of a device on the bus.
///
/// Offsets and widths are the guest's: a configuration access has 1, 2 or 4 bytes and stays within
/// an aligned group of 4; an access to a BAR may be any that begins and ends in it.
pub trait Function: Send {
    /// Reads configuration space.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);

    /// Writes configuration space.
    fn write_config(&mut self, offset: u16, data: &[u8]);

    /// What BAR `bar` decodes; `None` where decoding is off or there is no such BAR.
    fn bar(&self, _bar: usize) -> Option<BarRange> {
        None
    }

    /// The bus says from where the guest reaches BAR `bar` from now on. `None` is from nowhere:
    /// decoding is off, or the address is outside the bus's window or taken.
    fn place_bar(&mut self, _bar: usize, _address: Option<u64>) {}

    /// Reads memory behind a BAR.
    fn read_bar(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Writes memory behind a BAR.
    fn write_bar(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}
}
