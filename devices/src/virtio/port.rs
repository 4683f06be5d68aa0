//! The console device (virtio 1.2, section 5.3) with one named port, on which
//! a program in the guest talks to the host and nothing is ever said back.
//!
//! It is no console: the driver is told of a port of the given name, and Linux
//! shows it as `/dev/vportNpM` (udev links it as `/dev/virtio-ports/NAME`).
//! A driver without VIRTIO_CONSOLE_F_MULTIPORT can't open it, and is not heard.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::GuestMemoryMmap;

use super::device::{Active, Progress, VirtioDevice, read_part};
use super::queue::{Budget, Chain, Faults, Verdict, serve};
use crate::state::{self, StateError, Version};

/// Bytes of one buffer that are heard at most; the rest of it is passed over.
pub const MOST_BYTES: usize = 4096;

/// The longest name of a port, in bytes.
pub const LONGEST_NAME: usize = 64;

/// VIRTIO_CONSOLE_F_MULTIPORT (section 5.3.3).
pub const MULTIPORT: u32 = 1;

// Queues (section 5.3.2): 0 is to the program, 1 from it; 2 and 3 are the same for control
// messages. Linux fills each queue to the guest with pages, one for a place: those are small.
const FROM_GUEST: usize = 1;
const CONTROL_TO_GUEST: usize = 2;
const CONTROL_FROM_GUEST: usize = 3;
const QUEUE_SIZES: [u16; 4] = [2, 16, 4, 8];

const BUDGET: Budget = Budget { chains: 16, bytes: 4 * MOST_BYTES as u64 };

/// `struct virtio_console_config`: columns, rows, max_nr_ports, emerg_wr (section 5.3.4).
const CONFIG: [u8; 12] = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// The one port's number.
const PORT: u32 = 0;

// `struct virtio_console_control`: id, event, value (section 5.3.6.2).
const CONTROL: usize = 8;
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What happens on the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortEvent<'a> {
    /// A program in the guest has opened it.
    Opened,
    /// It has been closed, or the driver has gone.
    Closed,
    /// A piece of what the program wrote. Where pieces end means nothing.
    Data(&'a [u8]),
}

/// How far the driver knows the port; each state names what it is told next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Handshake {
    /// The driver has not asked for ports yet.
    None,
    /// It has: the port is to be added.
    Adding,
    /// It is added; the driver gets ready for it.
    Added,
    /// The driver is ready: the port's name is to be told.
    Naming,
    /// Then, that the host's side is open.
    Opening,
    /// The driver knows all.
    Complete,
}

/// What a port knows, as data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Of this struct.
    pub version: Version<1>,
    /// How far the driver knows the port.
    pub handshake: Handshake,
    /// Whether a program in the guest has opened it.
    pub open: bool,
    /// Malformed chains so far.
    pub faults: Faults,
}

const DEVICE: &str = "the port to the guest";

/// One port, heard by a function that is called on the device's event loop.
pub struct Port {
    name: &'static str,
    hear: Box<dyn FnMut(PortEvent<'_>) + Send>,
    handshake: Handshake,
    open: bool,
    faults: Faults,
}

impl Port {
    /// A port that no driver has found yet. Of `name` the first [`LONGEST_NAME`] bytes count.
    pub fn new(name: &'static str, hear: impl FnMut(PortEvent<'_>) + Send + 'static) -> Self {
        Self {
            name,
            hear: Box::new(hear),
            handshake: Handshake::None,
            open: false,
            faults: Faults::default(),
        }
    }

    /// Malformed chains handed back since the device was made.
    pub fn malformed(&self) -> u64 {
        self.faults.total()
    }

    fn set_open(&mut self, open: bool) {
        if self.open != open {
            self.open = open;
            (self.hear)(if open { PortEvent::Opened } else { PortEvent::Closed });
        }
    }

    /// Tells the driver what it is to know next, as far as it has left room for that.
    fn tell(&mut self, active: &mut Active) -> Progress {
        loop {
            let mut message = [0; CONTROL + LONGEST_NAME];
            let Some((length, next)) = self.next_message(&mut message) else { return Progress::Done };
            let message = message.get(..length).unwrap_or_default();
            let mut told = false;
            let one = Budget { chains: 1, bytes: u64::MAX };
            let progress = serve(active, CONTROL_TO_GUEST, &mut self.faults, one, |memory, chain| {
                let verdict = write(memory, chain, message);
                told = verdict != Verdict::Malformed;
                verdict
            });
            if told {
                self.handshake = next;
            }
            if progress != Progress::More {
                return progress;
            }
        }
    }

