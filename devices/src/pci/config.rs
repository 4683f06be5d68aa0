//! Configuration space of one function with a type 0 header (PCI 3.0, section 6.1).

use serde::{Deserialize, Serialize};

use super::BarRange;
use crate::state::StateError;

/// Base address registers of a type 0 header.
pub const BARS: usize = 6;

/// Bytes of configuration space that hold something; a function has 4096 where ECAM is used, and
/// none here has extended capabilities.
const SIZE: usize = 256;

// Registers of the header (section 6.1, figure 6-1).
const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION_ID: usize = 0x08;
const CLASS_CODE: usize = 0x09;
const CACHE_LINE_SIZE: usize = 0x0c;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The header's end: capabilities stand from here on.
const HEADER: usize = 0x40;

// Command (section 6.2.2).
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const PARITY_ERROR_RESPONSE: u16 = 1 << 6;
const SERR: u16 = 1 << 8;
const INTERRUPT_DISABLE: u16 = 1 << 10;
// Status (section 6.2.3).
const INTERRUPT_STATUS: u8 = 1 << 3;
const CAPABILITIES_LIST: u16 = 1 << 4;

/// A memory BAR of 64 bits, not prefetchable (section 6.2.5.1).
const MEMORY_64: u32 = 0b100;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID; the subsystem's is the same.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface, from bit 23 down (appendix D).
    pub class: u32,
}

/// What a guest has made of configuration space, as data: the bytes that it can write, and all others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConfigState(Vec<u8>);

/// The registers, and which of their bits a guest can write.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Of each BAR of 64 bits, by its first register.
    sizes: [Option<u64>; BARS],
    /// Where the next capability goes, and the pointer that is to lead to it.
    free: usize,
    link: usize,
}

impl ConfigSpace {
    /// A function without BARs, capabilities and interrupt pin, which decodes nothing yet.
    pub fn new(identity: Identity) -> Self {
        let mut this = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            sizes: [None; BARS],
            free: HEADER,
            link: CAPABILITIES_POINTER,
        };
        this.set(VENDOR_ID, &identity.vendor.to_le_bytes());
        this.set(DEVICE_ID, &identity.device.to_le_bytes());
        this.set(REVISION_ID, &[identity.revision]);
        let [low, middle, high, _] = identity.class.to_le_bytes();
        this.set(CLASS_CODE, &[low, middle, high]);
        this.set(SUBSYSTEM_VENDOR_ID, &identity.vendor.to_le_bytes());
        this.set(SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        let command = MEMORY_SPACE | BUS_MASTER | PARITY_ERROR_RESPONSE | SERR | INTERRUPT_DISABLE;
        this.let_write(COMMAND, &command.to_le_bytes());
        this.let_write(CACHE_LINE_SIZE, &[0xff]);
        this.let_write(INTERRUPT_LINE, &[0xff]);
        this
    }

    /// Gives the function a memory BAR of 64 bits in registers `bar` and `bar + 1`, which is at
    /// `address` until the guest moves it. `size` is a power of two from 16 on.
    pub fn add_bar(&mut self, bar: usize, size: u64, address: u64) {
        let mask = !(size.saturating_sub(1) | 0xf);
        let at = BAR0 + 4 * bar;
        self.set(at, &(address & mask | u64::from(MEMORY_64)).to_le_bytes());
        self.let_write(at, &mask.to_le_bytes());
        if let Some(place) = self.sizes.get_mut(bar) {
            *place = Some(size);
        }
    }

    /// Adds a capability: `body` is what stands behind its ID and the next one's pointer, of which a
    /// guest can write the bits in `writable`. Returns where the capability stands.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.free;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.let_write(at + 2, writable);
        let here = u8::try_from(at).unwrap_or_default();
        self.set(self.link, &[here]);
        self.set(STATUS, &CAPABILITIES_LIST.to_le_bytes());
        self.link = at + 1;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        u16::from(here)
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        for (byte, value) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *byte = *value;
        }
    }

    fn let_write(&mut self, at: usize, mask: &[u8]) {
        for (byte, value) in self.writable.iter_mut().skip(at).zip(mask) {
            *byte = *value;
        }
    }

    /// Reads what is there; past the end all is zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(self.bytes.iter().skip(usize::from(offset))) {
            *byte = *value;
        }
    }

    /// The same, where an interrupt is pending that no pin tells of (Interrupt Status).
    pub(crate) fn read_with_interrupt(&self, offset: u16, data: &mut [u8]) {
        self.read(offset, data);
        let status = STATUS.checked_sub(usize::from(offset)).and_then(|at| data.get_mut(at));
        if let Some(status) = status {
            *status |= INTERRUPT_STATUS;
        }
    }

    /// Writes the bits that a guest can write.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(usize::from(offset));
        for ((byte, mask), value) in registers.zip(data) {
            *byte = *byte & !mask | value & mask;
        }
    }

    /// 16 bits.
    pub(crate) fn word(&self, at: u16) -> u16 {
        let mut word = [0; 2];
        self.read(at, &mut word);
        u16::from_le_bytes(word)
    }

    /// 32 bits.
    pub(crate) fn dword(&self, at: u16) -> u32 {
        let mut dword = [0; 4];
        self.read(at, &mut dword);
        u32::from_le_bytes(dword)
    }

    /// Whether the guest lets the function reach memory by itself (bus master enable).
    pub fn is_bus_master(&self) -> bool {
        self.word(COMMAND as u16) & BUS_MASTER != 0
    }

    /// What BAR `bar` decodes now.
    pub fn bar(&self, bar: usize) -> Option<BarRange> {
        let size = (*self.sizes.get(bar)?)?;
        let mut register = [0; 8];
        self.read(u16::try_from(BAR0 + 4 * bar).ok()?, &mut register);
        let address = u64::from_le_bytes(register) & !0xf;
        (self.word(COMMAND as u16) & MEMORY_SPACE != 0).then_some(BarRange { address, size })
    }

    /// The registers as data.
    pub fn save(&self) -> ConfigState {
        ConfigState(self.bytes.to_vec())
    }

    /// Takes in what [`save`](Self::save) gave.
    ///
    /// # Errors
    /// A bit that no guest can write is not what it is here: it is of another function, or of none.
    pub fn restore(&mut self, state: &ConfigState) -> Result<(), StateError> {
        let bytes: [u8; SIZE] = state.0.as_slice().try_into().map_err(|_| StateError::Register {
            register: "the size of PCI configuration space",
            value: u32::try_from(state.0.len()).unwrap_or(u32::MAX),
        })?;
        for ((found, own), mask) in bytes.iter().zip(&self.bytes).zip(&self.writable) {
            if (found ^ own) & !mask != 0 {
                return Err(StateError::Register {
                    register: "PCI configuration space",
                    value: u32::from(*found),
                });
            }
        }
        self.bytes = bytes;
        Ok(())
    }
}
