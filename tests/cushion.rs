//! Stock guests without an agent that fill memory faster than a round comes: the cushion that is plugged for them
//! tells the balancer, and holds until more is plugged.

use std::time::{Duration, Instant};

use api::status::MemoryStatus;
use api::units::Bytes;
use guests::{Daemon, Host, Vm, VmSettings, images};
use lab::Kernel;

/// How long a step takes, with what the emulated host does for the other guests.
const MOVING: Duration = Duration::from_secs(40);
/// A small service, which may grow.
const SMALL: &str = "112M,min=88M,max=384M";
/// What it fills at a time, in MiB, at [`RATE`].
const LEAST: u64 = 40;
const MOST: u64 = 200;
/// MiB a second.
const RATE: u64 = 66;
/// What each guest keeps through all of it.
const KEPT: &str = "keep:8M:7";

fn guest(name: &str, kernel: Kernel) -> Vm {
    VmSettings::new(name, &images(kernel), SMALL, "ballast.console").with(&["--grow", "plug"]).start()
}

/// Numbers that look random and are the same each time (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn cushion(memory: &MemoryStatus) -> Bytes {
    memory.cushion.map_or(Bytes::ZERO, |cushion| cushion.size)
}

/// The guests together may have more than `budget` by what they took of their cushions, and no more.
fn check_budget(vms: &[Vm], budget: Bytes) {
    let all: Vec<MemoryStatus> = vms.iter().map(Vm::memory).collect();
    let held: Bytes = all.iter().filter_map(|memory| memory.host_rss).sum();
    let cushions: Bytes = all.iter().map(cushion).sum();
    assert!(held <= budget + cushions, "{held} of {budget}, with cushions of {cushions}: {all:#?}");
}

/// Has each guest in turn fill memory and give it back, `steps` times in all.
fn fill(vms: &mut [Vm], budget: Bytes, steps: u32, most_at_once: usize, random: &mut Random) {
    let mut full: Vec<usize> = Vec::new();
    for _ in 0..steps {
        let index = random.below(vms.len() as u64) as usize;
        if let Some(at) = full.iter().position(|other| *other == index) {
            full.remove(at);
            vms[index].step("release", MOVING);
            continue;
        }
        if full.len() == most_at_once {
            let first = full.remove(0);
            vms[first].step("release", MOVING);
        }
        let size = LEAST + random.below(MOST - LEAST);
        let began = Instant::now();
        vms[index].step(&format!("grow:{size}M:{}ms", size * 1000 / RATE), MOVING);
        full.push(index);
        let memory = vms[index].memory();
        println!(
            "{}: {size} MiB in {:?}: target {}, actual {}, {:?}",
            vms[index].name(),
            began.elapsed(),
            memory.target,
            memory.actual,
            memory.oom_deflate
        );
        check_budget(vms, budget);
    }
    for index in full {
        vms[index].step("release", MOVING);
    }
}

/// No process was killed, and what was kept is what it was.
fn end(mut vms: Vec<Vm>) {
    for vm in &mut vms {
        vm.step("check", MOVING);
        vm.type_in("end\n");
        vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
        assert_eq!(vm.wait_for_end(MOVING), 0);
    }
}

fn start(names: &[&str]) -> Vec<Vm> {
    let mut vms: Vec<Vm> = names
        .iter()
        .zip([Kernel::V6_1, Kernel::V6_12].into_iter().cycle())
        .map(|(name, kernel)| {
            let mut vm = guest(name, kernel);
            vm.wait_until_ready();
            vm
        })
        .collect();
    for vm in &mut vms {
        vm.wait_for_memory("its cushion", MOVING, |memory| {
            memory.cushion.is_some_and(|cushion| cushion.size > Bytes::ZERO && cushion.held == cushion.size)
        });
        vm.step(KEPT, MOVING);
    }
    vms
}

fn host() -> Host {
    Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12)
}

#[test]
fn guests_that_fill_memory_quickly_lose_no_process() {
    const BUDGET: Bytes = Bytes::mib(800);
    host().memory(Bytes::gib(3)).usually(Duration::from_secs(150)).run(|| {
        let mut vms = start(&["a", "b", "c"]);
        let daemon = Daemon::start(BUDGET);
        daemon.wait_for_rounds(2, vms.len(), MOVING);
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        fill(&mut vms, BUDGET, 12, 2, &mut random);
        let took: Bytes = vms.iter().map(|vm| vm.memory().counters.oom_deflated).sum();
        assert!(took > Bytes::ZERO, "nobody ever needed its cushion");
        end(vms);
    });
}

#[test]
#[ignore = "takes many minutes in the lab: make test-long"]
fn ten_guests_share_a_budget_through_deaths_of_the_daemon() {
    const BUDGET: Bytes = Bytes::mib(1300);
    host().memory(Bytes::gib(4)).cpus(2).usually(Duration::from_secs(900)).run(|| {
        let mut vms = start(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]);
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        for _ in 0..3 {
            let daemon = Daemon::start(BUDGET);
            daemon.wait_for_rounds(2, vms.len(), MOVING);
            // So many that the budget has room for all of them at their most.
            fill(&mut vms, BUDGET, 30, 2, &mut random);
            // SIGKILL.
            drop(daemon);
        }
        end(vms);
    });
}
