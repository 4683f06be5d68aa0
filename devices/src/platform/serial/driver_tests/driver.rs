//! Linux's 8250 driver, with what programs and the host do beside it, on a clock of its own.

use std::collections::VecDeque;
use std::time::Duration;

use super::super::output::FirstReader;
use super::super::uart::*;
use super::super::*;

/// What the driver hands over in one pass for output.
const TX_LOAD: usize = 16;
/// What it takes in one pass for input.
const RX_PASS: usize = 256;
/// How many passes it makes until it takes the port for a broken one.
const PASS_LIMIT: usize = 512;
/// Its buffer of output.
const XMIT: usize = 4096;
/// How often it looks for a transmitter that has become empty.
const XMIT_TRIES: usize = 10_000;

/// More accesses than any handler may make: each byte of a burst on its own, with all that goes
/// with a pass, and a last load.
const LONGEST_HANDLER: usize = 8 * (super::super::burst::BURST as usize + TX_LOAD);

/// What happens on the host's side while the guest works.
#[derive(Clone, Copy, Debug)]
pub(super) enum HostAct {
    Nothing,
    /// As much input as there is room for, and at most so much.
    Bring(usize),
    /// As much output as is there, and at most so much.
    Read(usize),
}

/// What the guest does, beside its handler.
#[derive(Clone, Debug)]
pub(super) enum GuestAct {
    /// A program writes to the terminal.
    Write(Vec<u8>),
    /// The kernel prints.
    Print(Vec<u8>),
    /// Programs don't keep up with input.
    Throttle,
    Unthrottle,
    /// The last program closes the terminal, and one opens it again.
    Reopen,
    /// Nothing for so many microseconds.
    Rest(u64),
    /// The terminal gives back what it gets, from now on or no longer.
    Echo(bool),
}

/// Port, driver and host, on a clock of their own.
pub(super) struct World {
    pub(super) uart: Uart,
    pub(super) output: Arc<Output>,
    pub(super) now: Instant,
    pub(super) wake: Option<Instant>,
    pub(super) interrupt: bool,
    /// What happens during the next accesses, and how long each takes in microseconds.
    pub(super) script: VecDeque<(HostAct, u64)>,
    /// Input that has not been taken yet.
    pub(super) to_bring: VecDeque<u8>,
    pub(super) read: Vec<u8>,
    pub(super) accesses: usize,
    /// What programs on other processors write, as fast as there is room for it.
    pub(super) flood: Vec<u8>,
    /// Whether the terminal gives back what it gets.
    pub(super) echoes: bool,
    // The driver.
    pub(super) is_open: bool,
    pub(super) ier: u8,
    pub(super) mcr: u8,
    pub(super) xmit: VecDeque<u8>,
    pub(super) received: Vec<u8>,
    /// Output in the order in which it went to the port.
    pub(super) sent: Vec<u8>,
}

impl World {
    pub(super) fn new(input: &[u8], script: Vec<(HostAct, u64)>) -> Self {
        let output = Arc::new(Output::new(FirstReader::Present));
        Self {
            uart: Uart::new(output.clone()),
            output,
            now: Instant::now(),
            wake: None,
            interrupt: false,
            script: script.into(),
            to_bring: input.iter().copied().collect(),
            read: Vec::new(),
            accesses: 0,
            flood: Vec::new(),
            echoes: false,
            is_open: false,
            ier: 0,
            mcr: 0,
            xmit: VecDeque::new(),
            received: Vec::new(),
            sent: Vec::new(),
        }
    }

    pub(super) fn follow(&mut self, effects: Effects) {
        self.interrupt |= effects.edge;
        if effects.wake.is_some() {
            self.wake = effects.wake;
        }
    }

    pub(super) fn pass_time(&mut self, time: Duration) {
        self.now += time;
        if self.wake.is_some_and(|wake| wake <= self.now) {
            self.wake = None;
            let effects = self.uart.wake(self.now);
            self.follow(effects);
        }
    }

    pub(super) fn host(&mut self, act: HostAct) {
        match act {
            HostAct::Nothing => {}
            HostAct::Bring(most) => {
                let input: Vec<u8> = self.to_bring.iter().take(most.min(BACKLOG)).copied().collect();
                let (taken, effects) = self.uart.enqueue(&input, self.now);
                self.to_bring.drain(..taken);
                self.follow(effects);
            }
            HostAct::Read(most) => {
                let mut chunk = Vec::new();
                self.output.lock().give(&mut chunk);
                chunk.truncate(most);
                self.read.extend(&chunk);
                if self.output.written(chunk.len()) {
                    let effects = self.uart.wake(self.now);
                    self.follow(effects);
                }
            }
        }
    }

