//! The serial port as a guest's 8250 driver and the host's terminal use it.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use devices::platform::serial::{BACKLOG, Port, Serial};
use proptest::collection::vec;
use proptest::prelude::*;
use vm_device::bus::PioAddress;
use vm_device::{DevicePio, MutDevicePio};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BASE: PioAddress = PioAddress(0x3f8);
const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const DATA_READY: u8 = 1;
const LOOPBACK: u8 = 0x10;

#[derive(Clone, Default)]
struct Terminal(Arc<Mutex<Vec<u8>>>);

impl Write for Terminal {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serial(output: impl Write + Send + 'static) -> (Serial, EventFd) {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    (Serial::new(irq.try_clone().unwrap(), Box::new(output)).unwrap(), irq)
}

fn read(serial: &mut Serial, register: u16) -> u8 {
    let mut data = [0];
    serial.pio_read(BASE, register, &mut data);
    data[0]
}

fn read_all(serial: &mut Serial) -> Vec<u8> {
    let mut input = Vec::new();
    while read(serial, LINE_STATUS) & DATA_READY != 0 {
        input.push(read(serial, DATA));
        assert!(input.len() <= 2 * BACKLOG, "input has no end");
    }
    input
}

#[test]
fn what_the_guest_writes_comes_out() {
    let terminal = Terminal::default();
    let (mut serial, _) = serial(terminal.clone());
    for byte in b"hello\n" {
        serial.pio_write(BASE, DATA, &[*byte]);
    }
    assert_eq!(*terminal.0.lock().unwrap(), b"hello\n");
    assert_eq!(serial.lost_output(), 0);
}

#[test]
fn a_closed_terminal_loses_output_and_nothing_else() {
    let (mut serial, irq) = serial(Closed);
    serial.pio_write(BASE, INTERRUPT_ENABLE, &[2]);
    let _ = irq.read();
    read(&mut serial, 2);
    serial.pio_write(BASE, DATA, b"x");
    assert_eq!(serial.lost_output(), 1);
    assert_eq!(irq.read().unwrap(), 1, "the guest waits for its transmitter for ever");
}

#[test]
fn input_reaches_the_guest_in_order_and_nobody_keeps_more_than_the_backlog() {
    let (mut serial, irq) = serial(io::sink());
    serial.pio_write(BASE, INTERRUPT_ENABLE, &[1]);
    let input: Vec<u8> = (0..=255).cycle().take(3 * BACKLOG).collect();
    let taken = serial.enqueue(&input);
    assert_eq!(taken, BACKLOG);
    assert_eq!(irq.read().unwrap(), 1);
    // The port's own queue has drained 64, and no more than that is taken.
    assert_eq!(serial.enqueue(&input[taken..]), 64);
    assert!(serial.room_event().read().is_err());
    let taken = taken + 64;
    assert_eq!(read_all(&mut serial), input[..taken]);
    assert_eq!(serial.room_event().read().unwrap(), 1);
    assert_eq!(serial.enqueue(&input[taken..]), BACKLOG);
    assert_eq!(read_all(&mut serial), input[taken..taken + BACKLOG]);
    assert_eq!(serial.room_event().read().unwrap(), 1);
    assert_eq!(serial.enqueue(b"x"), 1);
    read_all(&mut serial);
    assert!(serial.room_event().read().is_err(), "nobody was refused");
}

#[test]
fn input_waits_while_the_line_is_looped_back() {
    let (mut serial, _) = serial(io::sink());
    serial.pio_write(BASE, MODEM_CONTROL, &[LOOPBACK]);
    assert_eq!(serial.enqueue(b"abc"), 3);
    assert_eq!(read_all(&mut serial), b"");
    serial.pio_write(BASE, MODEM_CONTROL, &[0]);
    assert_eq!(read_all(&mut serial), b"abc");
}

proptest! {
    #[test]
    fn any_access_of_any_width_is_harmless(
        accesses in vec((any::<bool>(), prop_oneof![4 => 0u16..8, 1 => any::<u16>()], vec(any::<u8>(), 0..9)), 0..200),
    ) {
        let (mut serial, _) = serial(io::sink());
        for (is_write, register, mut data) in accesses {
            if is_write {
                serial.pio_write(BASE, register, &data);
            } else {
                serial.pio_read(BASE, register, &mut data);
            }
            let _ = serial.enqueue(&data);
        }
        // The divisor's latch aside, an honest driver still gets through.
        serial.pio_write(BASE, 3, &[3]);
        serial.pio_write(BASE, MODEM_CONTROL, &[0]);
        read_all(&mut serial);
        prop_assert_eq!(serial.enqueue(b"x"), 1);
        prop_assert_eq!(read_all(&mut serial), b"x");
    }
}

/// A pipe into which nothing more goes, and where to read it.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    let wait = |wait: bool| {
        let flags = if wait { 0 } else { libc::O_NONBLOCK };
        // SAFETY: sets flags of a descriptor that this test owns.
        assert_eq!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, flags) }, 0);
    };
    wait(false);
    while (&writer).write_all(&[0; 512]).is_ok() {}
    wait(true);
    (reader, writer)
}

