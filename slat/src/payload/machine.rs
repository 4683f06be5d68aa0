//! The micro-VM: a few pages of memory, tables, one payload, no devices but a doorbell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use balloon::units::Bytes;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::code::{self, Label, Params};
use super::failure::{kvm, memory_error};
use super::memory::{Backing, Mapping};
use super::native::chain;
use super::tables::{self, Tables};
use super::vcpu::{Shared, Vcpu, collect, end, install_kick};
use super::{Between, Payload, Place, Setup};
use crate::counters::Counters;
use crate::host::KernelMemory;
use crate::walk::PageSize;

pub use super::failure::Failure;
pub use super::vcpu::Round;

const GDT: GuestAddress = GuestAddress(0x1000);
const IDT: GuestAddress = GuestAddress(0x2000);
const PARAMS: u64 = 0x3000;
const PARAMS_SIZE: u64 = 0x100;
const ROOTS: GuestAddress = GuestAddress(0x4000);
/// Where the code of all payloads begins.
pub(super) const CODE: u64 = 0x8000;
const STACKS: u64 = 0x1_0000;
const STACK_SIZE: u64 = 0x1000;
const TABLES: GuestAddress = GuestAddress(0x10_0000);
/// Guest physical address of the data: aligned for every page size.
pub const DATA: u64 = 1 << 30;
/// Virtual addresses that page-table payloads map and unmap: a table a vCPU.
const WINDOW: u64 = 1 << 39;
/// Virtual address of the data, in a slot of the root table of its own.
pub const DATA_ADDRESS: u64 = 1 << 40;
const WINDOW_SIZE: u64 = 2 << 20;
const CHURN_PAGES: u64 = 64;
/// From a page of the window to the other frame that churn gives it.
const OTHER_FRAME: u64 = 1 << 20;

/// Most vCPUs and roots a micro-VM has room for.
pub const MOST_VCPUS: u64 = 16;
/// Most CR3 values.
pub const MOST_ROOTS: u64 = 512;

/// A virtual machine with a payload in it, ready to run.
pub struct Machine {
    // Before the memory: the machine must be gone when its memory is unmapped.
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    memory: GuestMemoryMmap,
    setup: Setup,
    root: GuestAddress,
    mappings: Vec<Mapping>,
    before: KernelMemory,
    /// The machine whose turn comes between laps.
    other: Option<Box<Machine>>,
}

/// How many table pages a setup can need, but for those over the low memory.
fn table_count(setup: &Setup, data: u64) -> u64 {
    let spaces = if setup.payload == Payload::Spaces { setup.roots } else { 1 };
    let last = if setup.guest_page == PageSize::Size4K { data.div_ceil(2 << 20) } else { 0 };
    spaces * (last + data.div_ceil(1 << 30) + 2) + setup.roots + setup.vcpus + 16
}

fn region(mapping: &Mapping, at: u64) -> Result<GuestRegionMmap<()>, Failure> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the mapping lives in the same Machine and is dropped after the region.
    let region = unsafe { MmapRegion::build_raw(mapping.start(), mapping.size(), prot, flags) };
    GuestRegionMmap::new(region.map_err(memory_error)?, GuestAddress(at))
        .ok_or_else(|| memory_error("a region wraps around"))
}

