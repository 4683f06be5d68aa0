//! The serial port: a 16550 (on vm-superio) whose line ends at a terminal, a file or a socket.
//!
//! Output is written where the guest writes it, on the thread of its vCPU: a
//! reader that stalls holds that vCPU, as hardware flow control would hold a
//! sender; other vCPUs and devices go on. Whoever brings input is one of them:
//! a [`Port`] takes it without waiting for such a vCPU. Output that fails is
//! dropped and counted, so a closed terminal never stops a guest.

mod line;
mod port;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vm_device::MutDevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use self::line::Line;
pub use self::port::Port;
use crate::state::{StateError, Version};

/// Ports that the device takes.
pub const PORTS: u16 = 8;

/// Bytes of input that wait for the guest beside the 64 in the port's own queue.
pub const BACKLOG: usize = 4096;

struct Edge(EventFd);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        // The one failure is a full counter, which is an interrupt already pending.
        let _ = self.0.write(1);
        Ok(())
    }
}

#[derive(Default)]
struct Lost(AtomicU64);

impl SerialEvents for Lost {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn in_buffer_empty(&self) {}
}

/// What a serial port knows, as data. The registers are those of a 16550.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Of this struct.
    pub version: Version<1>,
    /// The divisor latch, low byte.
    pub divisor_low: u8,
    /// The divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable.
    pub interrupt_enable: u8,
    /// Interrupt identification.
    pub interrupt_identification: u8,
    /// Line control.
    pub line_control: u8,
    /// Line status.
    pub line_status: u8,
    /// Modem control.
    pub modem_control: u8,
    /// Modem status.
    pub modem_status: u8,
    /// Scratch.
    pub scratch: u8,
    /// Input in the port's own queue: at most 64 bytes.
    pub input: Vec<u8>,
    /// Input that waits for room there: at most [`BACKLOG`] bytes.
    pub backlog: Vec<u8>,
    /// Bytes of output that could not be written.
    pub lost_output: u64,
}

/// A serial port, for one thread at a time.
pub struct Serial {
    uart: Uart<Edge, Arc<Lost>, Box<dyn Write + Send>>,
    line: Arc<Line>,
    lost: Arc<Lost>,
}

impl Serial {
    /// A port whose interrupt line is `irq` (edge-triggered) and whose output goes to `output`.
    ///
    /// # Errors
    /// No eventfd can be had.
    pub fn new(irq: EventFd, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let lost = Arc::new(Lost::default());
        Ok(Self {
            uart: Uart::with_events(Edge(irq), lost.clone(), output),
            line: Arc::new(Line::new(VecDeque::new())?),
            lost,
        })
    }

    /// What the port knows. The guest's vCPUs must stand still.
    pub fn save(&self) -> PortState {
        let uart = self.uart.state();
        PortState {
            version: Version,
            divisor_low: uart.baud_divisor_low,
            divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            input: uart.in_buffer,
            backlog: self.line.waiting(),
            lost_output: self.lost_output(),
        }
    }

    /// A port that goes on where `state` was saved. An interrupt that stood is raised again.
    ///
    /// # Errors
    /// [`StateError::Unreadable`] where more input waits than a port has room for;
    /// [`StateError::Host`] where no eventfd can be had.
    pub fn restore(
        irq: EventFd,
        output: Box<dyn Write + Send>,
        state: &PortState,
    ) -> Result<Self, StateError> {
        let unreadable =
            |what: &str| StateError::Unreadable { device: "the serial port", what: what.to_owned() };
        if state.backlog.len() > BACKLOG {
            return Err(unreadable("more input waits for the guest than there is room for"));
        }
        let uart = SerialState {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let lost = Arc::new(Lost(AtomicU64::new(state.lost_output)));
        let uart = Uart::from_state(&uart, Edge(irq), lost.clone(), output)
            .map_err(|_| unreadable("more input lies in the port than it has room for"))?;
        let line = Arc::new(Line::new(state.backlog.iter().copied().collect())?);
        let mut serial = Self { uart, line, lost };
        serial.refill();
        Ok(serial)
    }

    /// Takes input for the guest and returns how many bytes there was room for.
    /// The rest is the caller's to keep until [`room_event`](Self::room_event) is readable.
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        let taken = self.line.put(input);
        self.refill();
        taken
    }

    /// Becomes readable when the guest has read all input after
    /// [`enqueue`](Self::enqueue) had to leave some behind.
    pub fn room_event(&self) -> &EventFd {
        self.line.room()
    }

    /// Bytes of output that could not be written.
    pub fn lost_output(&self) -> u64 {
        self.lost.0.load(Ordering::Relaxed)
    }

    /// Moves waiting input to the port, as far as its queue goes.
    fn refill(&mut self) {
        let uart = &mut self.uart;
        // Zero in loopback mode, in which the line is cut off.
        self.line.take(|input| {
            let piece = input.get(..input.len().min(uart.fifo_capacity())).unwrap_or_default();
            if piece.is_empty() { 0 } else { uart.enqueue_raw_bytes(piece).unwrap_or(0) }
        });
    }
}

impl MutDevicePio for Serial {
    /// Anything but a byte is no access to a 16550, and reads as an empty bus.
    fn pio_read(&mut self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        match (u8::try_from(offset), data) {
            (Ok(register), [byte]) => {
                *byte = self.uart.read(register);
                self.refill();
            }
            (_, data) => data.fill(0xff),
        }
    }

    fn pio_write(&mut self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let (Ok(register), [byte]) = (u8::try_from(offset), data) {
            // The one failure is output that could not be written, which is counted.
            let _ = self.uart.write(register, *byte);
            self.refill();
        }
    }
}
