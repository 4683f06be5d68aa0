//! The serial port: a 16550 whose line ends at a terminal, a file or a socket.
//!
//! A [`Port`] stands between the guest and two others: one brings input, one takes output. None
//! of the three ever waits for another. Output goes through a bounded buffer, whose reader is
//! called for whole lines, or after [`FLUSH_AFTER`]; input waits in a bounded queue. Where
//! either is full, the other side is told to wait: the guest's driver by its transmitter, which
//! is busy; whoever brings input by [`Port::enqueue`]. The last output is kept beside that, for
//! whoever comes to look at it ([`Port::read_recent`]).

mod burst;
#[cfg(test)]
mod driver_tests;
mod output;
mod recent;
#[cfg(test)]
mod tests;
mod uart;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use self::output::Output;
pub use self::output::{
    CHUNK, FLUSH_AFTER, FirstReader, MOST_UNREAD, MOST_WAITING, OutputCounts, PATIENCE, missing,
};
pub use self::recent::{MOST_RECENT, RecentRead};
use self::uart::{Effects, Uart};
use crate::state::{StateError, Version};

/// Ports that the device takes.
pub const PORTS: u16 = 8;

/// The most input that waits for the guest, in bytes.
pub const BACKLOG: usize = 4096;

/// What a serial port knows, as data. Output that waits for its reader is not part of it: it stays
/// with the reader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Of this struct.
    pub version: Version<2>,
    /// The divisor latch, low byte.
    pub divisor_low: u8,
    /// The divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable.
    pub interrupt_enable: u8,
    /// Whether the FIFOs are enabled.
    pub fifos_enabled: bool,
    /// Line control.
    pub line_control: u8,
    /// Modem control.
    pub modem_control: u8,
    /// Scratch.
    pub scratch: u8,
    /// The transmitter's interrupt has not been identified yet.
    pub transmitter_interrupt: bool,
    /// How the guest asks for input.
    pub flow: InputFlow,
    /// Input that waits for the guest: at most [`BACKLOG`] bytes.
    pub input: Vec<u8>,
    /// What the guest has sent to itself: at most 16 bytes.
    pub looped: Vec<u8>,
}

/// How a guest asks for input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputFlow {
    /// It has not asked yet: it gets input while the receiver's interrupt is enabled.
    Unasked,
    /// It reads the line status time and again: it gets all input.
    Polled,
    /// It has set RTS once: it gets input while RTS is set.
    ByRts,
}

/// A serial port, for many threads.
pub struct Port {
    inner: Mutex<Inner>,
    output: Arc<Output>,
    interrupt: EventFd,
    room: EventFd,
    recent: EventFd,
}

struct Inner {
    uart: Uart,
    timer: TimerFd,
    /// When the timer expires.
    wake: Option<Instant>,
}

impl Port {
    /// A port whose interrupt line is `interrupt` (edge-triggered), and whose output `reader` gets.
    ///
    /// # Errors
    /// No eventfd or timer can be had.
    pub fn new(interrupt: EventFd, reader: FirstReader) -> io::Result<Self> {
        let output = Arc::new(Output::new(reader));
        Self::with(interrupt, Uart::new(Arc::clone(&output)), output)
    }

    /// What the port knows. The guest's vCPUs must stand still.
    pub fn save(&self) -> PortState {
        self.inner().uart.save()
    }

    /// A port that goes on where `state` was saved. An interrupt that stood is raised again.
    ///
    /// # Errors
    /// [`StateError::Unreadable`] where more input waits than a port has room for;
    /// [`StateError::Host`] where no eventfd or timer can be had.
    pub fn restore(interrupt: EventFd, reader: FirstReader, state: &PortState) -> Result<Self, StateError> {
        let output = Arc::new(Output::new(reader));
        let port = Self::with(interrupt, Uart::restore(Arc::clone(&output), state)?, output)?;
        port.wake();
        Ok(port)
    }