impl Machine {
    /// Builds the machine: memory, tables, code, vCPUs.
    ///
    /// # Errors
    /// Where the setup is impossible, or memory or KVM refuse.
    pub fn new(kvm_fd: &Kvm, setup: &Setup) -> Result<Self, Failure> {
        check(setup)?;
        let data = setup.data.0.saturating_mul(setup.vcpus);
        let tables = table_count(setup, data);
        // The low memory needs tables too: one for 2 MiB of it, and it grows by them.
        let low = (TABLES.0 + (tables + tables.div_ceil(256) + 16) * 4096).next_multiple_of(2 << 20);
        let map = |size, backing| {
            Mapping::new(size, backing).map_err(|source| Failure::Memory { backing, size, source })
        };
        let mappings = vec![map(Bytes(low), Backing::Small)?, map(Bytes(data), setup.backing)?];
        let populate = |mapping: &Mapping, backing| {
            let size = Bytes(mapping.size() as u64);
            mapping.populate().map_err(|source| Failure::Memory { backing, size, source })
        };
        populate(&mappings[0], Backing::Small)?;
        if setup.present {
            populate(&mappings[1], setup.backing)?;
        }
        let regions = vec![region(&mappings[0], 0)?, region(&mappings[1], DATA)?];
        let memory = GuestMemoryMmap::from_regions(regions).map_err(memory_error)?;
        let before = KernelMemory::now();
        let vm = kvm_fd.create_vm().map_err(kvm("create a virtual machine"))?;
        for (slot, (mapping, at)) in mappings.iter().zip([0, DATA]).enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: at,
                memory_size: mapping.size() as u64,
                userspace_addr: mapping.start() as u64,
                flags: 0,
            };
            // SAFETY: the mapping outlives the machine: fields are dropped in order.
            unsafe { vm.set_user_memory_region(region) }.map_err(kvm("take the guest's memory"))?;
        }
        // Old Intel hosts put three pages of their own there; others don't care.
        let _ = vm.set_tss_address(0xfffb_d000);
        let mut machine = Self {
            vcpus: Vec::new(),
            vm,
            memory,
            setup: setup.clone(),
            root: GuestAddress(0),
            mappings,
            before,
            other: None,
        };
        machine.lay_out(low, data)?;
        machine.other = other(kvm_fd, setup)?.map(Box::new);
        machine.vcpus = (0..setup.vcpus).map(|i| machine.vcpu(kvm_fd, i)).collect::<Result<_, _>>()?;
        Ok(machine)
    }

    fn write(&self, value: u64, at: u64) -> Result<(), Failure> {
        self.memory.write_obj(value, GuestAddress(at)).map_err(memory_error)
    }

    fn lay_out(&mut self, low: u64, data: u64) -> Result<(), Failure> {
        self.memory.write_slice(code::bytes(), GuestAddress(CODE)).map_err(memory_error)?;
        // Null, code and data of ring 0, code and data of ring 3: flat, 64-bit (SDM volume 3, 3.4.5).
        let descriptors: [u64; 5] =
            [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff];
        for (i, descriptor) in (0..).zip(descriptors) {
            self.write(descriptor, GDT.0 + i * 8)?;
        }
        // One gate: vector 14, interrupt gate, ring 0 (SDM volume 3, 6.14.1).
        let handler = CODE + Label::PageFault.offset();
        self.write((handler & 0xffff) | 0x8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48, IDT.0 + 14 * 16)?;
        let setup = &self.setup;
        let mut tables = Tables::new(&self.memory, TABLES, (low - TABLES.0) / 4096);
        let root = tables.table()?;
        tables.map(root, 0, 0, low, PageSize::Size4K)?;
        tables.map(root, DATA_ADDRESS, DATA, data, setup.guest_page)?;
        for vcpu in 0..setup.vcpus {
            window(&self.memory, &mut tables, root, setup, vcpu)?;
        }
        for i in 0..setup.roots {
            let copy = if i == 0 { root } else { tables.table()? };
            let slot = |address: u64| (address >> 39 & 0x1ff) * 8;
            for address in [0, WINDOW, DATA_ADDRESS] {
                let entry: u64 =
                    self.memory.read_obj(GuestAddress(root.0 + slot(address))).map_err(memory_error)?;
                self.write(entry, copy.0 + slot(address))?;
            }
            if setup.payload == Payload::Spaces && i > 0 {
                self.write(0, copy.0 + slot(DATA_ADDRESS))?;
                tables.map(copy, DATA_ADDRESS, DATA, data, setup.guest_page)?;
            }
            self.write(copy.0, ROOTS.0 + i * 8)?;
        }
        self.root = root;
        if matches!(setup.payload, Payload::Chase | Payload::Laps) {
            chain(data / 4096, DATA_ADDRESS, |offset, link| self.write(link, DATA + offset))?;
        }
        (0..setup.vcpus).try_for_each(|vcpu| self.parameters(vcpu))
    }

    fn parameters(&self, vcpu: u64) -> Result<(), Failure> {
        let setup = &self.setup;
        let params = Params::default();
        let own = vcpu * setup.data.0;
        let window = WINDOW + vcpu * WINDOW_SIZE;
        let entry = |level| Tables::new(&self.memory, TABLES, 0).entry(self.root, window, level);
        let pages = if setup.payload == Payload::Churn { CHURN_PAGES } else { setup.links() };
        Params::set(&params.op, CODE + setup.payload.label().offset());
        Params::set(&params.warm, setup.warm());
        Params::set(&params.count, setup.operations);
        Params::set(&params.base, DATA_ADDRESS + own);
        Params::set(&params.pages, pages);
        Params::set(&params.stride, PageSize::Size4K.bytes());
        Params::set(&params.window, window);
        Params::set(&params.value, (DATA + own) | tables::LEAF);
        Params::set(&params.other, (DATA + own + OTHER_FRAME) | tables::LEAF);
        if setup.payload == Payload::MmapBatch {
            // The window's table hangs in no entry yet: the payload puts it there.
            let pde = entry(2)?.0;
            let value: u64 = self.memory.read_obj(GuestAddress(pde)).map_err(memory_error)?;
            Params::set(&params.pde, pde);
            Params::set(&params.pde_value, value);
            Params::set(&params.pte, value & !0xfff);
            self.write(0, pde)?;
        } else {
            Params::set(&params.pte, entry(1)?.0);
        }
        Params::set(&params.roots, ROOTS.0);
        Params::set(&params.root_count, setup.roots);
        // Ring 0 may be emulated, by an emulator that has neither lfence nor a clock worth reading.
        let flags = match (setup.payload, setup.between, setup.place) {
            // Laps time themselves.
            (Payload::Laps, Between::Nothing, _) => 0,
            (Payload::Laps, ..) => code::RING_EACH_LAP,
            (_, _, Place::Ring3) => code::TAKE_TSC,
            _ => 0,
        };
        Params::set(&params.flags, flags);
        Params::set(&params.cursor, DATA_ADDRESS);
        // SAFETY: Params is plain integers without padding.
        let bytes =
            unsafe { std::slice::from_raw_parts((&raw const params).cast::<u8>(), size_of::<Params>()) };
        let at = GuestAddress(PARAMS + vcpu * PARAMS_SIZE);
        self.memory.write_slice(bytes, at).map_err(memory_error)
    }

    fn vcpu(&self, kvm_fd: &Kvm, id: u64) -> Result<VcpuFd, Failure> {
        let vcpu = self.vm.create_vcpu(id).map_err(kvm("create a vCPU"))?;
        let cpuid = kvm_fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("list CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("set CPUID"))?;
        let ring = if self.setup.place == Place::Ring3 { 3 } else { 0 };
        let mut sregs = vcpu.get_sregs().map_err(kvm("read registers"))?;
        let code = kvm_segment {
            limit: u32::MAX,
            selector: if ring == 0 { 0x8 } else { 0x1b },
            type_: 0xb,
            present: 1,
            dpl: ring,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data =
            kvm_segment { selector: if ring == 0 { 0x10 } else { 0x23 }, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt.base = GDT.0;
        sregs.gdt.limit = 5 * 8 - 1;
        sregs.idt.base = IDT.0;
        sregs.idt.limit = 15 * 16 - 1;
        sregs.cr3 = self.root.0;
        sregs.cr4 = 0x20; // PAE
        sregs.cr0 = 0x8001_0033; // PG WP NE ET MP PE
        sregs.efer = 0x500; // LMA LME
        vcpu.set_sregs(&sregs).map_err(kvm("set registers"))?;
        let regs = kvm_regs {
            rip: CODE,
            rsp: STACKS + (id + 1) * STACK_SIZE,
            rdi: PARAMS + id * PARAMS_SIZE,
            // IOPL 3, so that ring 3 reaches the doorbell; bit 1 is always set.
            rflags: 0x3002,
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(kvm("set registers"))?;
        Ok(vcpu)
    }

    /// Guest memory, for tests and for walks.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The guest's CR3.
    pub fn root(&self) -> GuestAddress {
        self.root
    }

    /// KVM's own translation of a guest virtual address; `None` where it is not mapped.
    ///
    /// # Errors
    /// KVM's.
    pub fn translate(&self, address: u64) -> Result<Option<u64>, Failure> {
        let vcpu = self.vcpus.first().ok_or(Failure::Thread)?;
        let answer = vcpu.translate_gva(address).map_err(kvm("translate an address"))?;
        Ok((answer.valid != 0).then_some(answer.physical_address))
    }

    /// Runs warm-up and `rounds` measured rounds; gives up after `limit` or when `stop` is set.
    ///
    /// # Errors
    /// Where the payload hangs, dies, or can't be run by this host.
    pub fn run(mut self, rounds: usize, limit: Duration, stop: &AtomicBool) -> Result<Vec<Round>, Failure> {
        self.drive(rounds, limit, stop)
    }

    fn drive(&mut self, rounds: usize, limit: Duration, stop: &AtomicBool) -> Result<Vec<Round>, Failure> {
        install_kick()?;
        let shared = Arc::new(Shared::new(self.vcpus.len()));
        let (send, receive) = channel();
        let mut other = self.other.as_mut().map(|o| std::mem::take(&mut o.vcpus)).unwrap_or_default();
        let mut machine_counters = Some((Counters::open(&self.vm)?, self.before));
        let mut threads = Vec::new();
        for (id, fd) in std::mem::take(&mut self.vcpus).into_iter().enumerate() {
            let vcpu = Vcpu {
                counters: Counters::open(&fd)?,
                machine: machine_counters.take(),
                fd,
                other: other.pop(),
                shared: Arc::clone(&shared),
                memory: self.memory.clone(),
                params: PARAMS + id as u64 * PARAMS_SIZE,
                ticks: self.setup.place == Place::Ring3,
                report: send.clone(),
            };
            threads.push(std::thread::spawn(move || vcpu.run(rounds)));
        }
        drop(send);
        let result = collect(&receive, rounds, threads.len(), limit, stop);
        shared.stop.store(true, Ordering::SeqCst);
        end(threads, &shared);
        result
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("setup", &self.setup).field("mappings", &self.mappings).finish()
    }
}

/// The machine that takes turns with one of this setup, if any.
fn other(kvm_fd: &Kvm, setup: &Setup) -> Result<Option<Machine>, Failure> {
    if setup.payload != Payload::Laps || !matches!(setup.between, Between::OtherPage | Between::OtherSet) {
        return Ok(None);
    }
    // It rings before each lap, and never comes to the end of them.
    let endless = Setup { between: Between::Exit, operations: u64::MAX, ..setup.clone() };
    let machine = Machine::new(kvm_fd, &endless)?;
    if setup.between == Between::OtherPage {
        // One link, which leads back to itself.
        machine.write(DATA_ADDRESS, DATA)?;
        machine.write(1, PARAMS + std::mem::offset_of!(Params, pages) as u64)?;
    }
    Ok(Some(machine))
}

fn check(setup: &Setup) -> Result<(), Failure> {
    let wrong = |text: String| Err(Failure::Setup(text));
    if setup.place == Place::Native {
        return wrong("native code needs no machine".into());
    }
    if setup.payload == Payload::Laps && (setup.vcpus != 1 || setup.place != Place::Ring3) {
        return wrong("laps run on one vCPU, in ring 3, where the clock can be read".into());
    }
    if setup.place == Place::Ring3 && setup.payload.needs_ring_0() {
        return wrong(format!("{} uses instructions of ring 0", setup.payload));
    }
    if !(1..=MOST_VCPUS).contains(&setup.vcpus) {
        return wrong(format!("{} vCPUs; 1 to {MOST_VCPUS} are possible", setup.vcpus));
    }
    if !(1..=MOST_ROOTS).contains(&setup.roots) {
        return wrong(format!("{} roots; 1 to {MOST_ROOTS} are possible", setup.roots));
    }
    if setup.operations == 0 {
        return wrong("no operations".into());
    }
    if setup.data < Bytes::mib(2) || !setup.data.0.is_multiple_of(2 << 20) {
        return wrong(format!("{} of data; it must be a multiple of 2 MiB", setup.data));
    }
    if setup.data > Bytes::gib(64) {
        return wrong(format!("{} of data; 64 GiB are the most", setup.data));
    }
    Ok(())
}

/// The tables over one vCPU's window, as its payload wants to find them.
fn window(
    memory: &GuestMemoryMmap,
    tables: &mut Tables<'_>,
    root: GuestAddress,
    setup: &Setup,
    vcpu: u64,
) -> Result<(), Failure> {
    let address = WINDOW + vcpu * WINDOW_SIZE;
    let entry = tables.entry(root, address, 1)?;
    if matches!(setup.payload, Payload::DemandFault | Payload::MmapBatch) {
        return Ok(());
    }
    for page in 0..CHURN_PAGES {
        let frame = DATA + vcpu * setup.data.0 + page * 4096;
        let at = GuestAddress(entry.0 + page * 8);
        memory.write_obj(frame | tables::LEAF, at).map_err(memory_error)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::walk::Depth;
    use std::time::Instant;

    const LIMIT: Duration = Duration::from_secs(20);
    static GO_ON: AtomicBool = AtomicBool::new(false);

    fn kvm_fd() -> Option<Kvm> {
        Kvm::new().inspect_err(|e| eprintln!("not run: no usable /dev/kvm ({e})")).ok()
    }

    #[test]
    fn every_payload_runs_or_says_why_not() {
        let Some(kvm) = kvm_fd() else { return };
        for payload in Payload::ALL.into_iter().filter(|p| *p != Payload::Laps) {
            let setup = Setup { operations: 1024, ..Setup::usual(payload) };
            let result = Machine::new(&kvm, &setup).and_then(|m| m.run(1, LIMIT, &GO_ON));
            match result {
                Ok(rounds) => {
                    let round = &rounds[0];
                    println!(
                        "{payload}: {:?} ticks {:?} exits {:?}",
                        round.elapsed,
                        round.ticks,
                        round.vcpus.exits()
                    );
                    println!("   {:?}", round.vcpus.0.iter().filter(|(_, v)| **v > 0).collect::<Vec<_>>());
                    assert!(round.vcpus.get("exits").is_some_and(|n| n > 0));
                }
                Err(Failure::Emulator { offset, bytes }) => {
                    println!("{payload}: emulator {offset:#x} {bytes}")
                }
                Err(other) => panic!("{payload}: {other}"),
            }
        }
    }

    #[test]
    fn the_watchdog_ends_a_payload_that_hangs() {
        let Some(kvm) = kvm_fd() else { return };
        for place in [Place::Ring3, Place::Ring0] {
            let setup = Setup::usual(Payload::Hang).at(place);
            let begin = Instant::now();
            let machine = Machine::new(&kvm, &setup).expect("a machine");
            let result = machine.run(1, Duration::from_millis(300), &GO_ON);
            assert!(matches!(result, Err(Failure::Hung(_))), "{result:?}");
            assert!(begin.elapsed() < Duration::from_secs(10));
        }
    }

    #[test]
    fn our_walk_and_kvms_agree() {
        let Some(kvm) = kvm_fd() else { return };
        for guest_page in [PageSize::Size4K, PageSize::Size2M] {
            let setup = Setup { guest_page, ..Setup::usual(Payload::Churn) };
            let machine = Machine::new(&kvm, &setup).expect("a machine");
            for address in [0, CODE, WINDOW + 0x3123, DATA_ADDRESS + 0x12_3456, WINDOW + (1 << 30), 1 << 46] {
                let ours = tables::translate(machine.memory(), machine.root().0, Depth::Four, address);
                let theirs = machine.translate(address).expect("KVM_TRANSLATE");
                assert_eq!(ours.as_ref().ok().map(|t| t.physical), theirs, "{address:#x}: {ours:?}");
            }
        }
    }

    #[test]
    fn what_the_guest_stores_lies_where_our_walk_says() {
        let Some(kvm) = kvm_fd() else { return };
        for guest_page in [PageSize::Size4K, PageSize::Size2M] {
            let setup = Setup { guest_page, ..Setup::usual(Payload::ColdTouch) };
            let pages = setup.links();
            // Half of the pages only: the others must stay as they are.
            let half = Setup { operations: pages / 2, ..setup.clone() };
            let mut machine = Machine::new(&kvm, &half).expect("a machine");
            let (memory, root) = (machine.memory().clone(), machine.root().0);
            let seen = machine.drive(1, LIMIT, &GO_ON).map(|_| {
                (0..pages)
                    .map(|page| {
                        let address = DATA_ADDRESS + page * 4096;
                        let found = tables::translate(&memory, root, Depth::Four, address).expect("mapped");
                        memory.read_obj::<u8>(GuestAddress(found.physical)).expect("in memory")
                    })
                    .collect::<Vec<_>>()
            });
            let seen = seen.expect("it ran");
            assert!(seen[..half.operations as usize].iter().all(|b| *b == 1));
            assert!(seen[half.operations as usize..].iter().all(|b| *b == 0));
        }
    }

    #[test]
    fn laps_take_turns_with_another_machine() {
        let Some(kvm) = kvm_fd() else { return };
        for between in Between::ALL {
            let setup = Setup { between, ..Setup::usual(Payload::Laps) };
            let machine = Machine::new(&kvm, &setup).expect("a machine");
            let rounds = machine.run(2, LIMIT, &GO_ON).expect("it ran");
            let loads = setup.operations * setup.links();
            let each = rounds[1].ticks.expect("laps are timed") as f64 / loads as f64;
            println!("{}: {each} ticks a load", between.name());
            assert!(each > 0.5 && each < 1e6, "{each}");
        }
    }

    #[test]
    fn impossible_setups_are_refused() {
        let usual = Setup::usual(Payload::Churn);
        for setup in [
            usual.clone().at(Place::Native),
            usual.clone().at(Place::Ring3),
            Setup { vcpus: 0, ..usual.clone() },
            Setup { roots: 1 << 40, ..usual.clone() },
            Setup { data: Bytes(u64::MAX), ..usual.clone() },
            Setup { operations: 0, ..usual.clone() },
        ] {
            assert!(matches!(check(&setup), Err(Failure::Setup(_))), "{setup:?}");
        }
        assert!(check(&usual).is_ok());
    }
}