    /// Writes the message that is due; gives its length and what the driver knows after it.
    fn next_message(&self, message: &mut [u8; CONTROL + LONGEST_NAME]) -> Option<(usize, Handshake)> {
        let (event, value, name, next) = match self.handshake {
            Handshake::Adding => (DEVICE_ADD, 1, "", Handshake::Added),
            Handshake::Naming => (PORT_NAME, 1, self.name, Handshake::Opening),
            Handshake::Opening => (PORT_OPEN, 1, "", Handshake::Complete),
            Handshake::None | Handshake::Added | Handshake::Complete => return None,
        };
        let (control, place) = message.split_at_mut(CONTROL);
        control.copy_from_slice(&encode(event, value));
        let length = name.len().min(place.len());
        for (byte, letter) in place.iter_mut().zip(name.bytes()) {
            *byte = letter;
        }
        Some((CONTROL + length, next))
    }

    /// Hears what the driver says of its side, and answers.
    fn control(&mut self, active: &mut Active) -> Progress {
        // As many as the queue holds; the device has no other state for them to fill.
        let mut said = [None; QUEUE_SIZES[CONTROL_FROM_GUEST] as usize];
        let mut places = said.iter_mut();
        let progress = serve(active, CONTROL_FROM_GUEST, &mut self.faults, BUDGET, |memory, chain| {
            let mut control = [0; CONTROL];
            if !chain.writable().is_empty() || chain.reader(memory).read(&mut control) < CONTROL {
                return Verdict::Malformed;
            }
            if let Some(place) = places.next() {
                *place = Some(control);
            }
            Verdict::Used(0)
        });
        for control in said.into_iter().flatten() {
            self.take_control(control);
        }
        match (progress, self.tell(active)) {
            (Progress::Broken, _) | (_, Progress::Broken) => Progress::Broken,
            (progress, _) => progress,
        }
    }

    /// What the driver says of its side.
    fn take_control(&mut self, control: [u8; CONTROL]) {
        let [a, b, c, d, event_low, event_high, value_low, value_high] = control;
        let port = u32::from_le_bytes([a, b, c, d]);
        let value = u16::from_le_bytes([value_low, value_high]);
        match u16::from_le_bytes([event_low, event_high]) {
            DEVICE_READY if value == 1 => self.handshake = Handshake::Adding,
            PORT_READY if port == PORT && value == 1 && self.handshake == Handshake::Added => {
                self.handshake = Handshake::Naming;
            }
            PORT_OPEN if port == PORT => self.set_open(value == 1),
            _ => {}
        }
    }
}

fn encode(event: u16, value: u16) -> [u8; CONTROL] {
    let [a, b, c, d] = PORT.to_le_bytes();
    let ([e, f], [g, h]) = (event.to_le_bytes(), value.to_le_bytes());
    [a, b, c, d, e, f, g, h]
}

/// Writes a message to a chain that has no other purpose, and room for all of it.
fn write(memory: &GuestMemoryMmap, chain: &Chain, message: &[u8]) -> Verdict {
    let mut writer = chain.writer(memory);
    let fits = chain.readable().is_empty() && writer.left() >= message.len() as u64;
    if fits && writer.write(message) == message.len() {
        Verdict::Used(writer.written())
    } else {
        Verdict::Malformed
    }
}

impl VirtioDevice for Port {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        1 << MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_part(&CONFIG, offset, data);
    }

    /// An emergency write is not offered, and nothing else is the driver's to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _active: &mut Active) {}

    fn reset(&mut self) {
        self.set_open(false);
        self.handshake = Handshake::None;
        self.faults.forgive();
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        match index {
            FROM_GUEST => {
                let (open, hear) = (self.open, &mut self.hear);
                serve(active, index, &mut self.faults, BUDGET, |memory, chain| {
                    listen(memory, chain, open, hear)
                })
            }
            CONTROL_TO_GUEST => self.tell(active),
            CONTROL_FROM_GUEST => self.control(active),
            // Nothing is ever said to the program.
            _ => Progress::Done,
        }
    }

    fn save(&self) -> Result<Value, StateError> {
        let (handshake, open, faults) = (self.handshake, self.open, self.faults);
        state::to_value(&PortState { version: Version, handshake, open, faults })
    }

    fn restore(&mut self, state: Value, active: Option<&mut Active>) -> Result<(), StateError> {
        let state: PortState = state::from_value::<_, 1>(DEVICE, state)?;
        if active.is_none() && (state.open || state.handshake != Handshake::None) {
            let what = "a driver knows it, and there is no driver".to_owned();
            return Err(StateError::Unreadable { device: DEVICE, what });
        }
        self.handshake = state.handshake;
        self.faults = state.faults;
        self.set_open(state.open);
        Ok(())
    }
}

/// Passes on what a chain holds.
fn listen(
    memory: &GuestMemoryMmap,
    chain: &Chain,
    open: bool,
    hear: &mut impl FnMut(PortEvent<'_>),
) -> Verdict {
    if !chain.writable().is_empty() {
        return Verdict::Malformed;
    }
    let mut reader = chain.reader(memory);
    let mut piece = [0; 512];
    let mut heard = 0;
    while open && heard < MOST_BYTES {
        let count = reader.read(&mut piece);
        match piece.get(..count) {
            Some(data) if !data.is_empty() => hear(PortEvent::Data(data)),
            _ => break,
        }
        heard += count;
    }
    Verdict::Used(0)
}