    pub(super) fn access(&mut self) {
        self.accesses += 1;
        let (act, micros) = self.script.pop_front().unwrap_or((HostAct::Nothing, 4));
        self.host(act);
        self.pass_time(Duration::from_micros(micros));
    }

    pub(super) fn port_in(&mut self, register: u8) -> u8 {
        self.access();
        let (value, effects) = self.uart.read(register, self.now);
        self.follow(effects);
        value
    }

    pub(super) fn port_out(&mut self, register: u8, value: u8) {
        self.access();
        if register == DATA {
            self.sent.push(value);
        }
        let effects = self.uart.write(register, value, self.now);
        self.follow(effects);
    }

    pub(super) fn set_ier(&mut self, ier: u8) {
        self.ier = ier;
        self.port_out(IER, ier);
    }

    pub(super) fn set_mcr(&mut self, mcr: u8) {
        self.mcr = mcr;
        self.port_out(MCR, mcr);
    }

    /// serial8250_interrupt: passes until the port has no reason.
    pub(super) fn handle_interrupt(&mut self) {
        self.interrupt = false;
        let before = self.accesses;
        for pass in 0.. {
            let iir = self.port_in(IIR);
            if iir & IIR_NONE != 0 {
                break;
            }
            assert!(pass < PASS_LIMIT, "too much work for an interrupt");
            self.handle_pass();
            // The port's lock is free for a moment.
            self.write_flood();
        }
        let accesses = self.accesses - before;
        assert!(accesses <= LONGEST_HANDLER, "a handler made {accesses} accesses");
    }

    /// serial8250_handle_irq
    pub(super) fn handle_pass(&mut self) {
        let mut lsr = self.port_in(LSR);
        if lsr & LSR_DATA != 0 {
            assert!(self.mcr & MCR_RTS != 0, "input comes to a guest that does not keep up");
            for _ in 0..RX_PASS {
                if lsr & LSR_DATA != 0 {
                    let byte = self.port_in(DATA);
                    self.received.push(byte);
                }
                lsr = self.port_in(LSR);
                if lsr & LSR_DATA == 0 {
                    break;
                }
            }
        }
        self.port_in(MSR);
        if lsr & LSR_TRANSMITTER != 0 && self.ier & IER_TRANSMITTER != 0 {
            self.transmit();
        }
    }

    /// serial8250_tx_chars
    pub(super) fn transmit(&mut self) {
        for _ in 0..TX_LOAD {
            let Some(byte) = self.xmit.pop_front() else { break };
            self.port_out(DATA, byte);
        }
        if self.xmit.is_empty() {
            self.set_ier(self.ier & !IER_TRANSMITTER);
        }
    }

    /// serial8250_do_startup, then what `uart_port_startup` adds.
    pub(super) fn open(&mut self) {
        for fcr in [0x01, 0x07, 0x00] {
            self.port_out(IIR, fcr);
        }
        self.clear_reasons();
        self.port_out(LCR, 0x03);
        // Whether the transmitter's interrupt comes back.
        let mut found = [0; 2];
        for iir in &mut found {
            self.port_out(IER, IER_TRANSMITTER);
            *iir = self.port_in(IIR);
            self.port_out(IER, 0);
        }
        assert!(found[0] & IIR_NONE != 0 || found[1] & IIR_NONE == 0, "it counts as broken (THRE)");
        self.set_mcr(MCR_OUT2);
        self.port_out(IER, IER_TRANSMITTER);
        let lsr = self.port_in(LSR);
        let iir = self.port_in(IIR);
        self.port_out(IER, 0);
        assert!(lsr & LSR_TRANSMITTER == 0 || iir & IIR_NONE == 0, "it counts as broken (TXEN)");
        self.clear_reasons();
        self.set_ier(IER_RECEIVED | 0x04);
        self.port_out(IIR, 0x81);
        self.is_open = true;
        self.set_mcr(MCR_OUT2 | MCR_RTS | 1);
    }

    /// "for luck"
    pub(super) fn clear_reasons(&mut self) {
        self.port_in(LSR);
        let lost = self.port_in(DATA);
        assert_eq!(lost, 0, "the driver throws away what comes before it listens");
        self.port_in(IIR);
        self.port_in(MSR);
    }

