//! The port under a model of Linux's 8250 driver (`drivers/tty/serial/8250`, `serial_core.c`, 6.1 and 6.12):
//! nothing is lost, nothing is stuck, and no interrupt handler goes on without end.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::output::FirstReader;
use super::uart::*;
use super::*;

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
const LONGEST_HANDLER: usize = 8 * (super::burst::BURST as usize + TX_LOAD);

/// What happens on the host's side while the guest works.
#[derive(Clone, Debug)]
enum HostAct {
    Nothing,
    /// As much input as there is room for, and at most so much.
    Bring(usize),
    /// As much output as is there, and at most so much.
    Read(usize),
}

/// What the guest does, beside its handler.
#[derive(Clone, Debug)]
enum GuestAct {
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
}

/// Port, driver and host, on a clock of their own.
struct World {
    uart: Uart,
    output: Arc<Output>,
    now: Instant,
    wake: Option<Instant>,
    interrupt: bool,
    /// What happens during the next accesses, and how long each takes in microseconds.
    script: VecDeque<(HostAct, u64)>,
    /// Input that has not been taken yet.
    to_bring: VecDeque<u8>,
    read: Vec<u8>,
    accesses: usize,
    /// What programs on other processors write, as fast as there is room for it.
    flood: Vec<u8>,
    // The driver.
    is_open: bool,
    ier: u8,
    mcr: u8,
    xmit: VecDeque<u8>,
    received: Vec<u8>,
    /// Output in the order in which it went to the port.
    sent: Vec<u8>,
}

