//! Where a vCPU's port and memory accesses end up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::{
    DevicePio,
    bus::{PioAddressOffset, PioRange},
};

use crate::arch::x86_64::{acpi, layout};
use crate::exit::Exit;
use crate::vcpu_set::VcpuSet;

/// What a read returns where nothing answers: no device pulls the lines down.
const NOTHING: u8 = 0xff;

/// The devices by their addresses, and how often vCPUs came out for them.
#[derive(Default)]
pub struct Buses {
    /// The devices.
    pub devices: IoManager,
    exits: Exits,
}

/// How often vCPUs left the guest for a device since the start.
#[derive(Debug, Default)]
struct Exits {
    ports: AtomicU64,
    unclaimed_ports: AtomicU64,
    memory: AtomicU64,
    unclaimed_memory: AtomicU64,
}

/// [`Buses::exits`] at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitCounts {
    /// Port accesses.
    pub ports: u64,
    /// Those of them that no device answered.
    pub unclaimed_ports: u64,
    /// Memory accesses.
    pub memory: u64,
    /// Those of them that no device answered.
    pub unclaimed_memory: u64,
}

impl Buses {
    /// A port is read. All devices here have ports of one byte, so more bytes are
    /// repeated accesses (`rep ins`): one after the other, each at the same port.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        self.exits.ports.fetch_add(1, Ordering::Relaxed);
        if self.devices.pio_device(PioAddress(port)).is_none() {
            data.fill(NOTHING);
            return self.unclaimed_port(port);
        }
        for byte in data.chunks_mut(1) {
            if self.devices.pio_read(PioAddress(port), byte).is_err() {
                byte.fill(NOTHING);
            }
        }
    }

    /// A port is written; more bytes than one as in [`read_port`](Self::read_port).
    pub fn write_port(&self, port: u16, data: &[u8]) {
        self.exits.ports.fetch_add(1, Ordering::Relaxed);
        if self.devices.pio_device(PioAddress(port)).is_none() {
            return self.unclaimed_port(port);
        }
        for byte in data.chunks(1) {
            // A device is there, and one byte fits into any range.
            let _ = self.devices.pio_write(PioAddress(port), byte);
        }
    }

    /// Memory that is no RAM is read.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        self.exits.memory.fetch_add(1, Ordering::Relaxed);
        if self.devices.mmio_read(MmioAddress(address), data).is_err() {
            data.fill(NOTHING);
            self.unclaimed_memory(address);
        }
    }

    /// Memory that is no RAM is written.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        self.exits.memory.fetch_add(1, Ordering::Relaxed);
        if self.devices.mmio_write(MmioAddress(address), data).is_err() {
            self.unclaimed_memory(address);
        }
    }

    /// How often vCPUs have come out so far.
    pub fn exits(&self) -> ExitCounts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ExitCounts {
            ports: read(&self.exits.ports),
            unclaimed_ports: read(&self.exits.unclaimed_ports),
            memory: read(&self.exits.memory),
            unclaimed_memory: read(&self.exits.unclaimed_memory),
        }
    }

    fn unclaimed_port(&self, port: u16) {
        self.exits.unclaimed_ports.fetch_add(1, Ordering::Relaxed);
        tracing::trace!("no device at port {port:#x}");
    }

    fn unclaimed_memory(&self, address: u64) {
        self.exits.unclaimed_memory.fetch_add(1, Ordering::Relaxed);
        tracing::trace!("no device at address {address:#x}");
    }
}

/// The ports through which a guest ends its own life.
pub struct EndPorts {
    vcpu_set: Arc<VcpuSet>,
}

// pvpanic (QEMU docs/specs/pvpanic): reading tells which events are understood.
const PANICKED: u8 = 1 << 0;
// Sleep control register (ACPI 6.5, table 4.19).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
// Keyboard controller: pulse the reset line.
const PULSE_RESET: u8 = 0xfe;

impl EndPorts {
    /// Puts them on the bus.
    ///
    /// # Errors
    /// When something else is at their addresses.
    pub fn register(buses: &mut Buses, vcpu_set: &Arc<VcpuSet>) -> Result<(), vm_device::bus::Error> {
        let ports = Arc::new(Self { vcpu_set: Arc::clone(vcpu_set) });
        for (first, count) in
            [(layout::PVPANIC, 1), (layout::SLEEP_CONTROL, 3), (layout::KEYBOARD_COMMAND, 1)]
        {
            let range = PioRange::new(PioAddress(first), count)?;
            buses.devices.register_pio(range, ports.clone())?;
        }
        Ok(())
    }
}

impl DevicePio for EndPorts {
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(match base.0.wrapping_add(offset) {
            layout::PVPANIC => PANICKED,
            // Asleep, or an input buffer that is full, this machine never is.
            _ => 0,
        });
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match (base.0.wrapping_add(offset), value) {
            (layout::PVPANIC, events) if events & PANICKED != 0 => self.vcpu_set.end(Exit::Panicked),
            (layout::SLEEP_CONTROL, value) if value == SLEEP_ENABLE | acpi::S5 << SLEEP_TYPE_SHIFT => {
                self.vcpu_set.end(Exit::PoweredOff);
            }
            (layout::RESET, layout::RESET_VALUE) | (layout::KEYBOARD_COMMAND, PULSE_RESET) => {
                self.vcpu_set.end(Exit::Reboot);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn buses() -> (Buses, Arc<VcpuSet>) {
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        let mut buses = Buses::default();
        EndPorts::register(&mut buses, &vcpu_set).expect("free addresses");
        (buses, vcpu_set)
    }

    #[test]
    fn each_way_out_ends_the_vm_once() {
        for (port, value, exit) in [
            (0x505, 1, Exit::Panicked),
            (0x600, 0x34, Exit::PoweredOff),
            (0x602, 1, Exit::Reboot),
            (0x64, 0xfe, Exit::Reboot),
        ] {
            let (buses, vcpu_set) = buses();
            buses.write_port(port, &[0]);
            assert!(!vcpu_set.has_ended());
            buses.write_port(port, &[value]);
            assert_eq!(vcpu_set.wait_for_end(), exit);
        }
    }

    proptest! {
        #[test]
        fn no_access_panics_and_nothing_reads_as_ones(
            port: u16, address: u64, mut data in prop::collection::vec(any::<u8>(), 0..64)
        ) {
            let (buses, _crew) = buses();
            buses.write_port(port, &data);
            buses.write_memory(address, &data);
            buses.read_memory(address, &mut data);
            prop_assert!(data.iter().all(|byte| *byte == 0xff));
            buses.read_port(port, &mut data);
        }
    }
}
