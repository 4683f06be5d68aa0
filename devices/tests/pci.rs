//! The bus: configuration space, the ways to it, and where BARs are.

use std::sync::{Arc, Mutex};

use devices::pci::access::{BarWindow, CONFIG_PORTS, ConfigPorts, Ecam};
use devices::pci::{BarRange, Bus, ConfigSpace, Function, HostBridge, Identity, SLOTS, SlotError};
use proptest::prelude::*;
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::{DeviceMmio, DevicePio};

const WINDOW: std::ops::Range<u64> = 1 << 40..(1 << 40) + 0x1_0000;
const SIZE: u64 = 0x1000;
const COMMAND: u64 = 4;
const BAR0: u64 = 0x10;
const MEMORY: u8 = 2;

/// A function with one BAR, behind which every byte is its number.
struct Numbered {
    number: u8,
    config: ConfigSpace,
    placed: Option<u64>,
}

impl Numbered {
    fn new(number: u8, address: u64) -> Arc<Mutex<Self>> {
        let identity =
            Identity { vendor: 0x1234, device: 0x5678, subsystem: 1, revision: 2, class: 0x03_04_05 };
        let mut config = ConfigSpace::new(identity);
        config.add_bar(0, SIZE, address);
        config.add_capability(9, &[4, 0xee], &[0, 0x0f]);
        Arc::new(Mutex::new(Self { number, config, placed: None }))
    }
}

impl Function for Numbered {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bar(&self, bar: usize) -> Option<BarRange> {
        self.config.bar(bar)
    }

    fn place_bar(&mut self, bar: usize, address: Option<u64>) {
        assert_eq!(bar, 0);
        assert_ne!(self.placed, address, "told twice");
        self.placed = address;
    }

    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= SIZE);
        data.fill(self.number);
    }

    fn write_bar(&mut self, _bar: usize, _offset: u64, data: &[u8]) {
        self.number = data[0];
    }
}

/// A bus with a host bridge and a few functions, and the ways to it.
struct Machine {
    bus: Arc<Bus>,
    ecam: Ecam,
    ports: ConfigPorts,
    window: BarWindow,
    functions: Vec<Arc<Mutex<Numbered>>>,
}

impl Machine {
    /// The BAR of each function is programmed where it says.
    fn new(addresses: &[u64]) -> Self {
        let bus = Arc::new(Bus::new(WINDOW));
        bus.insert(0, Arc::new(Mutex::new(HostBridge::default()))).unwrap();
        let functions: Vec<_> =
            (1..).zip(addresses).map(|(number, address)| Numbered::new(number, *address)).collect();
        for (slot, function) in (1..).zip(&functions) {
            assert_eq!(bus.add(function.clone()), Ok(slot));
        }
        let (ecam, ports) = (Ecam(bus.clone()), ConfigPorts::new(bus.clone()));
        Self { ecam, ports, window: BarWindow(bus.clone()), bus, functions }
    }

    fn read<const N: usize>(&self, slot: u64, register: u64) -> [u8; N] {
        let mut data = [0x55; N];
        self.ecam.mmio_read(MmioAddress(0xb000_0000), slot << 15 | register, &mut data);
        data
    }

    fn write(&self, slot: u64, register: u64, data: &[u8]) {
        self.ecam.mmio_write(MmioAddress(0xb000_0000), slot << 15 | register, data);
    }

    fn set_decoding(&self, slot: u64, on: bool) {
        self.write(slot, COMMAND, &[if on { MEMORY } else { 0 }]);
    }

    fn program(&self, slot: u64, address: u64) {
        self.write(slot, BAR0, &(address as u32).to_le_bytes());
        self.write(slot, BAR0 + 4, &((address >> 32) as u32).to_le_bytes());
    }

    /// Which function answers at `address`.
    fn at(&self, address: u64) -> Option<u8> {
        let mut data = [0];
        self.window.mmio_read(MmioAddress(WINDOW.start), address - WINDOW.start, &mut data);
        Some(data[0]).filter(|byte| *byte != 0xff)
    }

