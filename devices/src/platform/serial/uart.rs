//! The registers of a 16550A (National Semiconductor, PC16550D data sheet, 1995), and its interrupt.
//!
//! The line has no speed: a byte is there, or gone, at once. What follows from that:
//! * Input does not overrun. It waits on the line until the guest asks for it by RTS, as with
//!   RTS/CTS flow control, and the receiver's FIFO holds none of it: there is nothing to clear.
//! * The trigger level counts as reached as soon as there is input.
//! * The transmitter is ready for whoever asks it by polling. A driver that waits for its interrupt
//!   is held back while the reader of the output is slow.
//! * In between the port rests, so that no interrupt handler goes on for ever: see [`burst`](super::burst).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::burst::Burst;
use super::output::Output;
use super::{BACKLOG, InputFlow, PortState};
use crate::state::{StateError, Version};

/// Received data (read) or data to transmit (written); the divisor's low byte where DLAB is set.
pub(super) const DATA: u8 = 0;
/// Interrupt enable; the divisor's high byte where DLAB is set.
pub(super) const IER: u8 = 1;
/// Interrupt identification (read), FIFO control (written).
pub(super) const IIR: u8 = 2;
const FCR: u8 = 2;
/// Line control.
pub(super) const LCR: u8 = 3;
/// Modem control.
pub(super) const MCR: u8 = 4;
/// Line status.
pub(super) const LSR: u8 = 5;
/// Modem status.
pub(super) const MSR: u8 = 6;
/// Scratch.
pub(super) const SCR: u8 = 7;

pub(super) const IER_RECEIVED: u8 = 1 << 0;
pub(super) const IER_TRANSMITTER: u8 = 1 << 1;
const IER_BITS: u8 = 0x0f;

pub(super) const IIR_NONE: u8 = 0x01;
pub(super) const IIR_TRANSMITTER: u8 = 0x02;
pub(super) const IIR_RECEIVED: u8 = 0x04;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;

pub(super) const LCR_DLAB: u8 = 1 << 7;
/// 8 bits, no parity, one stop bit.
const LCR_8N1: u8 = 0x03;

const MCR_DTR: u8 = 1 << 0;
pub(super) const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
pub(super) const MCR_OUT2: u8 = 1 << 3;
pub(super) const MCR_LOOP: u8 = 1 << 4;
const MCR_BITS: u8 = 0x1f;

pub(super) const LSR_DATA: u8 = 1 << 0;
/// The transmitter's holding register is empty, and so is the rest of it.
pub(super) const LSR_TRANSMITTER: u8 = 1 << 5 | 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// Depth of a FIFO, which holds what a guest sends to itself.
const FIFO: usize = 16;

/// 9600 baud, as firmware leaves it.
const DIVISOR: [u8; 2] = [12, 0];

/// Reads of the line status one after the other that make a guest one that polls for input. A
/// driver that looks whether it may send finds that it may, and goes on.
const POLLS: u8 = 16;

/// What is to be done after an access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effects {
    /// Raise the interrupt: one edge.
    pub(super) edge: bool,
    /// Call [`Uart::wake`] at this time.
    pub(super) wake: Option<Instant>,
    /// Tell whoever brings input that there is room again.
    pub(super) room: bool,
    /// Tell whoever waits for recent output that there is some.
    pub(super) recent: bool,
}

pub(super) struct Uart {
    output: Arc<Output>,
    divisor: [u8; 2],
    interrupt_enable: u8,
    fifos: bool,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    /// The transmitter has become empty, and nobody has been told.
    transmitter_news: bool,
    /// What waits on the line.
    input: VecDeque<u8>,
    /// Someone was told that there is no room for more.
    refused: bool,
    flow: InputFlow,
    polls: u8,
    /// What the guest has sent to itself.
    looped: VecDeque<u8>,
    burst: Burst,
    /// Whether the interrupt stood after the last access.
    stands: bool,
}

impl Uart {
    pub(super) fn new(output: Arc<Output>) -> Self {
        Self {
            output,
            divisor: DIVISOR,
            interrupt_enable: 0,
            fifos: false,
            line_control: LCR_8N1,
            modem_control: MCR_OUT2,
            scratch: 0,
            transmitter_news: false,
            input: VecDeque::new(),
            refused: false,
            flow: InputFlow::Unasked,
            polls: 0,
            looped: VecDeque::new(),
            burst: Burst::New,
            stands: false,
        }
    }

