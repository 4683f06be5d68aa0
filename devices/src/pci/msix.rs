//! MSI-X (PCI 3.0, section 6.8.2): the capability's message control, the table and the pending bits.
//!
//! A vector is delivered while MSI-X is enabled and neither the function nor the vector is masked.
//! Masked, its eventfd holds it pending, and that is what the pending bits are read from.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{ConfigSpace, MsiMessage, MsiVectors};
use crate::state::StateError;

/// The capability's ID.
const CAPABILITY: u8 = 0x11;
// Message control.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// Vector control: the one bit that is not reserved.
const VECTOR_MASK: u32 = 1;

/// Bytes of a table entry.
pub(crate) const ENTRY: u64 = 16;

/// Where message control is in the capability.
pub(crate) const CONTROL: u16 = 2;

/// One entry of the table, as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorState {
    /// Message address, both halves.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// The mask bit of vector control.
    pub masked: bool,
    /// Whether an interrupt is pending behind the mask.
    pub pending: bool,
}

/// The table, as data. Message control is in configuration space.
pub type MsixState = Vec<VectorState>;

#[derive(Clone, Copy)]
struct Vector {
    message: MsiMessage,
    masked: bool,
    /// Whether [`MsiVectors::unmask`] was the last word, and with which message.
    delivers: Option<MsiMessage>,
}

/// The table of one function.
pub struct Msix {
    vectors: Arc<dyn MsiVectors>,
    enabled: bool,
    function_masked: bool,
    table: Vec<Vector>,
    /// Whether the host has refused a vector, which is said once.
    refused: bool,
}

impl Msix {
    /// As after power-on: disabled, every vector masked.
    pub fn new(vectors: Arc<dyn MsiVectors>) -> Self {
        let vector = Vector { message: MsiMessage::default(), masked: true, delivers: None };
        let table = vec![vector; usize::from(vectors.count())];
        Self { vectors, enabled: false, function_masked: false, table, refused: false }
    }

    /// Adds the capability of a table and of pending bits that are at these offsets in BAR `bar`, both
    /// multiples of 8. Returns where it stands.
    pub fn add_capability(&self, config: &mut ConfigSpace, bar: u8, table: u32, pending: u32) -> u16 {
        let mut body = [0; 10];
        let mut writable = [0; 10];
        let size = self.count().saturating_sub(1);
        let parts = [
            &size.to_le_bytes()[..],
            &(table | u32::from(bar)).to_le_bytes(),
            &(pending | u32::from(bar)).to_le_bytes(),
        ];
        for (byte, value) in body.iter_mut().zip(parts.concat()) {
            *byte = value;
        }
        for (byte, value) in writable.iter_mut().zip((ENABLE | FUNCTION_MASK).to_le_bytes()) {
            *byte = value;
        }
        config.add_capability(CAPABILITY, &body, &writable)
    }

    /// Vectors in the table.
    pub fn count(&self) -> u16 {
        self.vectors.count()
    }