    fn placed(&self) -> Vec<Option<u64>> {
        self.functions.iter().map(|function| function.lock().unwrap().placed).collect()
    }

    fn select(&self, address: u32) {
        self.ports.pio_write(PioAddress(CONFIG_PORTS), 0, &address.to_le_bytes());
    }

    fn read_port<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0x55; N];
        self.ports.pio_read(PioAddress(CONFIG_PORTS), offset, &mut data);
        data
    }
}

#[test]
fn a_guest_finds_a_host_bridge_and_what_is_on_the_bus() {
    let machine = Machine::new(&[WINDOW.start]);
    assert_eq!(machine.read(0, 0), [0x36, 0x1b, 8, 0]);
    assert_eq!(machine.read(0, 8), [0, 0, 0, 6], "revision, and a host bridge");
    assert_eq!(machine.read(1, 0), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(machine.read(1, 8), [2, 5, 4, 3]);
    assert_eq!(machine.read(1, 0x0c), [0; 4], "one function, a type 0 header");
    assert_eq!(machine.read(1, 0x3c), [0; 4], "no interrupt pin");
    assert_eq!(machine.read(2, 0), [0xff; 4], "an empty slot");
    assert_eq!(machine.read(1, 1 << 12), [0xff; 4], "another function");
    assert_eq!(machine.read(1, 1 << 20), [0xff; 4], "another bus");
    assert_eq!(machine.read(1, 0x100), [0; 4], "no extended capabilities");
    let [capability] = machine.read(1, 0x34);
    assert_eq!(machine.read(1, capability.into()), [9, 0, 4, 0xee]);
}

#[test]
fn a_bus_is_full_after_31_devices() {
    let machine = Machine::new(&[0; 31]);
    assert_eq!(machine.bus.add(Numbered::new(0, 0)), Err(SlotError::Full));
    assert_eq!(machine.bus.insert(SLOTS, Numbered::new(0, 0)), Err(SlotError::NoSlot(32)));
    assert_eq!(machine.bus.insert(0, Numbered::new(0, 0)), Err(SlotError::Taken(0)));
    assert_eq!(machine.read(31, 0), [0x34, 0x12, 0x78, 0x56]);
}

#[test]
fn a_bar_tells_its_size() {
    let machine = Machine::new(&[WINDOW.start]);
    assert_eq!(machine.read(1, BAR0), [4, 0, 0, 0], "memory, of 64 bits");
    machine.program(1, u64::MAX);
    assert_eq!(machine.read(1, BAR0), 0xffff_f004_u32.to_le_bytes());
    assert_eq!(machine.read(1, BAR0 + 4), [0xff; 4]);
    assert_eq!(machine.read(1, BAR0 + 8), [0; 4], "no other BAR");
    machine.program(1, WINDOW.start + SIZE);
    machine.set_decoding(1, true);
    assert_eq!(machine.at(WINDOW.start + SIZE), Some(1));
}

#[test]
fn only_some_bits_can_be_written() {
    let machine = Machine::new(&[WINDOW.start]);
    let before: Vec<[u8; 1]> = (0..256).map(|register| machine.read(1, register)).collect();
    for register in 0..256 {
        machine.write(1, register, &[!before[register as usize][0]]);
    }
    let changed: Vec<(u64, u8)> = (0..256)
        .map(|register| (register, machine.read::<1>(1, register)[0] ^ before[register as usize][0]))
        .filter(|(_, bits)| *bits != 0)
        .collect();
    let bar =
        [(0x11, 0xf0), (0x12, 0xff), (0x13, 0xff), (0x14, 0xff), (0x15, 0xff), (0x16, 0xff), (0x17, 0xff)];
    let command = [(0x04, 0x46), (0x05, 0x05), (0x0c, 0xff)];
    assert_eq!(changed, [&command[..], &bar, &[(0x3c, 0xff), (0x43, 0x0f)]].concat());
}

#[test]
fn an_access_that_no_bus_carries_reads_ones_and_writes_nothing() {
    let machine = Machine::new(&[WINDOW.start]);
    machine.set_decoding(1, true);
    assert_eq!(machine.read::<8>(1, 0), [0xff; 8]);
    assert_eq!(machine.read::<3>(1, 0), [0xff; 3]);
    assert_eq!(machine.read::<2>(1, 3), [0xff; 2]);
    assert_eq!(machine.read::<4>(1, 2), [0xff; 4]);
    machine.write(1, COMMAND - 1, &[0; 4]);
    machine.write(1, COMMAND, &[0; 8]);
    machine.write(1, COMMAND, &[]);
    assert_eq!(machine.read(1, COMMAND), [MEMORY]);
    assert_eq!(machine.read(1, 2), [0x78, 0x56]);
}

#[test]
fn ports_reach_what_ecam_does() {
    let machine = Machine::new(&[WINDOW.start]);
    machine.select(1 << 31 | 1 << 11);
    assert_eq!(machine.read_port(0), (1_u32 << 31 | 1 << 11).to_le_bytes());
    assert_eq!(machine.read_port(4), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(machine.read_port(6), [0x78, 0x56]);
    assert_eq!(machine.read_port(7), [0x56]);
    machine.select(1 << 31 | 1 << 11 | COMMAND as u32);
    machine.ports.pio_write(PioAddress(CONFIG_PORTS), 4, &[MEMORY]);
    machine.ports.pio_write(PioAddress(CONFIG_PORTS), 5, &[4]);
    assert_eq!(machine.read(1, COMMAND), [MEMORY, 4]);
    assert_eq!(machine.at(WINDOW.start), Some(1));
    // Neither enabled, nor of this bus, nor of function 0.
    for address in [1 << 11, 1 << 31 | 1 << 16, 1 << 31 | 1 << 11 | 1 << 8, 1 << 31 | 5 << 11] {
        machine.select(address);
        assert_eq!(machine.read_port(4), [0xff; 4], "{address:#x}");
    }
}

#[test]
fn the_address_port_takes_four_bytes_only() {
    let machine = Machine::new(&[WINDOW.start]);
    machine.select(u32::MAX);
    assert_eq!(machine.read_port(0), 0x80ff_fffc_u32.to_le_bytes(), "reserved bits read zero");
    machine.select(1 << 31);
    for (offset, data) in [(0, &[0xff][..]), (1, &[6]), (0, &[0xff; 2]), (2, &[0xff; 2]), (3, &[0xff; 4])] {
        machine.ports.pio_write(PioAddress(CONFIG_PORTS), offset, data);
        assert_eq!(machine.read_port(0), (1_u32 << 31).to_le_bytes(), "{data:?} at {offset}");
    }
    assert_eq!(machine.read_port(1), [0xff]);
    assert_eq!(machine.read_port::<8>(0), [0xff; 8]);
    let other = ConfigPorts::restore(machine.bus.clone(), machine.ports.save());
    assert_eq!(other.save(), 1 << 31);
}

#[test]
fn a_bar_that_moves_is_followed() {
    let machine = Machine::new(&[WINDOW.start]);
    assert_eq!(machine.at(WINDOW.start), None, "decoding is off at first");
    machine.set_decoding(1, true);
    assert_eq!(machine.at(WINDOW.start + SIZE - 1), Some(1));
    assert_eq!(machine.at(WINDOW.start + SIZE), None);
    machine.set_decoding(1, false);
    machine.program(1, WINDOW.end - SIZE);
    assert_eq!(machine.placed(), [None]);
    machine.set_decoding(1, true);
    assert_eq!((machine.at(WINDOW.start), machine.at(WINDOW.end - 1)), (None, Some(1)));
    // While it decodes, by halves.
    machine.program(1, WINDOW.start + 2 * SIZE);
    assert_eq!(machine.placed(), [Some(WINDOW.start + 2 * SIZE)]);
    assert_eq!(machine.at(WINDOW.start + 2 * SIZE), Some(1));
    // An access that ends past the BAR is none to it.
    let mut data = [0; 4];
    machine.window.mmio_read(MmioAddress(WINDOW.start), 3 * SIZE - 2, &mut data);
    assert_eq!(data, [0xff; 4]);
    machine.window.mmio_write(MmioAddress(WINDOW.start), 3 * SIZE - 1, &[7, 7]);
    machine.window.mmio_write(MmioAddress(WINDOW.start), 2 * SIZE, &[9]);
    assert_eq!(machine.at(WINDOW.start + 2 * SIZE), Some(9));
}

#[test]
fn a_bar_outside_the_window_is_reached_from_nowhere() {
    for address in [0, 0xfee0_0000, WINDOW.start - SIZE, WINDOW.end, u64::MAX] {
        let machine = Machine::new(&[WINDOW.start]);
        machine.set_decoding(1, true);
        machine.program(1, address);
        assert_eq!(machine.placed(), [None], "{address:#x}");
        machine.program(1, WINDOW.start);
        assert_eq!(machine.at(WINDOW.start), Some(1));
    }
}

#[test]
fn who_was_there_first_stays() {
    let machine = Machine::new(&[WINDOW.start, WINDOW.start + SIZE]);
    machine.set_decoding(2, true);
    machine.set_decoding(1, true);
    machine.program(1, WINDOW.start + SIZE);
    assert_eq!(machine.placed(), [None, Some(WINDOW.start + SIZE)]);
    assert_eq!(machine.at(WINDOW.start + SIZE), Some(2));
    // The place becomes free: who waits for it gets it.
    machine.set_decoding(2, false);
    assert_eq!(machine.placed(), [Some(WINDOW.start + SIZE), None]);
    assert_eq!(machine.at(WINDOW.start + SIZE), Some(1));
}

/// Anything a guest may write to two functions' Command and BAR registers.
#[derive(Clone, Debug)]
struct Write {
    slot: u64,
    register: u64,
    data: Vec<u8>,
}

fn write() -> impl Strategy<Value = Write> {
    let address = prop_oneof![4 => (0..18_u64).prop_map(|page| WINDOW.start - SIZE + page * SIZE / 2), 1 => any::<u64>()];
    let register = prop_oneof![4 => prop::sample::select(vec![4, 0x10, 0x14]), 1 => 0_u64..0x120];
    (1..4_u64, register, address, any::<bool>(), 1..9_usize).prop_map(
        |(slot, register, address, on, width)| {
            let value = match register {
                4 => u64::from(on) << 1,
                0x14 => address >> 32,
                _ => address,
            };
            Write { slot, register, data: value.to_le_bytes()[..width.min(4)].to_vec() }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Wherever BARs go: they stay in the window, never overlap, and each is where it is programmed
    /// to be, or its place is taken, or it is none.
    #[test]
    fn bars_never_get_in_each_others_way(writes in prop::collection::vec(write(), 1..60)) {
        let machine = Machine::new(&[WINDOW.start, WINDOW.start, 0]);
        for Write { slot, register, data } in writes {
            machine.write(slot, register, &data);
            let wanted: Vec<_> =
                machine.functions.iter().map(|function| function.lock().unwrap().bar(0)).collect();
            let placed = machine.placed();
            for (number, (wanted, place)) in wanted.iter().zip(&placed).enumerate() {
                let others = placed.iter().enumerate().filter(|(other, _)| *other != number);
                let mut taken = others.filter_map(|(_, place)| *place);
                match (wanted, place) {
                    (Some(wanted), Some(place)) => {
                        prop_assert_eq!(wanted.address, *place);
                        prop_assert!(*place >= WINDOW.start && place + SIZE <= WINDOW.end);
                        prop_assert!(taken.all(|other| other.abs_diff(*place) >= SIZE));
                        prop_assert_eq!(machine.at(*place), Some(number as u8 + 1));
                    }
                    (Some(wanted), None) => {
                        let inside = wanted.address >= WINDOW.start && wanted.address <= WINDOW.end - SIZE;
                        prop_assert!(!inside || taken.any(|other| other.abs_diff(wanted.address) < SIZE));
                    }
                    (None, place) => prop_assert_eq!(*place, None),
                }
            }
        }
    }
}
