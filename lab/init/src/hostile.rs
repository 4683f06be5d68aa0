//! A guest whose root user attacks its own devices, before a driver of the kernel is there.
//!
//! ```text
//! ballast.hostile=SEED:ROUNDS:ARENA
//! ```
//! The last ARENA MiB of the guest's RAM must be hidden from its kernel with
//! `mem=`: rings and buffers lie there, and every address that a device gets is
//! there or in no RAM at all. So what a device writes or drops harms nobody
//! here, and the guest can show afterwards that the stock drivers still work.
//!
//! It prints `HOSTILE BEGIN`, a `HOSTILE ROUND n` now and then, `HOSTILE END`
//! with what it has done and seen, and when the drivers are loaded `RNG` with
//! what `/dev/hwrng` gave.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::devmem::Window;
use crate::ports;
use crate::random::Random;

const MIB: u64 = 1 << 20;
/// Bytes of a virtio-mmio window.
const WINDOW: usize = 0x1000;
/// Rings of one attacker.
const RINGS: u64 = MIB;
/// Page numbers that a balloon may be given.
const NUMBERS: u64 = MIB;
/// Attackers at most: their rings, the numbers and then the random bytes lie behind each other.
const MOST_ATTACKERS: u64 = 4;
/// How often an attacker says where it is.
const SAY_EVERY: u64 = 8;

/// Register offsets (virtio 1.2, section 4.2.2).
mod register {
    pub const DEVICE_ID: usize = 0x008;
    pub const DEVICE_FEATURES: usize = 0x010;
    pub const DEVICE_FEATURES_SEL: usize = 0x014;
    pub const DRIVER_FEATURES: usize = 0x020;
    pub const DRIVER_FEATURES_SEL: usize = 0x024;
    pub const QUEUE_SEL: usize = 0x030;
    pub const QUEUE_NUM_MAX: usize = 0x034;
    pub const QUEUE_NUM: usize = 0x038;
    pub const QUEUE_READY: usize = 0x044;
    pub const QUEUE_NOTIFY: usize = 0x050;
    pub const INTERRUPT_STATUS: usize = 0x060;
    pub const INTERRUPT_ACK: usize = 0x064;
    pub const STATUS: usize = 0x070;
    /// Descriptor table, available ring, used ring: low and high half each.
    pub const AREAS: [usize; 3] = [0x080, 0x090, 0x0a0];
    pub const CONFIG: usize = 0x100;
}

const NEEDS_RESET: u32 = 0x40;
const RNG: u32 = 4;
const BALLOON: u32 = 5;

/// What all attackers did and saw.
#[derive(Default)]
struct Tally {
    accesses: AtomicU64,
    used: AtomicU64,
    broken: AtomicU64,
}

/// What the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Orders {
    seed: u64,
    rounds: u64,
    arena: u64,
}

impl Orders {
    fn parse(cmdline: &str) -> Option<Self> {
        let order = cmdline.split_whitespace().find_map(|word| word.strip_prefix("ballast.hostile="))?;
        let mut numbers = order.split(':').map(|number| number.parse().ok());
        let mut next = || numbers.next().flatten();
        Some(Self { seed: next()?, rounds: next()?, arena: next()? * MIB })
    }
}

/// Has `load_drivers` done, after an attack where the command line asks for one.
pub fn attack_before(load_drivers: impl FnOnce()) {
    let orders = Orders::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    if let Some(orders) = orders
        && let Err(error) = attack(orders)
    {
        println!("HOSTILE FAILED {error}");
    }
    load_drivers();
    if orders.is_some() {
        match random_bytes() {
            Ok(distinct) => println!("RNG distinct={distinct}"),
            Err(error) => println!("RNG FAILED {error}"),
        }
    }
}

/// Different values among 256 bytes of the random number device.
fn random_bytes() -> io::Result<usize> {
    let name = fs::read_to_string("/sys/class/misc/hw_random/rng_current")?;
    if !name.starts_with("virtio_rng") {
        return Err(io::Error::other(format!("the kernel uses {}", name.trim())));
    }
    let mut bytes = [0; 256];
    File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().collect::<BTreeSet<_>>().len())
}

