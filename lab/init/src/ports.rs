//! Port accesses that no driver would make, at the ports that a guest has.

use std::arch::asm;
use std::io;

use crate::random::Random;

const COM1: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = COM1 + 1;
/// Bit of [`INTERRUPT_ENABLE`].
const TRANSMITTER_EMPTY: u8 = 2;
const FIFO_CONTROL: u16 = COM1 + 2;
const LINE_CONTROL: u16 = COM1 + 3;
const MODEM_CONTROL: u16 = COM1 + 4;
const PVPANIC: u16 = 0x505;
const SLEEP_CONTROL: u16 = 0x600;
const SLEEP_STATUS: u16 = 0x601;
const RESET: u16 = 0x602;
const KEYBOARD: u16 = 0x64;

/// Accesses in one attack.
const ACCESSES: usize = 200;
/// The longest string of one instruction: a page of bytes, more than KVM hands over at a time.
const LONGEST: usize = 4096;

/// Goes at them, and leaves the console as it was. The caller's thread may use ports from then on.
///
/// # Errors
/// The kernel refuses ports.
pub fn attack(random: &mut Random) -> io::Result<()> {
    // Whatever the kernel still sends goes out first: its driver is not told of what follows.
    let _ = rustix::termios::tcdrain(rustix::stdio::stdout());
    // SAFETY: gives this thread the right to use ports and changes nothing else.
    if unsafe { libc::iopl(3) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let saved = [INTERRUPT_ENABLE, LINE_CONTROL, MODEM_CONTROL].map(|port| (port, read(port)));
    for _ in 0..ACCESSES {
        access(random);
    }
    write(LINE_CONTROL, 0);
    write(FIFO_CONTROL, 7);
    for (port, value) in saved {
        write(port, value);
    }
    // The kernel may have started to send (an echo of what came back in loopback mode) and waits
    // for this interrupt; where it does not, it switches it off again.
    write(INTERRUPT_ENABLE, saved[0].1 | TRANSMITTER_EMPTY);
    // In loopback mode output came back as input.
    let _ = rustix::termios::tcflush(rustix::stdio::stdin(), rustix::termios::QueueSelector::IFlush);
    Ok(())
}

fn access(random: &mut Random) {
    let port = port(random);
    match random.below(6) {
        0 => drop(read(port)),
        1 => drop(read_wide(port)),
        2 => read_string(port, random.below(LONGEST as u64) as usize),
        3 => {
            // Each byte of a console is written to the host by itself.
            let longest = if port == COM1 { 100 } else { LONGEST };
            write_string(port, &vec![harmless(port, random); random.below(longest as u64) as usize]);
        }
        4 => write_wide(port, u32::from_ne_bytes([0; 4].map(|_: u8| harmless(port, random)))),
        _ => write(port, harmless(port, random)),
    }
}

fn port(random: &mut Random) -> u16 {
    match random.below(8) {
        0..4 => COM1 + random.below(8) as u16,
        4 => [PVPANIC, SLEEP_CONTROL, SLEEP_STATUS, RESET, KEYBOARD][random.below(5) as usize],
        // Around them, so that wide accesses run into them and out of them.
        5 => PVPANIC - 3 + random.below(8) as u16,
        6 => SLEEP_CONTROL - 3 + random.below(9) as u16,
        // Nothing is there. Below are KVM's own timer and interrupt controllers.
        _ => 0x700 + random.below(0xf000) as u16,
    }
}

/// A byte that does not end the VM, at whichever of the ports near `port` it arrives.
fn harmless(port: u16, random: &mut Random) -> u8 {
    let byte = random.next() as u8;
    match port {
        // No event, no sleep, no reset: such bytes do nothing wherever they land.
        KEYBOARD | 0x4f0..0x620 => byte & 0b1101_1000,
        // Not too much noise on the console.
        COM1 => b'~',
        _ => byte,
    }
}

fn read(port: u16) -> u8 {
    let value;
    // SAFETY: this thread may use ports; reading one touches no memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

fn write(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

fn read_wide(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

fn write_wide(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

fn read_string(port: u16, length: usize) {
    let mut bytes = vec![0u8; length];
    // SAFETY: writes `length` bytes to a buffer of that size.
    unsafe {
        asm!("rep insb", in("dx") port, inout("rdi") bytes.as_mut_ptr() => _, inout("rcx") length => _, options(nostack))
    };
}

fn write_string(port: u16, bytes: &[u8]) {
    // SAFETY: reads the bytes of the slice.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _, options(nostack))
    };
}