impl World {
    fn new(input: &[u8], script: Vec<(HostAct, u64)>) -> Self {
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
            is_open: false,
            ier: 0,
            mcr: 0,
            xmit: VecDeque::new(),
            received: Vec::new(),
            sent: Vec::new(),
        }
    }

    fn follow(&mut self, effects: Effects) {
        self.interrupt |= effects.edge;
        if effects.wake.is_some() {
            self.wake = effects.wake;
        }
    }

    fn pass_time(&mut self, time: Duration) {
        self.now += time;
        if self.wake.is_some_and(|wake| wake <= self.now) {
            self.wake = None;
            let effects = self.uart.wake(self.now);
            self.follow(effects);
        }
    }

    fn host(&mut self, act: HostAct) {
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

    fn access(&mut self) {
        self.accesses += 1;
        let (act, micros) = self.script.pop_front().unwrap_or((HostAct::Nothing, 4));
        self.host(act);
        self.pass_time(Duration::from_micros(micros));
    }

    fn port_in(&mut self, register: u8) -> u8 {
        self.access();
        let (value, effects) = self.uart.read(register, self.now);
        self.follow(effects);
        value
    }

    fn port_out(&mut self, register: u8, value: u8) {
        self.access();
        if register == DATA {
            self.sent.push(value);
        }
        let effects = self.uart.write(register, value, self.now);
        self.follow(effects);
    }

    fn set_ier(&mut self, ier: u8) {
        self.ier = ier;
        self.port_out(IER, ier);
    }

    fn set_mcr(&mut self, mcr: u8) {
        self.mcr = mcr;
        self.port_out(MCR, mcr);
    }

    /// serial8250_interrupt: passes until the port has no reason.
    fn handle_interrupt(&mut self) {
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
    fn handle_pass(&mut self) {
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
    fn transmit(&mut self) {
        for _ in 0..TX_LOAD {
            let Some(byte) = self.xmit.pop_front() else { break };
            self.port_out(DATA, byte);
        }
        if self.xmit.is_empty() {
            self.set_ier(self.ier & !IER_TRANSMITTER);
        }
    }

    /// serial8250_do_startup, then what `uart_port_startup` adds.
    fn open(&mut self) {
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
    fn clear_reasons(&mut self) {
        self.port_in(LSR);
        let lost = self.port_in(DATA);
        assert_eq!(lost, 0, "the driver throws away what comes before it listens");
        self.port_in(IIR);
        self.port_in(MSR);
    }

    /// uart_shutdown and serial8250_do_shutdown, after the last output has gone.
    fn close(&mut self) {
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
    fn print(&mut self, text: &[u8]) {
        let ier = self.port_in(IER);
        self.port_out(IER, 0);
        for byte in text {
            self.wait_for_transmitter();
            self.port_out(DATA, *byte);
        }
        self.wait_for_transmitter();
        self.port_out(IER, ier);
    }

    fn wait_for_transmitter(&mut self) {
        for tries in 0.. {
            assert!(tries < XMIT_TRIES, "the kernel waits for its console");
            if self.port_in(LSR) & LSR_TRANSMITTER == LSR_TRANSMITTER {
                break;
            }
        }
    }

    /// The kernel has printed this, with the driver's work for it left out.
    fn has_printed(&mut self, text: &[u8]) {
        text.iter().for_each(|byte| self.output.put(*byte, self.now));
        self.sent.extend(text);
    }

    fn write_flood(&mut self) {
        let room = XMIT - self.xmit.len();
        let rest = self.flood.split_off(self.flood.len().min(room));
        let text = std::mem::replace(&mut self.flood, rest);
        if !text.is_empty() {
            self.write(&text);
        }
    }

    /// A program's write: as far as there is room, then it waits.
    fn write(&mut self, text: &[u8]) {
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

    fn guest(&mut self, act: GuestAct) {
        match act {
            GuestAct::Write(text) => self.write(&text),
            GuestAct::Print(text) => self.print(&text),
            GuestAct::Throttle => self.set_mcr(self.mcr & !MCR_RTS),
            GuestAct::Unthrottle => self.set_mcr(self.mcr | MCR_RTS),
            GuestAct::Reopen => {
                self.close();
                self.open();
            }
            GuestAct::Rest(micros) => self.pass_time(Duration::from_micros(micros)),
        }
    }

    /// Whatever happens by itself next. Returns false where nothing does.
    fn go_on(&mut self, reads: bool) -> bool {
        if self.interrupt {
            self.handle_interrupt();
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
    fn settle(&mut self, brings: bool) {
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

    fn assert_whole(&mut self, input: &[u8]) {
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

fn bytes(count: usize) -> Vec<u8> {
    // Never 0, which is what an empty port reads as.
    (1..=251).cycle().take(count).collect()
}

#[test]
fn input_of_every_size_comes_in_whole() {
    for size in 1..=BACKLOG {
        let input = bytes(size);
        let mut world = World::new(&input, Vec::new());
        world.open();
        world.host(HostAct::Bring(usize::MAX));
        world.assert_whole(&input);
    }
}

#[test]
fn output_of_every_size_goes_out_whole() {
    for size in 1..=BACKLOG {
        let mut world = World::new(&[], Vec::new());
        world.open();
        world.write(&bytes(size));
        world.assert_whole(&[]);
        assert_eq!(world.read, bytes(size));
    }
}

#[test]
fn input_that_comes_before_anybody_listens_is_there_when_somebody_does() {
    let input = bytes(2 * BACKLOG);
    let mut world = World::new(&input, Vec::new());
    world.host(HostAct::Bring(usize::MAX));
    world.open();
    world.close();
    world.host(HostAct::Bring(usize::MAX));
    world.open();
    world.assert_whole(&input);
}

/// Input that is always there keeps no handler, and leaves time for the rest of the guest.
#[test]
fn a_flood_of_input_leaves_a_third_of_the_time() {
    let input = bytes(50_000);
    let script = vec![(HostAct::Bring(16), 4); 400_000];
    let mut world = World::new(&input, script);
    world.open();
    let (begin, before) = (world.now, world.accesses);
    world.assert_whole(&input);
    let busy = Duration::from_micros(4 * (world.accesses - before) as u64);
    let whole = world.now - begin;
    assert!(busy * 10 <= whole * 7, "busy for {busy:?} of {whole:?}");
    assert!(whole < busy * 2, "idle for most of {whole:?}");
}

/// Other processors fill the driver's buffer as fast as it is emptied.
#[test]
fn a_flood_of_output_leaves_a_third_of_the_time() {
    let mut world = World::new(&[], Vec::new());
    world.open();
    world.flood = bytes(50_000);
    world.write_flood();
    let (begin, before) = (world.now, world.accesses);
    world.assert_whole(&[]);
    assert_eq!(world.read, bytes(50_000));
    let busy = Duration::from_micros(4 * (world.accesses - before) as u64);
    let whole = world.now - begin;
    assert!(busy * 10 <= whole * 7, "busy for {busy:?} of {whole:?}");
    assert!(whole < busy * 2, "idle for most of {whole:?}");
}

/// A reader who is slow gets everything, and the kernel never waits for him.
#[test]
fn a_slow_reader_loses_nothing() {
    let mut world = World::new(&[], Vec::new());
    world.open();
    world.has_printed(&bytes(900 << 10));
    world.flood = bytes(400 << 10);
    world.write_flood();
    let mut held = 0;
    while !world.flood.is_empty() {
        // Without a reader, until the guest is held back.
        while world.interrupt || world.wake.is_some_and(|wake| wake < world.now + PATIENCE / 2) {
            world.go_on(false);
        }
        let waiting = world.output.counts().waiting;
        assert!(waiting > MOST_WAITING as u64 / 2, "held back with only {waiting} bytes waiting");
        world.print(b"[1.000000] a line of the kernel\r\n");
        held += 1;
        for _ in 0..16 {
            world.host(HostAct::Read(usize::MAX));
        }
    }
    assert!(held > 4, "the reader was not slow");
    world.assert_whole(&[]);
}

/// The handler has found its reason, and then the buffer is full: another processor was faster.
#[test]
fn a_driver_that_finds_no_room_after_all_is_called_again() {
    let mut world = World::new(&[], Vec::new());
    world.open();
    world.xmit.extend(b"waits");
    world.set_ier(world.ier | IER_TRANSMITTER);
    assert_eq!(world.port_in(IIR) & 0x0f, IIR_TRANSMITTER);
    world.has_printed(&bytes(1000 << 10));
    world.handle_pass();
    assert_eq!(world.xmit.len(), 5, "there is room");
    world.interrupt = false;
    world.assert_whole(&[]);
}

/// A reader who never reads stops a program for [`PATIENCE`], and no more.
#[test]
fn a_reader_who_is_gone_in_all_but_name_holds_nobody_for_ever() {
    let mut world = World::new(&[], Vec::new());
    world.open();
    let begin = world.now;
    world.has_printed(&bytes(900 << 10));
    world.flood = bytes(300 << 10);
    world.write_flood();
    while world.go_on(false) {}
    assert!(world.flood.is_empty() && world.xmit.is_empty(), "output is stuck");
    let whole = world.now - begin;
    assert!(whole > PATIENCE && whole < PATIENCE * 6, "{whole:?}");
    let counts = world.output.counts();
    assert!(counts.waiting <= MOST_WAITING as u64);
    assert_eq!(counts.lost + counts.waiting, world.sent.len() as u64);
}

fn host_act() -> impl Strategy<Value = (HostAct, u64)> {
    let act = prop_oneof![
        6 => Just(HostAct::Nothing),
        2 => (1_usize..600).prop_map(HostAct::Bring),
        1 => (1_usize..600).prop_map(HostAct::Read),
    ];
    (act, 1_u64..40)
}

fn guest_act() -> impl Strategy<Value = GuestAct> {
    prop_oneof![
        3 => vec(1_u8..=255, 1..600).prop_map(GuestAct::Write),
        1 => vec(1_u8..=255, 1..80).prop_map(GuestAct::Print),
        1 => Just(GuestAct::Throttle),
        2 => Just(GuestAct::Unthrottle),
        1 => Just(GuestAct::Reopen),
        2 => (1_u64..3000).prop_map(GuestAct::Rest),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn nothing_is_lost_stuck_or_without_end(
        size in 0..=BACKLOG,
        before in 0_usize..300,
        acts in vec((guest_act(), 0_usize..4), 0..20),
        script in vec(host_act(), 0..4000),
    ) {
        let input = bytes(size);
        let mut world = World::new(&input, script);
        world.host(HostAct::Bring(before));
        world.open();
        for (act, steps) in acts {
            world.guest(act);
            for _ in 0..steps {
                world.go_on(true);
            }
        }
        world.assert_whole(&input);
    }
}