fn attack(orders: Orders) -> io::Result<()> {
    let map = fs::read_to_string("/proc/iomem")?;
    let windows: Vec<u64> = ranges(&map, "LNRO0005").map(|(start, _)| start).collect();
    let start = ranges(&map, "System RAM").map(|(_, end)| end + 1).max();
    let (Some(start), Some(&first), Some(&last)) = (start, windows.iter().min(), windows.iter().max()) else {
        return Err(io::Error::other("no RAM or no virtio-mmio device in /proc/iomem"));
    };
    let memory = OpenOptions::new().read(true).write(true).open("/dev/mem")?;
    let place = Place { start, end: start + orders.arena, windows: first };
    let numbers = Window::map(&memory, place.numbers(), NUMBERS as usize)?;
    place.fill(&numbers, &mut Random::new(orders.seed));
    let tally = Tally::default();
    let attackers = thread::available_parallelism().map_or(1, |count| count.get() as u64).min(MOST_ATTACKERS);
    println!("HOSTILE BEGIN devices={} attackers={attackers}", windows.len());
    let mut left = orders.rounds;
    let mut seed = orders.seed;
    while left > 0 {
        let rounds = left.min(SAY_EVERY);
        thread::scope(|scope| -> io::Result<()> {
            for id in 0..attackers {
                let devices = windows
                    .iter()
                    .map(|&window| Window::map(&memory, window, WINDOW))
                    .collect::<io::Result<_>>()?;
                let rings = Window::map(&memory, place.rings(id), RINGS as usize)?;
                let nowhere = Window::map(&memory, last + WINDOW as u64, 16 * WINDOW)?;
                seed += 1;
                let random = Random::new(seed);
                let mut attacker = Attacker { place, id, devices, rings, nowhere, random, tally: &tally };
                scope.spawn(move || (0..rounds).for_each(|_| attacker.round()));
            }
            Ok(())
        })?;
        // Alone, as it upsets the console, which tells how far the attack is.
        ports::attack(&mut Random::new(seed))?;
        left -= rounds;
        println!("\nHOSTILE ROUND {}", orders.rounds - left);
    }
    for &window in &windows {
        Window::map(&memory, window, WINDOW)?.write(register::STATUS, 0u32);
    }
    let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
    println!(
        "HOSTILE END accesses={} used={} broken={}",
        count(&tally.accesses),
        count(&tally.used),
        count(&tally.broken)
    );
    io::stdout().flush()
}

/// First and last address of each range of `/proc/iomem` whose name starts with `name`.
fn ranges<'a>(map: &'a str, name: &'a str) -> impl Iterator<Item = (u64, u64)> + 'a {
    map.lines().filter_map(move |line| {
        let (range, rest) = line.trim().split_once(" : ")?;
        let (start, end) = range.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some((number(start)?, number(end)?)).filter(|_| rest.starts_with(name))
    })
}

/// Where in guest physical memory an attack takes place.
#[derive(Clone, Copy)]
struct Place {
    start: u64,
    /// The end of RAM.
    end: u64,
    /// The first device's window.
    windows: u64,
}

impl Place {
    fn rings(self, id: u64) -> u64 {
        self.start + id * RINGS
    }

    fn numbers(self) -> u64 {
        self.rings(MOST_ATTACKERS)
    }

    /// Where the random number device may write: never read as page numbers, as some of them
    /// would be those of the kernel.
    fn bytes(self) -> u64 {
        self.start + (self.end - self.start) / 2
    }

    /// Page numbers in the arena, and far behind it.
    fn fill(self, numbers: &Window, random: &mut Random) {
        let (first, last) = (self.numbers() >> 12, (self.end >> 12) - 1);
        for at in (0..NUMBERS as usize).step_by(4) {
            let number = match random.below(8) {
                0 => u32::MAX,
                1 => last as u32 + random.next() as u32 % MIB as u32,
                // The numbers themselves are not among those given up, so that they stay.
                _ => (first + NUMBERS / 4096 + random.below(last - first - NUMBERS / 4096 + 1)) as u32,
            };
            numbers.write(at, number);
        }
    }

    /// An address that is no RAM, or only just.
    fn bad_address(self, random: &mut Random) -> u64 {
        match random.below(6) {
            0 => self.end - random.below(64),
            1 => self.end + random.below(1 << 32),
            2 => u64::MAX - random.below(4096),
            3 => self.windows + random.below(2 * WINDOW as u64),
            4 => 0xfec0_0000 + random.below(0x20_0000),
            _ => random.next() | 1 << 40,
        }
    }
}

fn length(random: &mut Random) -> u32 {
    match random.below(8) {
        0 => 0,
        1 => u32::MAX,
        2 => random.next() as u32,
        3 => 1 << random.below(32),
        4 => random.below(64) as u32,
        // Rarely as much as a device takes: a full chain is 16 thousand pages to drop.
        5 if random.one_in(8) => 4 * random.below(16 << 10) as u32,
        _ => 4 * random.below(256) as u32,
    }
}

/// Where the three parts of a queue are.
struct Rings {
    size: u16,
    /// As the device is told.
    told: [u64; 3],
    /// As offsets into the attacker's rings, where they are there.
    here: [Option<usize>; 3],
}

