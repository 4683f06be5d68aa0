//! The serial port as a guest's 8250 driver and the host's terminal use it.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use devices::serial::{BACKLOG, Serial};
use proptest::collection::vec;
use proptest::prelude::*;
use vm_device::MutDevicePio;
use vm_device::bus::PioAddress;
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