    /// uart_shutdown and serial8250_do_shutdown, after the last output has gone.
    pub(super) fn close(&mut self) {
        self.settle(false);
        self.set_mcr(MCR_OUT2);
        self.set_ier(0);
        self.is_open = false;
        self.interrupt = false;
        self.port_in(LCR);
        for fcr in [0x01, 0x07, 0x00] {
            self.port_out(IIR, fcr);
        }
        let lost = self.port_in(DATA);
        assert_eq!(lost, 0, "the driver throws away what comes when it no longer listens");
    }

    /// serial8250_console_write
    pub(super) fn print(&mut self, text: &[u8]) {
        let ier = self.port_in(IER);
        self.port_out(IER, 0);
        for byte in text {
            self.wait_for_transmitter();
            self.port_out(DATA, *byte);
        }
        self.wait_for_transmitter();
        self.port_out(IER, ier);
    }

    pub(super) fn wait_for_transmitter(&mut self) {
        for tries in 0.. {
            assert!(tries < XMIT_TRIES, "the kernel waits for its console");
            if self.port_in(LSR) & LSR_TRANSMITTER == LSR_TRANSMITTER {
                break;
            }
        }
    }

    /// The kernel has printed this, with the driver's work for it left out.
    pub(super) fn has_printed(&mut self, text: &[u8]) {
        text.iter().for_each(|byte| _ = self.output.put(*byte, self.now));
        self.sent.extend(text);
    }

    pub(super) fn write_flood(&mut self) {
        let room = XMIT - self.xmit.len();
        let rest = self.flood.split_off(self.flood.len().min(room));
        let text = std::mem::replace(&mut self.flood, rest);
        if !text.is_empty() {
            self.write(&text);
        }
    }

    /// A program's write: as far as there is room, then it waits.
    pub(super) fn write(&mut self, text: &[u8]) {
        let mut text = text.iter();
        while !text.as_slice().is_empty() {
            let room = XMIT - self.xmit.len();
            self.xmit.extend(text.by_ref().take(room));
            if self.ier & IER_TRANSMITTER == 0 {
                self.set_ier(self.ier | IER_TRANSMITTER);
            }
            if room == 0 {
                self.go_on(true);
            }
        }
    }

    pub(super) fn guest(&mut self, act: GuestAct) {
        match act {
            GuestAct::Write(text) => self.write(&text),
            GuestAct::Print(text) => self.print(&text),
            GuestAct::Throttle => self.set_mcr(self.mcr & !MCR_RTS),
            GuestAct::Unthrottle => self.set_mcr(self.mcr | MCR_RTS),
            GuestAct::Reopen => {
                self.close();
                self.open();
            }
            GuestAct::Echo(echoes) => self.echoes = echoes,
            GuestAct::Rest(micros) => self.pass_time(Duration::from_micros(micros)),
        }
    }

    /// Whatever happens by itself next. Returns false where nothing does.
    pub(super) fn go_on(&mut self, reads: bool) -> bool {
        if self.interrupt {
            let before = self.received.len();
            self.handle_interrupt();
            // The line discipline has it after the handler (flush_to_ldisc).
            if self.echoes {
                let echo = self.received[before..].to_vec();
                self.write(&echo);
            }
        } else if reads && self.output.counts().waiting > 0 {
            self.host(HostAct::Read(usize::MAX));
        } else if let Some(wake) = self.wake {
            self.pass_time(wake.saturating_duration_since(self.now));
        } else {
            return false;
        }
        true
    }

    /// Until nothing more happens.
    pub(super) fn settle(&mut self, brings: bool) {
        loop {
            let waiting = self.to_bring.len();
            if brings && waiting > 0 {
                self.host(HostAct::Bring(usize::MAX));
            }
            if !self.go_on(true) && self.to_bring.len() == waiting {
                break;
            }
        }
    }

    pub(super) fn assert_whole(&mut self, input: &[u8]) {
        if self.mcr & MCR_RTS == 0 {
            self.set_mcr(self.mcr | MCR_RTS);
        }
        self.settle(true);
        assert_eq!(self.to_bring.len(), 0, "input is stuck on the host");
        assert!(self.received == input, "{} of {} bytes came in", self.received.len(), input.len());
        assert_eq!(self.xmit.len(), 0, "output is stuck in the guest");
        assert!(self.read == self.sent, "{} of {} bytes went out", self.read.len(), self.sent.len());
        assert_eq!(self.output.counts().lost, 0);
    }
}