    pub(super) fn save(&self) -> PortState {
        PortState {
            version: Version,
            divisor_low: self.divisor[0],
            divisor_high: self.divisor[1],
            interrupt_enable: self.interrupt_enable,
            fifos_enabled: self.fifos,
            line_control: self.line_control,
            modem_control: self.modem_control,
            scratch: self.scratch,
            transmitter_interrupt: self.transmitter_news,
            flow: self.flow,
            input: self.input.iter().copied().collect(),
            looped: self.looped.iter().copied().collect(),
        }
    }

    /// A port that goes on where `state` was saved.
    pub(super) fn restore(output: Arc<Output>, state: &PortState) -> Result<Self, StateError> {
        for (waiting, most) in [(&state.input, BACKLOG), (&state.looped, FIFO)] {
            if waiting.len() > most {
                let what = format!("{} bytes of input wait, and there is room for {most}", waiting.len());
                return Err(StateError::Unreadable { device: "the serial port", what });
            }
        }
        Ok(Self {
            divisor: [state.divisor_low, state.divisor_high],
            interrupt_enable: state.interrupt_enable & IER_BITS,
            fifos: state.fifos_enabled,
            line_control: state.line_control,
            modem_control: state.modem_control & MCR_BITS,
            scratch: state.scratch,
            transmitter_news: state.transmitter_interrupt,
            input: state.input.iter().copied().collect(),
            // Whoever brought it was another process, and nobody else has been refused yet.
            refused: false,
            flow: state.flow,
            looped: state.looped.iter().copied().collect(),
            ..Self::new(output)
        })
    }

    /// The guest reads a register.
    pub(super) fn read(&mut self, register: u8, now: Instant) -> (u8, Effects) {
        self.polls = if register == LSR { self.polls.saturating_add(1) } else { 0 };
        let mut room = false;
        let value = match register {
            DATA if self.is_divisor() => self.divisor[0],
            IER if self.is_divisor() => self.divisor[1],
            DATA => {
                let byte = self.receive(now);
                room = self.has_room_again();
                byte
            }
            IER => self.interrupt_enable,
            IIR => {
                let reason = self.reason(now);
                if reason == IIR_TRANSMITTER {
                    self.transmitter_news = false;
                }
                reason | if self.fifos { IIR_FIFOS } else { 0 }
            }
            LCR => self.line_control,
            MCR => self.modem_control,
            LSR => {
                if self.polls >= POLLS && self.flow == InputFlow::Unasked {
                    self.flow = InputFlow::Polled;
                }
                let data = if self.has_data(now) { LSR_DATA } else { 0 };
                let transmits = self.transmits(now).is_ok();
                // Who finds it busy is told when it no longer is.
                self.transmitter_news |= !transmits;
                data | if transmits { LSR_TRANSMITTER } else { 0 }
            }
            MSR => self.modem_status(),
            SCR => self.scratch,
            _ => u8::MAX,
        };
        (value, Effects { room, ..self.effects(now) })
    }

    /// The guest writes a register.
    pub(super) fn write(&mut self, register: u8, value: u8, now: Instant) -> Effects {
        self.polls = 0;
        let mut recent = false;
        match register {
            DATA if self.is_divisor() => self.divisor[0] = value,
            IER if self.is_divisor() => self.divisor[1] = value,
            DATA => recent = self.transmit(value, now),
            IER => {
                self.interrupt_enable = value & IER_BITS;
                // It is empty, or soon will be. Told also where the bit stood already: a driver that believes it
                // is off, as another program has written the register, waits for this interrupt.
                self.transmitter_news |= self.enables(IER_TRANSMITTER);
            }
            FCR => self.fifos = value & FCR_ENABLE != 0,
            LCR => self.line_control = value,
            MCR => {
                self.modem_control = value & MCR_BITS;
                if !self.is_looped() {
                    self.looped.clear();
                    if value & MCR_RTS != 0 {
                        self.flow = InputFlow::ByRts;
                    }
                }
            }
            SCR => self.scratch = value,
            _ => {}
        }
        Effects { recent, ..self.effects(now) }
    }