    fn with(interrupt: EventFd, uart: Uart, output: Arc<Output>) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let (room, recent) = (event()?, event()?);
        Ok(Self { inner: Mutex::new(Inner { uart, timer, wake: None }), output, interrupt, room, recent })
    }

    /// Takes input for the guest and returns how many bytes there was room for.
    /// The rest is the caller's to keep until [`room_event`](Self::room_event) is readable.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        let mut inner = self.inner();
        let (taken, effects) = inner.uart.enqueue(input, Instant::now());
        self.carry_out(&mut inner, effects);
        taken
    }

    /// Raises the interrupt though nothing is there to be done: whoever sleeps until the port wakes it, wakes.
    pub fn nudge(&self) {
        // As below: the one failure is an interrupt already pending.
        let _ = self.interrupt.write(1);
    }

    /// Becomes readable when there is room for much input after [`enqueue`](Self::enqueue) had to
    /// leave some behind.
    pub fn room_event(&self) -> &EventFd {
        &self.room
    }

    /// Becomes readable when [`wake`](Self::wake) is to be called.
    pub fn timer(&self) -> RawFd {
        self.inner().timer.as_raw_fd()
    }

    /// Goes on after a rest.
    pub fn wake(&self) {
        let mut inner = self.inner();
        // Not read: a timer that has been set anew in the meantime would keep its reader waiting.
        inner.wake = None;
        let effects = inner.uart.wake(Instant::now());
        if effects.wake.is_none() {
            let _ = inner.timer.reset(Duration::ZERO, None);
        }
        self.carry_out(&mut inner, effects);
    }

    /// Fills `chunk` with what the reader of the output is to get next, at most some [`CHUNK`], and waits until
    /// there is something. What becomes of it is to be told by [`written`](Self::written),
    /// [`not_written`](Self::not_written) or [`refused`](Self::refused) before the next call.
    /// Returns false when nothing more will come.
    pub fn next_output(&self, chunk: &mut Vec<u8>) -> bool {
        self.output.next(chunk)
    }

    /// The reader has taken the first `count` bytes of the chunk; the rest is given again.
    pub fn written(&self, count: usize) {
        let resumes = self.output.written(count);
        self.resume(resumes);
    }

    /// The reader that the chunk was for is no longer there: the next one gets it.
    pub fn not_written(&self) {
        self.output.not_written();
    }

    /// The reader refuses the chunk, which is given again after `pause`. The guest is not held back meanwhile.
    pub fn refused(&self, pause: Duration) {
        let resumes = self.output.refused(Instant::now() + pause);
        self.resume(resumes);
    }

    /// A reader is there.
    pub fn reader_came(&self) {
        self.output.reader_came();
    }

    /// The reader has left, and another may come.
    pub fn reader_left(&self) {
        let resumes = self.output.reader_left();
        self.resume(resumes);
    }

    /// The reader that the chunk was for has left, and none will come: output is lost from now on.
    pub fn reader_gone(&self) {
        let resumes = self.output.reader_gone();
        self.resume(resumes);
    }

    /// Has a reader who is there take all output, and waits for it, but for no longer than
    /// `patience` while it takes nothing, and three times that in all. No more is to come.
    pub fn finish(&self, patience: Duration) {
        self.output.finish(patience);
    }

    /// Appends at most `most` bytes of the last output to `into`, from `position` on, which counts the bytes since
    /// the port was made. Whoever reads the output otherwise is not touched by this.
    pub fn read_recent(&self, position: u64, most: usize, into: &mut Vec<u8>) -> RecentRead {
        self.output.read_recent(position, most, into)
    }

    /// Makes [`recent_event`](Self::recent_event) readable, once, as soon as there is output at `position`.
    pub fn await_recent(&self, position: u64) {
        if self.output.await_recent(position) {
            self.tell_of_recent();
        }
    }

    /// Becomes readable when there is output that was waited for by [`await_recent`](Self::await_recent).
    pub fn recent_event(&self) -> &EventFd {
        &self.recent
    }

    /// What has become of the output so far.
    pub fn output_counts(&self) -> OutputCounts {
        self.output.counts()
    }

    fn tell_of_recent(&self) {
        // The one failure is a full counter, which is readable.
        let _ = self.recent.write(1);
    }

    fn resume(&self, resumes: bool) {
        if resumes {
            self.wake();
        }
    }

    fn carry_out(&self, inner: &mut Inner, effects: Effects) {
        if effects.edge {
            // The one failure is a full counter, which is an interrupt already pending.
            let _ = self.interrupt.write(1);
        }
        if effects.room {
            let _ = self.room.write(1);
        }
        if effects.recent {
            self.tell_of_recent();
        }
        if let Some(wake) = effects.wake
            && inner.wake != Some(wake)
        {
            inner.wake = Some(wake);
            // Zero would disarm it.
            let time = wake.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
            let _ = inner.timer.reset(time, None);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

/// Anything but a byte is no access to a 16550, and reads as an empty bus.
impl DevicePio for Port {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let (Ok(register), [byte]) = (u8::try_from(offset), &mut *data) else { return data.fill(u8::MAX) };
        let mut inner = self.inner();
        let (value, effects) = inner.uart.read(register, Instant::now());
        *byte = value;
        self.carry_out(&mut inner, effects);
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let (Ok(register), [byte]) = (u8::try_from(offset), data) {
            let mut inner = self.inner();
            let effects = inner.uart.write(register, *byte, Instant::now());
            self.carry_out(&mut inner, effects);
        }
    }
}
