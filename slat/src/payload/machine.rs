//! The micro-VM: a few pages of memory, tables, one payload, no devices but a doorbell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use api::units::Bytes;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::code::Params;
use super::failure::{kvm, memory_error};
use super::layout::{
    CODE, DATA, DATA_ADDRESS, GDT, IDT, Layout, PARAMS, PARAMS_SIZE, STACK_SIZE, STACKS, data_size,
    low_memory,
};
use super::memory::{Backing, Mapping};
use super::vcpu::{Shared, Vcpu, collect, end, install_kick};
use super::{Between, Payload, Place, Setup};
use crate::counters::Counters;
use crate::host::KernelMemory;

pub use super::failure::Failure;
pub use super::vcpu::Round;

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
        setup.check()?;
        let (low, data) = (low_memory(setup), data_size(setup));
        let map = |size, backing| {
            Mapping::new(size, backing).map_err(|source| Failure::Memory { backing, size, source })
        };
        // A walk reads the guest's tables too, which lie there.
        let below = if setup.payload == Payload::Miss { setup.backing } else { Backing::Small };
        let mappings = vec![map(low, below)?, map(data, setup.backing)?];
        let populate = |mapping: &Mapping, backing| {
            let size = Bytes(mapping.size() as u64);
            mapping.populate().map_err(|source| Failure::Memory { backing, size, source })
        };
        populate(&mappings[0], below)?;
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
        let root = Layout { memory: &memory, setup }.fill()?;
        let mut machine =
            Self { vcpus: Vec::new(), vm, memory, setup: setup.clone(), root, mappings, before, other: None };
        machine.other = other(kvm_fd, setup)?.map(Box::new);
        machine.vcpus = (0..setup.vcpus).map(|i| machine.vcpu(kvm_fd, i)).collect::<Result<_, _>>()?;
        Ok(machine)
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
        let mut vcpus = Vec::new();
        for (id, fd) in std::mem::take(&mut self.vcpus).into_iter().enumerate() {
            vcpus.push(Vcpu {
                counters: Counters::open(&fd)?,
                machine: machine_counters.take(),
                fd,
                other: other.pop(),
                shared: Arc::clone(&shared),
                memory: self.memory.clone(),
                params: PARAMS + id as u64 * PARAMS_SIZE,
                ticks: self.setup.place == Place::Ring3,
                report: send.clone(),
            });
        }
        drop(send);
        let (mut threads, count) = (Vec::new(), vcpus.len());
        let started = vcpus.into_iter().try_for_each(|vcpu| {
            threads.push(std::thread::Builder::new().spawn(move || vcpu.run(rounds))?);
            Ok(())
        });
        let result = match started {
            Ok(()) => collect(&receive, rounds, count, limit, stop),
            Err(error) => Err(Failure::NoThread(error)),
        };
        shared.stop.store(true, Ordering::SeqCst);
        end(threads, &shared);
        let huge = self.mappings.last().and_then(Mapping::huge_share);
        result.map(|rounds| rounds.into_iter().map(|round| Round { huge, ..round }).collect())
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
        let layout = Layout { memory: &machine.memory, setup };
        layout.write(DATA_ADDRESS, DATA)?;
        layout.write(1, PARAMS + std::mem::offset_of!(Params, pages) as u64)?;
    }
    Ok(Some(machine))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::kvm_for_tests;
    use crate::payload::layout::WINDOW;
    use crate::payload::tables;
    use crate::walk::{Depth, PageSize};
    use std::time::Instant;
    use vm_memory::Bytes as _;

    const LIMIT: Duration = Duration::from_secs(20);
    static GO_ON: AtomicBool = AtomicBool::new(false);

    #[test]
    fn every_payload_runs_or_says_why_not() {
        let Some(kvm) = kvm_for_tests() else { return };
        for payload in Payload::ALL.into_iter().filter(|p| *p != Payload::Laps) {
            let usual = Setup::usual(payload);
            let setup = Setup { operations: usual.operations_given().unwrap_or(1024), ..usual };
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
        let Some(kvm) = kvm_for_tests() else { return };
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
        let Some(kvm) = kvm_for_tests() else { return };
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
        let Some(kvm) = kvm_for_tests() else { return };
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
        let Some(kvm) = kvm_for_tests() else { return };
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
}