/// One of the threads of an attack. It may meet others at each device.
struct Attacker<'a> {
    place: Place,
    id: u64,
    devices: Vec<Window>,
    rings: Window,
    nowhere: Window,
    random: Random,
    tally: &'a Tally,
}

impl Attacker<'_> {
    fn round(&mut self) {
        let device = self.choose();
        match self.random.below(10) {
            0..6 => self.drive(device),
            6..9 => (0..32).for_each(|_| self.any_access(device)),
            _ => (0..32).for_each(|_| self.access_nowhere()),
        }
    }

    /// Every other time the balloon, whose word ends up in the host's memory; else any device.
    fn choose(&mut self) -> usize {
        let balloon =
            self.devices.iter().position(|device| device.read::<u32>(register::DEVICE_ID) == BALLOON);
        match balloon {
            Some(device) if self.random.one_in(2) => device,
            _ => self.random.below(self.devices.len() as u64) as usize,
        }
    }

    fn write(&self, device: usize, register: usize, value: u32) {
        self.tally.accesses.fetch_add(1, Ordering::Relaxed);
        self.devices[device].write(register, value);
    }

    fn read(&self, device: usize, register: usize) -> u32 {
        self.tally.accesses.fetch_add(1, Ordering::Relaxed);
        self.devices[device].read(register)
    }

    /// Sets the device up more or less as a driver would, and feeds it.
    fn drive(&mut self, device: usize) {
        let is_rng = self.read(device, register::DEVICE_ID) == RNG;
        self.write(device, register::STATUS, 0);
        self.write(device, register::STATUS, 1);
        self.write(device, register::STATUS, 3);
        for half in 0..2 {
            self.write(device, register::DEVICE_FEATURES_SEL, half);
            let offered = self.read(device, register::DEVICE_FEATURES);
            let wanted = match self.random.below(8) {
                0 => self.random.next() as u32,
                1 => offered & (self.random.next() as u32 | half),
                _ => offered,
            };
            self.write(device, register::DRIVER_FEATURES_SEL, half);
            self.write(device, register::DRIVER_FEATURES, wanted);
        }
        self.write(device, register::STATUS, 11);
        let count = if is_rng { 1 } else { 5 };
        // A device with one bad queue does not start: most of them must get past that.
        let proper = !self.random.one_in(4);
        let queues: Vec<Rings> = (0..count).map(|queue| self.set_up_queue(device, queue, proper)).collect();
        self.write(device, register::STATUS, 15);
        for _ in 0..self.random.below(12) {
            let queue = self.random.below(queues.len() as u64) as usize;
            self.feed(&queues[queue], is_rng);
            let storm = if self.random.one_in(16) { 100 } else { 1 + self.random.below(3) };
            for _ in 0..storm {
                let queue = if self.random.one_in(16) { self.random.next() as u32 } else { queue as u32 };
                self.write(device, register::QUEUE_NOTIFY, queue);
            }
            if self.random.one_in(4) {
                self.any_access(device);
            }
            if self.random.one_in(2) {
                // Else the next reset often comes before the device has looked.
                thread::sleep(Duration::from_millis(1));
            }
            let reasons = self.read(device, register::INTERRUPT_STATUS);
            self.write(device, register::INTERRUPT_ACK, reasons);
        }
        if self.read(device, register::STATUS) & NEEDS_RESET != 0 {
            self.tally.broken.fetch_add(1, Ordering::Relaxed);
        }
        for used in queues.iter().filter_map(|rings| rings.here[2]) {
            let index: u16 = self.rings.read(used + 2);
            self.tally.used.fetch_add(index.into(), Ordering::Relaxed);
        }
    }

    fn set_up_queue(&mut self, device: usize, queue: u32, proper: bool) -> Rings {
        self.write(device, register::QUEUE_SEL, queue);
        let most = self.read(device, register::QUEUE_NUM_MAX).clamp(1, 128);
        let size = match self.random.below(8) {
            // Small: a ring of 128 full chains is two million pages to drop.
            _ if proper => most.min(16) as u16,
            0 => self.random.next() as u16,
            1 => 0,
            _ => 1 << self.random.below(8),
        };
        // 64 KiB for each queue, so that the parts of a large one fit.
        let base = queue as usize * 0x1_0000;
        let apart = [base, base + 0x2000, base + 0x3000];
        let mut rings = Rings { size, told: [0; 3], here: apart.map(Some) };
        for (part, offset) in apart.into_iter().enumerate() {
            let offset = match self.random.below(24) {
                _ if proper => offset,
                0 => base,
                1 => offset + self.random.below(16) as usize,
                _ => offset,
            };
            rings.told[part] = self.place.rings(self.id) + offset as u64;
            rings.here[part] = Some(offset);
            if !proper && self.random.one_in(24) {
                rings.told[part] = self.place.bad_address(&mut self.random);
                rings.here[part] = None;
            }
        }
        for offset in (0x2000..0x4000).step_by(8) {
            self.rings.write(base + offset, 0u64);
        }
        self.write(device, register::QUEUE_NUM, size.into());
        for (register, address) in register::AREAS.into_iter().zip(rings.told) {
            self.write(device, register, address as u32);
            self.write(device, register + 4, (address >> 32) as u32);
        }
        if proper || !self.random.one_in(16) {
            self.write(device, register::QUEUE_READY, 1);
        }
        rings
    }

    /// Makes chains available, good ones and bad ones.
    fn feed(&mut self, rings: &Rings, is_rng: bool) {
        let (Some(table), Some(available)) = (rings.here[0], rings.here[1]) else { return };
        let (table, available) = (table & !15, available & !1);
        let entries = u64::from(rings.size.clamp(1, 256));
        for entry in 0..entries as usize {
            let address = self.buffer(is_rng);
            let next = if self.random.one_in(64) {
                self.random.next() as u16
            } else {
                self.random.below(entries) as u16
            };
            // Mostly a chain's end: with more links nearly every chain would be a loop.
            let mut flags = u16::from(self.random.one_in(4));
            flags |= if is_rng != self.random.one_in(6) { 2 } else { 0 };
            flags |= if self.random.one_in(16) { 4 } else { 0 };
            flags |= if self.random.one_in(64) { self.random.next() as u16 } else { 0 };
            let place = table + entry * 16;
            self.rings.write(place, address);
            self.rings.write(place + 8, length(&mut self.random));
            self.rings.write(place + 12, flags);
            self.rings.write(place + 14, next);
        }
        let index: u16 = self.rings.read(available + 2);
        let more = match self.random.below(32) {
            0 => self.random.next() as u16,
            _ => self.random.below(entries + 1) as u16,
        };
        for step in 0..u64::from(more).min(entries) {
            let head = match self.random.below(64) {
                0 => self.random.next() as u16,
                _ => self.random.below(entries) as u16,
            };
            let slot = (u64::from(index) + step) % entries;
            self.rings.write(available + 4 + 2 * slot as usize, head);
        }
        self.rings.write(available + 2, index.wrapping_add(more));
    }

    fn buffer(&mut self, is_rng: bool) -> u64 {
        if self.random.one_in(8) {
            return self.place.bad_address(&mut self.random);
        }
        let (start, size) = if is_rng {
            (self.place.bytes(), self.place.end - self.place.bytes())
        } else {
            (self.place.numbers(), NUMBERS / 2)
        };
        let offset = self.random.below(size);
        start + if self.random.one_in(8) { offset } else { offset & !3 }
    }

    /// An access of any width at any place of the window.
    fn any_access(&mut self, device: usize) {
        let width = 1usize << self.random.below(4);
        let offset = match self.random.below(4) {
            0 => self.random.below((WINDOW - 8) as u64) as usize,
            1 => register::CONFIG + self.random.below(16) as usize,
            2 => self.random.below(0x100) as usize,
            _ => self.random.below(0x40) as usize * 4,
        };
        let value = if (0x080..0x0b0).contains(&(offset + 7)) || (0x080..0x0b0).contains(&offset) {
            // Whatever becomes of the halves, no address of the kernel's memory comes of it.
            self.place.rings(self.id) + self.random.below(RINGS)
        } else if self.random.one_in(2) {
            self.random.below(16)
        } else {
            self.random.next()
        };
        let write = self.random.one_in(2);
        self.tally.accesses.fetch_add(1, Ordering::Relaxed);
        self.devices[device].access(offset, width, write.then_some(value));
    }

    /// An access where no device is.
    fn access_nowhere(&mut self) {
        let width = 1usize << self.random.below(4);
        let offset = self.random.below((16 * WINDOW - 8) as u64) as usize;
        let value = self.random.one_in(2).then(|| self.random.next());
        self.tally.accesses.fetch_add(1, Ordering::Relaxed);
        self.nowhere.access(offset, width, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_addresses_are_read() {
        let orders = Orders::parse("quiet ballast.hostile=7:200:64 mem=192M");
        assert_eq!(orders, Some(Orders { seed: 7, rounds: 200, arena: 64 * MIB }));
        assert_eq!(Orders::parse("quiet ballast.hostile=7"), None);
        let map = "00100000-0bffffff : System RAM\n  d0001000-d0001fff : LNRO0005:01\n";
        assert_eq!(ranges(map, "LNRO0005").collect::<Vec<_>>(), [(0xd000_1000, 0xd000_1fff)]);
    }
}