    /// Takes input for the guest, as far as there is room, and returns how much that was.
    pub(super) fn enqueue(&mut self, input: &[u8], now: Instant) -> (usize, Effects) {
        let room = BACKLOG.saturating_sub(self.input.len());
        let (taken, rest) = input.split_at(input.len().min(room));
        self.input.extend(taken);
        self.refused |= !rest.is_empty();
        (taken.len(), self.effects(now))
    }

    /// A rest may be over, or the reader of the output has gone on.
    pub(super) fn wake(&mut self, now: Instant) -> Effects {
        self.effects(now)
    }

    fn is_divisor(&self) -> bool {
        self.line_control & LCR_DLAB != 0
    }

    fn is_looped(&self) -> bool {
        self.modem_control & MCR_LOOP != 0
    }

    fn enables(&self, interrupt: u8) -> bool {
        self.interrupt_enable & interrupt != 0
    }

    /// Whether the guest asks for input.
    fn asks(&self) -> bool {
        match self.flow {
            // What a driver reads before this, it throws away.
            InputFlow::Unasked => self.enables(IER_RECEIVED),
            InputFlow::Polled => true,
            InputFlow::ByRts => self.modem_control & MCR_RTS != 0,
        }
    }

    fn has_data(&self, now: Instant) -> bool {
        if self.is_looped() {
            return !self.looped.is_empty();
        }
        let rests = self.enables(IER_RECEIVED) && self.burst.rest(now).is_some();
        !self.input.is_empty() && self.asks() && !rests
    }

    fn receive(&mut self, now: Instant) -> u8 {
        if !self.has_data(now) {
            return 0;
        }
        if self.is_looped() {
            return self.looped.pop_front().unwrap_or_default();
        }
        if self.enables(IER_RECEIVED) {
            self.burst.spend(now);
        }
        self.input.pop_front().unwrap_or_default()
    }

    /// Whether whoever was refused may bring more: not for each byte, but for much.
    fn has_room_again(&mut self) -> bool {
        let room = self.refused && self.input.len() <= BACKLOG / 2;
        self.refused &= !room;
        room
    }

    /// Whether the transmitter is empty. Only a driver that waits for its interrupt finds it busy.
    ///
    /// # Errors
    /// It is not; and when it may be.
    fn transmits(&self, now: Instant) -> Result<(), Instant> {
        if !self.enables(IER_TRANSMITTER) || self.is_looped() {
            return Ok(());
        }
        match self.burst.rest(now) {
            Some(until) => Err(until),
            None => self.output.room(now),
        }
    }

    /// Returns whether somebody waits for recent output.
    fn transmit(&mut self, byte: u8, now: Instant) -> bool {
        self.transmitter_news = true;
        if self.is_looped() {
            if self.looped.len() < FIFO {
                self.looped.push_back(byte);
            }
            return false;
        }
        if self.enables(IER_TRANSMITTER) {
            self.burst.spend(now);
        }
        self.output.put(byte, now)
    }

    /// The interrupt that stands, as it is identified.
    fn reason(&self, now: Instant) -> u8 {
        if self.enables(IER_RECEIVED) && self.has_data(now) {
            IIR_RECEIVED
        } else if self.enables(IER_TRANSMITTER) && self.transmitter_news && self.transmits(now).is_ok() {
            IIR_TRANSMITTER
        } else {
            IIR_NONE
        }
    }

    fn modem_status(&self) -> u8 {
        if !self.is_looped() {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .iter()
            .filter(|(output, _)| self.modem_control & output != 0)
            .fold(0, |status, (_, input)| status | input)
    }

    /// What follows from where the port stands. An edge is the interrupt's beginning: as long as it
    /// stands, a driver finds a reason, and comes back by itself.
    fn effects(&mut self, now: Instant) -> Effects {
        let stood = self.stands;
        self.stands = self.reason(now) != IIR_NONE;
        let busy = self.transmits(now).err();
        self.transmitter_news |= busy.is_some();
        let rests = self.burst.rest(now).filter(|_| self.enables(IER_RECEIVED) && !self.input.is_empty());
        let wake = busy.into_iter().chain(rests).min();
        Effects { edge: self.stands && !stood, wake, room: false, recent: false }
    }
}
