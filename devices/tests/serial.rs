//! The serial port as vCPUs, the host's event loop and the reader of its output share it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use devices::platform::serial::{
    BACKLOG, CHUNK, FLUSH_AFTER, FirstReader, InputFlow, MOST_WAITING, Port, PortState,
};
use devices::state::Version;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;
use vm_device::DevicePio;
use vm_device::bus::PioAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BASE: PioAddress = PioAddress(0x3f8);
const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const RECEIVED: u8 = 1;
const TRANSMITTER: u8 = 2;
const INTERRUPT_IDENTIFICATION: u16 = 2;
const TRANSMITTER_EMPTY: u8 = 2;
const DATA_READY: u8 = 1;
const RTS: u8 = 2;
const LOOPBACK: u8 = 0x10;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

fn port(reader: FirstReader) -> (Arc<Port>, EventFd) {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    (Arc::new(Port::new(irq.try_clone().unwrap(), reader).unwrap()), irq)
}

fn read(port: &Port, register: u16) -> u8 {
    let mut data = [0];
    port.pio_read(BASE, register, &mut data);
    data[0]
}

fn write(port: &Port, register: u16, value: u8) {
    port.pio_write(BASE, register, &[value]);
}

/// What a guest reads that polls.
fn read_all(port: &Port) -> Vec<u8> {
    let mut input = Vec::new();
    while read(port, LINE_STATUS) & DATA_READY != 0 {
        input.push(read(port, DATA));
        assert!(input.len() <= 2 * BACKLOG, "input has no end");
    }
    input
}

#[test]
fn a_line_goes_out_together_and_a_prompt_soon() {
    let (port, _) = port(FirstReader::Present);
    let reader = thread::spawn({
        let port = port.clone();
        move || {
            let (mut chunk, mut chunks) = (Vec::new(), Vec::new());
            while port.next_output(&mut chunk) {
                chunks.push(chunk.clone());
                port.written(chunk.len());
            }
            chunks
        }
    });
    let texts = ["a whole line\n", "login: ", "x"];
    for text in texts {
        text.bytes().for_each(|byte| write(&port, DATA, byte));
        let said = Instant::now();
        while port.output_counts().waiting > 0 {
            assert!(said.elapsed() < LONG, "`{text}` stays where it is");
            thread::yield_now();
        }
        // So that the reader has gone to sleep.
        thread::sleep(FLUSH_AFTER * 3);
    }
    port.finish(LONG);
    let chunks = reader.join().unwrap();
    assert_eq!(chunks.concat(), texts.concat().as_bytes());
    // Three, unless the host is busy.
    assert!(chunks.len() < 10, "{chunks:?}");
}

/// As where another program has written the registers behind the driver's back.
#[test]
fn a_driver_that_enables_the_transmitters_interrupt_anew_is_interrupted_anew() {
    let (port, irq) = port(FirstReader::Present);
    for round in 0..3 {
        write(&port, INTERRUPT_ENABLE, TRANSMITTER);
        assert!(irq.read().is_ok(), "in round {round}");
        assert_eq!(read(&port, INTERRUPT_IDENTIFICATION), TRANSMITTER_EMPTY);
    }
}

#[test]
fn the_end_waits_for_a_reader_who_reads_and_for_no_other() {
    let (port, _) = port(FirstReader::Present);
    (0..10 * CHUNK).for_each(|_| write(&port, DATA, b'x'));
    let reader = thread::spawn({
        let port = port.clone();
        move || {
            let mut chunk = Vec::new();
            for _ in 0..10 {
                assert!(port.next_output(&mut chunk));
                thread::sleep(Duration::from_millis(20));
                port.written(chunk.len());
            }
            assert!(!port.next_output(&mut chunk), "nothing more comes");
        }
    });
    port.finish(LONG);
    assert_eq!(port.output_counts().waiting, 0);
    reader.join().unwrap();

    let (port, _) = self::port(FirstReader::Present);
    write(&port, DATA, b'x');
    port.finish(Duration::from_millis(20));
    assert_eq!(port.output_counts().waiting, 1);
}

