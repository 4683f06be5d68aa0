//! A guest with memory to plug, for the tests.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use api::units::Bytes;
use balloon::discard::{Backing, Discard, Region};
use balloon::plug::{Access, Config, Handle, Plug};
use balloon::ranges::Range;
use devices::state::StateError;
use devices::testing::{BUFFERS, Guest, GuestRam, HIGH, REGION};
use devices::virtio::saved::VirtioState;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes as _, GuestAddress};

/// A block; the test guest's upper region has 16 of them.
pub const BLOCK: u64 = 64 << 10;

pub const PLUG: u16 = 0;
pub const UNPLUG_ALL: u16 = 2;

pub const ACK: u16 = 0;

/// Which blocks the host has opened, and whether it refuses to open or close any.
#[derive(Default)]
pub struct Gate {
    pub open: BTreeSet<u64>,
    pub refuses: bool,
    /// Blocks that it was told to close, again or for the first time.
    pub closed: u64,
}

impl Gate {
    fn set(&mut self, range: Range, access: Access) -> io::Result<()> {
        if self.refuses {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert!(range.start.0 >= HIGH && range.end() <= HIGH + REGION as u64, "{range:x?}");
        assert!(range.start.0.is_multiple_of(BLOCK) && range.len.0.is_multiple_of(BLOCK));
        for block in (range.start.0 - HIGH) / BLOCK..(range.end() - HIGH) / BLOCK {
            match access {
                Access::Granted => assert!(self.open.insert(block), "block {block} is opened twice"),
                Access::Revoked => {
                    self.closed += 1;
                    self.open.remove(&block);
                }
            }
        }
        Ok(())
    }
}

/// The guest, the host's handle, and what the host let it reach.
pub struct Yard {
    pub guest: Guest,
    pub handle: Handle,
    pub gate: Arc<Mutex<Gate>>,
}

/// A device over the upper region of the test guest's RAM, none of which it has opened.
fn device(ram: &GuestRam) -> (Plug, Handle, Arc<Mutex<Gate>>) {
    let gate = Arc::new(Mutex::new(Gate::default()));
    let size = Bytes(REGION as u64);
    let (guest, host) = (GuestAddress(HIGH), ram.host(HIGH));
    let region = Region { guest, host, len: size, backing: Backing::Anonymous, collapses: None };
    // SAFETY: the test guest's RAM, which goes after the device.
    let discard = unsafe { Discard::new(vec![region]) };
    let config = Config { address: GuestAddress(HIGH), size, most: size, block: Bytes(BLOCK) };
    let keeper = gate.clone();
    let set_access = Box::new(move |range, access| keeper.lock().unwrap().set(range, access));
    let (device, handle) = Plug::new(config, discard, set_access).unwrap();
    (device, handle, gate)
}

impl Yard {
    pub fn new() -> Self {
        let mut rest = None;
        let guest = Guest::new(|ram| {
            let (device, handle, gate) = device(ram);
            rest = Some((handle, gate));
            Box::new(device)
        });
        let (handle, gate) = rest.unwrap();
        Self { guest, handle, gate }
    }

    /// The same guest with a new device that was restored from `state`.
    pub fn restore(self, state: VirtioState) -> Result<Self, StateError> {
        self.restore_on(state, false)
    }

    /// The same, on a host that opens nothing if it `refuses`.
    pub fn restore_on(self, state: VirtioState, refuses: bool) -> Result<Self, StateError> {
        let (device, handle, gate) = device(&self.guest.ram);
        gate.lock().unwrap().refuses = refuses;
        let guest = self.guest.restore(Box::new(device), state)?;
        Ok(Self { guest, handle, gate })
    }

    /// Asks the guest for so many blocks.
    pub fn request(&mut self, blocks: u64) {
        self.handle.request(Bytes(blocks * BLOCK));
        self.guest.run();
    }

    /// Writes a request into guest memory.
    pub fn write_request(&self, kind: u16, address: u64, blocks: u16) {
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.guest.ram.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    }

    /// Sends a request about blocks by their number; returns the answer's type and state.
    pub fn ask(&mut self, kind: u16, first: u64, blocks: u16) -> (u16, u16) {
        self.ask_at(kind, HIGH + first * BLOCK, blocks)
    }

    /// Sends a request about any address.
    pub fn ask_at(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        self.write_request(kind, address, blocks);
        let answer = BUFFERS + 64;
        self.guest.ram.memory.write_slice(&[0xee; 10], GuestAddress(answer)).unwrap();
        self.guest.describe(0, 0, BUFFERS, 24, VRING_DESC_F_NEXT, 1);
        self.guest.describe(0, 1, answer, 10, VRING_DESC_F_WRITE, 0);
        self.guest.send(0, 0);
        assert_eq!(self.guest.used(0), [(0, 10)]);
        let bytes: [u8; 10] = self.guest.ram.memory.read_obj(GuestAddress(answer)).unwrap();
        assert_eq!(bytes[2..8], [0; 6], "padding");
        (u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[8], bytes[9]]))
    }

    /// What the host opened is what the device calls plugged.
    pub fn assert_books(&self) {
        let open = self.gate.lock().unwrap().open.len() as u64;
        assert_eq!(self.handle.plugged(), Bytes(open * BLOCK));
    }
}
