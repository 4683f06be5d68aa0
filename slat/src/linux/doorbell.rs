//! A Linux guest with a doorbell: a port, each write to which notes the time and KVM's counters
//! while the guest stands still.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vm_device::MutDevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset, PioRange};
use vm_device::device_manager::PioManager;
use vmm::config::{
    BalloonOptions, Console, Cpus, Device, DeviceConfig, MemoryOptions, SerialOptions, Transport, VmConfig,
};
use vmm::machine::Machine;

use super::GUEST_INIT;
use super::guest::SESSIONS;
use crate::counters::reasons;

/// Where the bell is; no PC has anything there.
pub const PORT: u16 = 0xba11;
/// Rung once, by the guest's first process.
pub const BOOTED: u8 = 0;
/// Hands over all that was noted.
pub const FLUSH: u8 = 255;
/// A guest that rings more than this often between two flushes is not ours.
const MOST_NOTES: usize = 1024;

/// What was noted at a ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The byte that was written.
    pub bell: u8,
    /// Nanoseconds since the VM was started.
    pub nanoseconds: u64,
    /// Exits of all VMs on the host so far, less port I/O and the host's interrupts.
    pub exits: Option<u64>,
    /// The same by reason, while they are traced.
    pub reasons: BTreeMap<String, u64>,
}

struct Doorbell {
    start: Instant,
    counting: bool,
    notes: Vec<Note>,
}

impl Doorbell {
    /// Takes the time before or after the counters, so that reading those is not part of what is measured.
    fn note(&mut self, bell: u8) {
        let begins = bell % 2 == 1;
        let mut nanoseconds = self.start.elapsed();
        let (exits, reasons) =
            if self.counting { (exits(), reasons::read().unwrap_or_default()) } else { Default::default() };
        if begins {
            nanoseconds = self.start.elapsed();
        }
        if self.notes.len() < MOST_NOTES {
            let nanoseconds = nanoseconds.as_nanos() as u64;
            self.notes.push(Note { bell, nanoseconds, exits, reasons });
        }
    }

    fn flush(&mut self) {
        let notes = std::mem::take(&mut self.notes);
        // Whoever reads them may have gone; then nobody misses them.
        if let Ok(line) = serde_json::to_string(&notes) {
            let _ = writeln!(io::stdout().lock(), "{line}");
        }
    }
}

impl MutDevicePio for Doorbell {
    fn pio_read(&mut self, _: PioAddress, _: PioAddressOffset, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&mut self, _: PioAddress, _: PioAddressOffset, data: &[u8]) {
        match data {
            [FLUSH] => self.flush(),
            [bell] => self.note(*bell),
            _ => {}
        }
    }
}

/// KVM's counters of all machines, from debugfs.
fn exits() -> Option<u64> {
    let read = |name: &str| -> Option<u64> {
        fs::read_to_string(Path::new("/sys/kernel/debug/kvm").join(name)).ok()?.trim().parse().ok()
    };
    Some(read("exits")?.saturating_sub(read("io_exits")?).saturating_sub(read("irq_exits")?))
}

/// How a guest is made.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its kernel.
    pub kernel: String,
    /// Its initramfs, with this program as `/ballast`.
    pub initrd: String,
    /// Its memory, such as `192M`.
    pub memory: String,
    /// Words for [`super::guest::guest`].
    pub words: Vec<String>,
    /// Whether the bell reads KVM's counters, or only the clock.
    pub counting: bool,
}

/// The kernel's command line for a guest with these words.
fn cmdline(words: &[String]) -> String {
    // A guest whose tick stops while it thinks takes the locks of its clock as it wakes, before it ends the
    // interrupt: just where QEMU 7.2 may interrupt it again (`vmm::cpuid`). It would wait for itself for ever.
    let tick = if words.iter().any(|word| word == SESSIONS) { "nohz=off " } else { "" };
    format!(
        "console=ttyS0 quiet panic=-1 norandmaps random.trust_cpu=off {tick}rdinit={GUEST_INIT} -- slat guest {} nokaslr",
        words.join(" ")
    )
}

/// Runs a guest to its end. Notes go to standard output, a line of JSON a flush; the guest's console to
/// standard error.
///
/// # Errors
/// Why it could not be started.
pub fn run(guest: &Guest) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let cmdline = cmdline(&guest.words);
    let console = Console::File("/proc/self/fd/2".into());
    let device = |id: &str, device| id.parse().map(|id| DeviceConfig::new(id, device)).map_err(|e| text(&e));
    let config = VmConfig {
        name: format!("slat-{}", std::process::id()).parse().map_err(|e| text(&e))?,
        kernel: Some((&guest.kernel).into()),
        finder: None,
        // As before, so that what was counted can be compared.
        unpacking: None,
        initrd: Some((&guest.initrd).into()),
        cmdline,
        limits: guest.memory.parse().map_err(|e| text(&e))?,
        cpus: Cpus::ONE,
        memory: MemoryOptions::default(),
        // As before, so that what was counted can be compared.
        transport: Transport::Mmio,
        devices: vec![
            device("serial", Device::Serial(SerialOptions { console }))?,
            device("balloon", Device::Balloon(BalloonOptions::default()))?,
            device("rng", Device::Rng)?,
        ],
        socket: None,
        // This process has more to do when the guest has ended.
        sandbox: false,
    };
    let bell = Doorbell { start: Instant::now(), counting: guest.counting, notes: Vec::new() };
    let bell = Arc::new(Mutex::new(bell));
    let machine = Machine::with_ports(config, |buses| {
        let range = PioRange::new(PioAddress(PORT), 1)?;
        Ok(buses.devices.register_pio(range, bell.clone())?)
    });
    let machine = machine.map_err(|e| text(&e))?;
    bell.lock().unwrap_or_else(PoisonError::into_inner).start = Instant::now();
    machine.run().map(drop).map_err(|e| text(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_rings_on_and_on_fills_nothing() {
        let mut bell = Doorbell { start: Instant::now(), counting: false, notes: Vec::new() };
        let port = PioAddress(PORT);
        for _ in 0..MOST_NOTES + 10 {
            bell.pio_write(port, 0, &[7]);
        }
        bell.pio_write(port, 0, &[]);
        bell.pio_write(port, 0, &[1, 2, 3, 4]);
        assert_eq!(bell.notes.len(), MOST_NOTES);
        let mut data = [0; 4];
        bell.pio_read(port, 0, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