/// Tells when output begins.
struct Telling(PipeWriter, mpsc::Sender<()>);

impl Write for Telling {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.1.send(()).unwrap();
        self.0.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn input_does_not_wait_for_output_that_nobody_reads_and_arrives_after_it() {
    let (mut reader, writer) = full_pipe();
    let (writes, writing) = mpsc::channel();
    let (serial, irq) = serial(Telling(writer, writes));
    let port = Arc::new(Port::new(serial));
    port.pio_write(BASE, INTERRUPT_ENABLE, &[1]);
    let vcpu = {
        let port = port.clone();
        thread::spawn(move || port.pio_write(BASE, DATA, b"x"))
    };
    writing.recv_timeout(LONG).unwrap();

    let input: Vec<u8> = (0..=255).cycle().take(BACKLOG + 1).collect();
    let (puts, put) = mpsc::channel();
    thread::spawn({
        let (port, input) = (port.clone(), input.clone());
        move || puts.send(port.enqueue(&input)).unwrap()
    });
    assert_eq!(put.recv_timeout(LONG), Ok(BACKLOG), "it waits for no reader");
    assert!(!vcpu.is_finished(), "the pipe is full");
    assert!(irq.read().is_err(), "the guest learns of it when its output has gone out");

    let mut output = vec![0; 1 << 20];
    while !vcpu.is_finished() {
        let count = reader.read(&mut output).unwrap();
        if output[..count].ends_with(b"x") {
            break;
        }
    }
    vcpu.join().unwrap();
    assert_eq!(irq.read().unwrap(), 1, "nobody but the vCPU could tell the guest of its input");
    let mut arrived = Vec::new();
    loop {
        let mut data = [0];
        port.pio_read(BASE, LINE_STATUS, &mut data);
        if data[0] & DATA_READY == 0 {
            break;
        }
        port.pio_read(BASE, DATA, &mut data);
        arrived.push(data[0]);
    }
    assert_eq!(arrived, input[..BACKLOG]);
    assert_eq!(port.room_event().read().unwrap(), 1, "there is room for the rest");
}

#[test]
fn no_input_is_left_behind_where_a_vcpu_and_input_meet() {
    const ROUNDS: usize = 100;
    let (serial, irq) = serial(io::sink());
    let port = Arc::new(Port::new(serial));
    port.pio_write(BASE, INTERRUPT_ENABLE, &[1]);
    let meet = Arc::new(Barrier::new(2));
    let vcpu = {
        let (port, meet) = (port.clone(), meet.clone());
        thread::spawn(move || {
            // No access to a 16550, so that it moves no input by itself; and one that takes its time.
            let mut data = vec![0; 16 << 20];
            for _ in 0..ROUNDS {
                meet.wait();
                port.pio_read(BASE, DATA, &mut data);
                meet.wait();
            }
        })
    };
    for round in 0..ROUNDS {
        meet.wait();
        let taken = port.enqueue(b"i");
        meet.wait();
        assert_eq!(taken, 1);
        // Whichever came second has taken it in: nothing else will touch the port.
        assert_eq!(irq.read().ok(), Some(1), "round {round}");
        let mut data = [0];
        port.pio_read(BASE, DATA, &mut data);
        assert_eq!(&data, b"i");
    }
    vcpu.join().unwrap();
}
