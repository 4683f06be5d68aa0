//! Where a vCPU's port and memory accesses end up.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};

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
    /// A port is read, `width` bytes at a time: more than one access where the guest repeats it (`rep ins`).
    pub fn read_port(&self, port: u16, width: u8, data: &mut [u8]) {
        self.exits.ports.fetch_add(1, Ordering::Relaxed);
        for access in data.chunks_mut(usize::from(width.max(1))) {
            if self.devices.pio_read(PioAddress(port), access).is_err() {
                data.fill(NOTHING);
                return self.unclaimed_port(port);
            }
        }
    }

    /// A port is written, `width` bytes at a time, as in [`read_port`](Self::read_port).
    pub fn write_port(&self, port: u16, width: u8, data: &[u8]) {
        self.exits.ports.fetch_add(1, Ordering::Relaxed);
        for access in data.chunks(usize::from(width.max(1))) {
            if self.devices.pio_write(PioAddress(port), access).is_err() {
                return self.unclaimed_port(port);
            }
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;
    use vm_device::MutDevicePio;
    use vm_device::bus::{PioAddressOffset, PioRange};

    use super::*;

    /// Keeps the accesses that reach it.
    #[derive(Default)]
    struct Kept(Vec<(u16, Vec<u8>)>);

    impl MutDevicePio for Kept {
        fn pio_read(&mut self, _: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
            self.0.push((offset, vec![0; data.len()]));
            data.fill(self.0.len() as u8);
        }

        fn pio_write(&mut self, _: PioAddress, offset: PioAddressOffset, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn buses(first: u16, count: u16) -> (Buses, Arc<Mutex<Kept>>) {
        let mut buses = Buses::default();
        let device = Arc::new(Mutex::new(Kept::default()));
        let range = PioRange::new(PioAddress(first), count).expect("a range");
        buses.devices.register_pio(range, device.clone()).expect("free addresses");
        (buses, device)
    }

    #[test]
    fn an_access_comes_as_wide_as_it_is_and_a_repeated_one_again_and_again() {
        let (buses, device) = buses(0xcf8, 8);
        buses.write_port(0xcf8, 4, &[1, 2, 3, 4]);
        buses.write_port(0xcfe, 2, &[5, 6, 7, 8]);
        buses.write_port(0xcf9, 1, &[9, 10]);
        let mut data = [0xff; 4];
        buses.read_port(0xcfc, 2, &mut data);
        assert_eq!(data, [6, 6, 7, 7]);
        let written = |offset, data: &[u8]| (offset, data.to_vec());
        assert_eq!(
            device.lock().unwrap().0,
            [
                written(0, &[1, 2, 3, 4]),
                written(6, &[5, 6]),
                written(6, &[7, 8]),
                written(1, &[9]),
                written(1, &[10]),
                written(4, &[0, 0]),
                written(4, &[0, 0]),
            ]
        );
    }

    #[test]
    fn an_access_that_reaches_past_a_device_is_none_to_it() {
        let (buses, device) = buses(0x505, 1);
        buses.write_port(0x505, 2, &[1, 1]);
        let mut data = [0; 2];
        buses.read_port(0x505, 2, &mut data);
        assert_eq!((data, device.lock().unwrap().0.len()), ([0xff; 2], 0));
        assert_eq!((buses.exits().ports, buses.exits().unclaimed_ports), (2, 2));
    }

    proptest! {
        #[test]
        fn no_access_panics_and_nothing_reads_as_ones(
            port: u16, width: u8, address: u64, mut data in prop::collection::vec(any::<u8>(), 0..64)
        ) {
            let buses = Buses::default();
            buses.write_port(port, width, &data);
            buses.write_memory(address, &data);
            buses.read_memory(address, &mut data);
            prop_assert!(data.iter().all(|byte| *byte == 0xff));
            buses.read_port(port, width, &mut data);
            prop_assert!(data.iter().all(|byte| *byte == 0xff));
        }
    }
}