    /// Whether interrupts go by messages.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The guest has written message control.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & ENABLE != 0;
        self.function_masked = control & FUNCTION_MASK != 0;
        (0..self.table.len()).for_each(|vector| self.settle(vector));
    }

    /// Masks or unmasks a vector as its state says, or gives it its new message.
    fn settle(&mut self, index: usize) {
        let Some(vector) = self.table.get_mut(index) else { return };
        let is_delivered = self.enabled && !self.function_masked && !vector.masked;
        let wanted = is_delivered.then_some(vector.message);
        if wanted == vector.delivers {
            return;
        }
        // Bounded by the size of the table, 2048.
        let number = index as u16;
        let done = match wanted {
            Some(message) => self.vectors.unmask(number, message).inspect_err(|_| {
                // The old message must not be sent for the new one.
                let _ = self.vectors.mask(number);
            }),
            None => self.vectors.mask(number),
        };
        // One that can't be masked goes on as it was.
        if done.is_ok() || wanted.is_some() {
            vector.delivers = wanted.filter(|_| done.is_ok());
        }
        if let Err(error) = done
            && !self.refused
        {
            self.refused = true;
            tracing::warn!("an interrupt of a PCI device is lost: {error}");
        }
    }

    /// Reads the table: 4 or 8 bytes, aligned. Anything else reads zero (section 6.8.2, note).
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        for (part, place) in data.chunks_exact_mut(4).zip((offset..).step_by(4)) {
            part.copy_from_slice(&self.table_dword(place).to_le_bytes());
        }
    }

    fn table_dword(&self, offset: u64) -> u32 {
        let index = usize::try_from(offset / ENTRY).unwrap_or(usize::MAX);
        let Some(vector) = self.table.get(index) else { return 0 };
        match offset % ENTRY {
            0 => vector.message.address as u32,
            4 => (vector.message.address >> 32) as u32,
            8 => vector.message.data,
            _ => u32::from(vector.masked),
        }
    }

    /// Writes the table: 4 or 8 bytes, aligned. Anything else writes nothing.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        for (part, place) in data.chunks_exact(4).zip((offset..).step_by(4)) {
            if let Ok(part) = part.try_into() {
                self.write_table_dword(place, u32::from_le_bytes(part));
            }
        }
        self.settle(usize::try_from(offset / ENTRY).unwrap_or(usize::MAX));
    }

    fn write_table_dword(&mut self, offset: u64, value: u32) {
        let index = usize::try_from(offset / ENTRY).unwrap_or(usize::MAX);
        let Some(vector) = self.table.get_mut(index) else { return };
        let address = &mut vector.message.address;
        match offset % ENTRY {
            // The lowest two bits are zero: messages are aligned.
            0 => *address = *address & !u64::from(u32::MAX) | u64::from(value & !3),
            4 => *address = *address & u64::from(u32::MAX) | u64::from(value) << 32,
            8 => vector.message.data = value,
            _ => vector.masked = value & VECTOR_MASK != 0,
        }
    }

    /// Reads the pending bits, of 64 vectors each 8 bytes.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (byte, place) in data.iter_mut().zip(offset..) {
            let first = usize::try_from(place).unwrap_or(usize::MAX).saturating_mul(8);
            *byte = (0..8)
                .fold(0, |bits, bit| bits | u8::from(self.is_pending(first.saturating_add(bit))) << bit);
        }
    }

    /// Whether a raised `vector` is delivered at once.
    pub fn delivers(&self, vector: u16) -> bool {
        self.table.get(usize::from(vector)).is_some_and(|vector| vector.delivers.is_some())
    }

    fn is_pending(&self, index: usize) -> bool {
        let held = self.table.get(index).is_some_and(|vector| vector.delivers.is_none());
        held && u16::try_from(index).is_ok_and(|vector| self.vectors.event(vector).is_some_and(is_raised))
    }

    /// Forgets what is pending: the function was reset, and nobody waits for it any more.
    pub fn forget_pending(&self) {
        for event in (0..self.count()).filter_map(|vector| self.vectors.event(vector)) {
            // Nothing to read is nothing pending.
            let _ = event.read();
        }
    }

    /// The table as data.
    pub fn save(&self) -> MsixState {
        let vectors = self.table.iter().enumerate();
        vectors
            .map(|(index, vector)| VectorState {
                address: vector.message.address,
                data: vector.message.data,
                masked: vector.masked,
                pending: self.is_pending(index),
            })
            .collect()
    }

    /// Takes in what [`save`](Self::save) gave. Message control comes after it
    /// ([`set_control`](Self::set_control)).
    ///
    /// # Errors
    /// The table has another size.
    pub fn restore(&mut self, state: &[VectorState]) -> Result<(), StateError> {
        if state.len() != self.table.len() {
            return Err(StateError::Register {
                register: "the size of the MSI-X table",
                value: u32::try_from(state.len()).unwrap_or(u32::MAX),
            });
        }
        for ((index, vector), state) in (0..).zip(&mut self.table).zip(state) {
            vector.message = MsiMessage { address: state.address & !3, data: state.data };
            vector.masked = state.masked;
            if let (true, Some(event)) = (state.pending, self.vectors.event(index)) {
                // The one failure is a full counter, which is pending as well.
                let _ = event.write(1);
            }
        }
        Ok(())
    }
}

/// Whether an eventfd was written and nobody has taken that up.
fn is_raised(event: &EventFd) -> bool {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, ours for the call, which does not wait.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready == 1 && poll.revents & libc::POLLIN != 0
}