#[test]
fn no_vcpu_waits_for_a_reader() {
    let (port, _) = port(FirstReader::Present);
    // One that has begun to read, and hangs.
    write(&port, DATA, b'\n');
    assert!(port.next_output(&mut Vec::new()));
    let begin = Instant::now();
    for _ in 0..2 * MOST_WAITING {
        assert_eq!(read(&port, LINE_STATUS) & 0x60, 0x60, "the kernel waits for its transmitter");
        write(&port, DATA, b'x');
    }
    assert!(begin.elapsed() < LONG);
    let counts = port.output_counts();
    assert!(counts.waiting <= MOST_WAITING as u64);
    assert_eq!(counts.waiting + counts.lost, 2 * MOST_WAITING as u64 + 1);
}

/// The same without a guest's processor that polls: the driver's interrupt comes when the reader goes on.
#[test]
fn a_driver_that_was_held_back_is_told_when_the_reader_goes_on() {
    let (port, irq) = port(FirstReader::Present);
    (0..MOST_WAITING).for_each(|_| write(&port, DATA, b'x'));
    write(&port, INTERRUPT_ENABLE, 2);
    assert!(irq.read().is_err(), "there is no room");
    assert_eq!(read(&port, LINE_STATUS) & 0x60, 0);
    let mut chunk = Vec::new();
    while read(&port, LINE_STATUS) & 0x60 == 0 {
        assert!(port.next_output(&mut chunk));
        port.written(chunk.len());
    }
    assert_eq!(irq.read().unwrap(), 1);
    assert_eq!(port.output_counts().lost, 0);
}

#[test]
fn input_reaches_the_guest_in_order_and_nobody_keeps_more_than_the_backlog() {
    let (port, irq) = port(FirstReader::Nobody);
    write(&port, MODEM_CONTROL, RTS);
    let input: Vec<u8> = (0..=255).cycle().take(3 * BACKLOG).collect();
    assert_eq!(port.enqueue(&input), BACKLOG);
    assert!(irq.read().is_err(), "nobody has asked for it");
    write(&port, INTERRUPT_ENABLE, RECEIVED);
    assert_eq!(irq.read().unwrap(), 1);
    write(&port, INTERRUPT_ENABLE, 0);
    assert_eq!(port.enqueue(&input[BACKLOG..]), 0);
    assert!(port.room_event().read().is_err());
    assert_eq!(read_all(&port), input[..BACKLOG]);
    assert_eq!(port.room_event().read().unwrap(), 1);
    assert_eq!(port.enqueue(&input[BACKLOG..]), BACKLOG);
    assert_eq!(read_all(&port), input[BACKLOG..2 * BACKLOG]);
    assert_eq!(port.room_event().read().unwrap(), 1);
    assert_eq!(port.enqueue(b"x"), 1);
    read_all(&port);
    assert!(port.room_event().read().is_err(), "nobody was refused");
}

#[test]
fn input_waits_until_the_guest_asks() {
    let (port, _) = port(FirstReader::Nobody);
    assert_eq!(port.enqueue(b"abc"), 3);
    // As a driver that looks for its device.
    assert_eq!((read(&port, LINE_STATUS) & DATA_READY, read(&port, DATA)), (0, 0));
    write(&port, MODEM_CONTROL, RTS | LOOPBACK);
    assert_eq!(read_all(&port), b"");
    write(&port, DATA, b'l');
    assert_eq!(read_all(&port), b"l");
    write(&port, MODEM_CONTROL, RTS);
    assert_eq!((read(&port, LINE_STATUS) & DATA_READY, read(&port, DATA)), (1, b'a'));
    // It does not keep up.
    write(&port, MODEM_CONTROL, 0);
    assert_eq!(read_all(&port), b"");
    write(&port, MODEM_CONTROL, RTS);
    assert_eq!(read_all(&port), b"bc");
}

#[test]
fn a_guest_that_only_polls_gets_its_input() {
    let (port, _) = port(FirstReader::Nobody);
    assert_eq!(port.enqueue(b"abc"), 3);
    let input = (0..1000).find_map(|_| (read(&port, LINE_STATUS) & DATA_READY != 0).then(|| read_all(&port)));
    assert_eq!(input.as_deref(), Some(b"abc".as_slice()));
}

#[test]
fn a_rest_ends_by_the_timer() {
    let (port, irq) = port(FirstReader::Nobody);
    write(&port, MODEM_CONTROL, RTS);
    write(&port, INTERRUPT_ENABLE, RECEIVED);
    let input: Vec<u8> = (0..=255).cycle().take(BACKLOG).collect();
    assert_eq!(port.enqueue(&input), BACKLOG);
    let (mut received, mut edges, begin) = (Vec::new(), 0, Instant::now());
    while received.len() < BACKLOG {
        assert!(begin.elapsed() < LONG, "the rest is stuck");
        if irq.read().is_ok() {
            edges += 1;
            received.extend(read_all(&port));
        } else {
            let mut timer = libc::pollfd { fd: port.timer(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one whole `pollfd`, as the call is told.
            let ready = unsafe { libc::poll(&mut timer, 1, 1000) };
            assert_eq!(ready, 1, "nothing wakes the port");
            port.wake();
        }
    }
    assert_eq!(received, input);
    assert!(edges > 4, "all came at once");
}

proptest! {
    #[test]
    fn any_access_of_any_width_is_harmless(
        accesses in vec((any::<bool>(), prop_oneof![4 => 0u16..8, 1 => any::<u16>()], vec(any::<u8>(), 0..9)), 0..200),
    ) {
        let (port, _) = port(FirstReader::Awaited);
        for (is_write, register, mut data) in accesses {
            if is_write {
                port.pio_write(BASE, register, &data);
            } else {
                port.pio_read(BASE, register, &mut data);
            }
            let _ = port.enqueue(&data);
            port.wake();
        }
        // The divisor's latch aside, an honest driver still gets through.
        write(&port, 3, 3);
        write(&port, INTERRUPT_ENABLE, 0);
        write(&port, MODEM_CONTROL, RTS);
        read_all(&port);
        prop_assert_eq!(port.enqueue(b"x"), 1);
        prop_assert_eq!(read_all(&port), b"x");
    }

    #[test]
    fn no_state_breaks_a_port(
        registers: [u8; 6],
        flags: [bool; 2],
        flow in prop_oneof![Just(InputFlow::Unasked), Just(InputFlow::Polled), Just(InputFlow::ByRts)],
        input in vec(any::<u8>(), 0..300),
        looped in vec(any::<u8>(), 0..20),
        accesses in vec((0_u16..8, any::<Option<u8>>()), 0..50),
    ) {
        let state = PortState {
            version: Version,
            divisor_low: registers[0],
            divisor_high: registers[1],
            interrupt_enable: registers[2],
            fifos_enabled: flags[0],
            line_control: registers[3],
            modem_control: registers[4],
            scratch: registers[5],
            transmitter_interrupt: flags[1],
            flow,
            input,
            looped,
        };
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        match Port::restore(irq, FirstReader::Nobody, &state) {
            Err(_) => prop_assert!(state.looped.len() > 16),
            Ok(port) => {
                for (register, value) in accesses {
                    match value {
                        Some(value) => write(&port, register, value),
                        None => drop(read(&port, register)),
                    }
                }
                port.enqueue(b"input");
                let saved = port.save();
                prop_assert!(saved.looped.len() <= 16 && saved.input.len() <= BACKLOG);
            }
        }
    }
}

#[test]
fn input_that_waits_moves_with_the_port() {
    let (here, _) = port(FirstReader::Nobody);
    write(&here, MODEM_CONTROL, RTS);
    write(&here, INTERRUPT_ENABLE, RECEIVED);
    let input: Vec<u8> = (0..200).collect();
    assert_eq!(here.enqueue(&input), 200);
    let text = serde_json::to_string(&here.save()).unwrap();
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let state: PortState = serde_json::from_str(&text).unwrap();
    let there = Port::restore(irq.try_clone().unwrap(), FirstReader::Nobody, &state).unwrap();
    assert_eq!(there.save(), state);
    assert!(irq.read().unwrap() > 0, "the guest is told that input waits");
    assert_eq!(read_all(&there), input);
}

#[test]
fn a_port_has_room_for_so_much_input_only() {
    let (port, _) = port(FirstReader::Nobody);
    for (input, looped, fits) in [(BACKLOG, 16, true), (BACKLOG + 1, 0, false), (0, 17, false)] {
        let state = PortState { input: vec![7; input], looped: vec![7; looped], ..port.save() };
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let restored = Port::restore(irq, FirstReader::Nobody, &state);
        assert_eq!(restored.is_ok(), fits, "{input} and {looped} bytes");
    }
    let whole = serde_json::to_value(port.save()).unwrap();
    let mut older = whole.clone();
    older["version"] = json!(1);
    let error = serde_json::from_value::<PortState>(older).unwrap_err().to_string();
    assert!(error.contains("version 1"), "{error}");
    let mut more = whole;
    more["more"] = json!(1);
    assert!(serde_json::from_value::<PortState>(more).is_err());
}
