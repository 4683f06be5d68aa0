//! A guest whose memory is moved at random for a long time, by all means at once.
//!
//! Its seed is `BALLAST_SOAK_SEED`, its length `BALLAST_SOAK_SECONDS` of the
//! emulated host's time. What the guest keeps must survive; what the VM says
//! of its memory must agree with itself and with the host's kernel; nothing
//! may leak. Half of the events follow at once upon the last; before the other
//! half the guest rests, as guests mostly do, and reports what is free.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use api::status::{DriverState, MemoryStatus, Pauser, VmState};
use api::units::Bytes;
use guests::{Host, Vm, VmSettings, images};
use lab::Kernel;

const SEED: &str = "BALLAST_SOAK_SEED";
const SECONDS: &str = "BALLAST_SOAK_SECONDS";

const STARTUP: Bytes = Bytes::mib(256);
const MIN: Bytes = Bytes::mib(160);
const MAX: Bytes = Bytes::mib(768);
/// What the guest needs beside what its load takes.
const SYSTEM: Bytes = Bytes::mib(120);
/// How long anything here takes.
const MOVING: Duration = Duration::from_secs(60);
/// Resident memory comes in huge pages on the host.
const GRAIN: Bytes = Bytes::mib(8);
/// How long a guest rests at most. Linux reports pages 2 s after they were freed.
const REST: Duration = Duration::from_secs(40);

/// Numbers that look random and are the same for the same seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % limit
    }

    /// A whole number of pages.
    fn between(&mut self, least: Bytes, most: Bytes) -> Bytes {
        Bytes(least.0 + self.below(most.0 - least.0 + 1)).page_floor()
    }
}

/// What happens to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Target,
    Grow,
    Release,
    Keep,
    Forget,
    File,
    RunOut,
    ResetBalloon,
    ResetMem,
    Pause,
    Change,
}

/// As often as they stand here.
const EVENTS: &[Event] = &[
    Event::Target,
    Event::Target,
    Event::Target,
    Event::Target,
    Event::Grow,
    Event::Grow,
    Event::Release,
    Event::Keep,
    Event::Keep,
    Event::Forget,
    Event::File,
    Event::RunOut,
    Event::ResetBalloon,
    Event::ResetMem,
    Event::Pause,
    Event::Change,
];

struct Soak {
    vm: Vm,
    random: Random,
    /// What the guest's load holds, in pieces that it gives back at once.
    grown: Bytes,
    kept: Bytes,
    kills: u64,
    counts: BTreeMap<Event, u32>,
    rested: Duration,
    /// How often virtio-mem was really unbound: it can't always be.
    mem_resets: u32,
}

fn number(name: &str, default: u64) -> u64 {
    match env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => default,
    }
}

impl Soak {
    fn start(kernel: Kernel, arguments: &[&str], seed: u64) -> Self {
        let mut vm = VmSettings::new("soak", &images(kernel), "256M,min=160M,max=768M", "ballast.console")
            .with(arguments)
            .start();
        vm.wait_until_ready();
        let soak = Self {
            vm,
            random: Random(seed),
            grown: Bytes::ZERO,
            kept: Bytes::ZERO,
            kills: 0,
            counts: BTreeMap::new(),
            rested: Duration::ZERO,
            mem_resets: 0,
        };
        soak.wait_for_drivers();
        soak
    }

    fn wait_for_drivers(&self) -> MemoryStatus {
        self.vm.wait_for_memory("the drivers", MOVING, |memory| {
            let plugs = memory.plug.is_none_or(|plug| plug.driver == DriverState::Active);
            memory.driver == DriverState::Active && plugs && memory.report.is_some()
        })
    }

    /// What the guest could take at its present size.
    fn room(&self) -> Bytes {
        let used = SYSTEM + self.grown + self.kept;
        self.vm.memory().actual.saturating_sub(used)
    }

    fn set_target(&mut self, target: Bytes) {
        self.vm.set_target(target);
        let asked = self.vm.memory().target;
        assert!(target.saturating_sub(asked) < Bytes::mib(2) && asked <= target, "{asked} for {target}");
    }

    /// The guest has what it was asked to have.
    fn settle(&self) -> MemoryStatus {
        self.vm.wait_for_memory("the target", MOVING, |memory| memory.actual == memory.target)
    }

    fn size(&mut self, most: Bytes) -> Option<u64> {
        let most = most.min(self.room()).0 >> 20;
        (most >= 8).then(|| 4 + self.random.below(most - 7))
    }

    /// Every other time, nothing happens for a while.
    fn rest(&mut self) {
        if self.random.below(2) == 0 {
            return;
        }
        let time = Duration::from_millis(self.random.below(REST.as_millis() as u64));
        std::thread::sleep(time);
        self.rested += time;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Target => {
                let least = MIN.max(SYSTEM + self.grown + self.kept);
                let target = self.random.between(least.min(MAX), MAX);
                self.set_target(target);
                self.settle();
            }
            // The next change comes before the last one is done.
            Event::Change => {
                for _ in 0..3 {
                    let least = MIN.max(SYSTEM + self.grown + self.kept);
                    let target = self.random.between(least.min(MAX), MAX);
                    self.set_target(target);
                    std::thread::sleep(Duration::from_millis(self.random.below(400)));
                }
                self.settle();
            }
            Event::Grow => {
                if let Some(mib) = self.size(MAX) {
                    self.vm.step(&format!("grow:{mib}M"), MOVING);
                    self.grown += Bytes::mib(mib);
                }
            }
            Event::Release => {
                self.vm.step("release", MOVING);
                self.grown = Bytes::ZERO;
            }
            Event::Keep => {
                if let Some(mib) = self.size(Bytes::mib(64)) {
                    let seed = self.random.below(1 << 20);
                    self.vm.step(&format!("keep:{mib}M:{seed}"), MOVING);
                    self.kept += Bytes::mib(mib);
                }
            }
            Event::Forget => {
                self.vm.step("check", MOVING);
                self.vm.step("forget", MOVING);
                self.kept = Bytes::ZERO;
            }
            Event::File => {
                if let Some(mib) = self.size(Bytes::mib(64)) {
                    self.vm.step(&format!("file:{mib}M"), MOVING);
                    self.vm.step("remove", MOVING);
                }
            }
            Event::RunOut => {
                self.vm.step("hog", MOVING);
                self.kills += 1;
                // The balloon let go of what the guest needed; a new target has it inflate again.
                let target = self.vm.memory().target;
                self.set_target(MAX);
                self.set_target(target);
            }
            Event::ResetBalloon => {
                self.vm.step("unbind:virtio_balloon", MOVING);
                self.vm.wait_for_memory("the balloon to be gone", MOVING, |memory| {
                    memory.driver == DriverState::Absent
                });
                self.vm.step("bind:virtio_balloon", MOVING);
                self.wait_for_drivers();
            }
            Event::ResetMem => self.reset_mem(),
            Event::Pause => {
                self.vm.ask(async |client| client.pause().await).expect("it can be paused");
                assert_eq!(self.vm.status().state, VmState::Paused { by: Pauser::Operator });
                let target = self.random.between(STARTUP.max(SYSTEM + self.grown + self.kept).min(MAX), MAX);
                self.set_target(target);
                std::thread::sleep(Duration::from_millis(self.random.below(2000)));
                self.vm.ask(async |client| client.resume().await).expect("it can go on");
                self.settle();
            }
        }
    }

    /// Linux gives the device up for good where it has left memory blocks behind, be they
    /// empty: its driver warns, keeps the region, and can't be bound again.
    fn reset_mem(&mut self) {
        if self.vm.memory().plug.is_none() || SYSTEM + self.grown + self.kept > STARTUP {
            return;
        }
        self.set_target(STARTUP);
        let memory = self.settle();
        if memory.plug.is_some_and(|plug| plug.plugged > Bytes::ZERO) {
            return;
        }
        self.vm.type_in("plugged\n");
        let places = self.vm.wait_for_line("PLUGGED places=", MOVING);
        self.vm.wait_for_line("DONE plugged", MOVING);
        if !places.ends_with("=0") {
            return;
        }
        self.vm.step("unbind:virtio_mem", MOVING);
        self.vm.wait_for_memory("virtio-mem to be gone", MOVING, |memory| {
            memory.plug.is_some_and(|plug| plug.driver == DriverState::Absent)
        });
        self.vm.step("bind:virtio_mem", MOVING);
        self.mem_resets += 1;
        self.wait_for_drivers();
    }

    /// What the VM says agrees with itself, with the host's kernel and with what the guest kept.
    fn assert_books(&mut self) {
        self.vm.step("check", MOVING);
        // What the host holds is counted every two seconds at most.
        let least = self.grown + self.kept;
        let memory = self.vm.wait_for_memory("the host's memory to follow the guest's", MOVING, |memory| {
            let fits = memory.host_rss.unwrap() <= memory.actual + GRAIN && memory.host_rss.unwrap() >= least;
            memory.actual == memory.target && fits
        });
        let held = memory.actual;
        if let Some(plug) = memory.plug {
            let counters = plug.counters;
            assert_eq!(counters.plugged - counters.unplugged, plug.plugged, "{memory:#?}");
            assert_eq!((counters.refused, counters.discard_failures, counters.malformed), (0, 0, 0));
            assert!(plug.plugged.0.is_multiple_of(plug.block.0), "{memory:#?}");
            assert!(held <= plug.boot + plug.plugged, "{memory:#?}");
        }
        assert_eq!((memory.counters.discard_failures, memory.counters.malformed), (0, 0), "{memory:#?}");
    }

    /// Threads and files, the fewest in some looks: who counts the guest's memory has a file open meanwhile.
    fn handles(&self) -> (usize, usize) {
        let count =
            |of: &str| fs::read_dir(format!("/proc/{}/{of}", self.vm.pid())).expect("it runs").count();
        let fewest = |of: &str| {
            let looks = (0..20).map(|_| {
                thread::sleep(Duration::from_millis(10));
                count(of)
            });
            looks.min().unwrap_or_default()
        };
        (fewest("task"), fewest("fd"))
    }

    /// Private memory of the process beside the guest's: what its heap and stacks take.
    fn beside(&self) -> Bytes {
        let status = fs::read_to_string(format!("/proc/{}/status", self.vm.pid())).expect("it runs");
        let kib = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
        let all = Bytes::kib(kib.and_then(|kib| kib.trim().parse().ok()).expect("a size"));
        all.saturating_sub(self.vm.memory().host_rss.unwrap())
    }

    fn run(mut self, time: Duration) {
        let start = Instant::now();
        self.assert_books();
        let (handles, beside) = (self.handles(), self.beside());
        let mut rounds = 0;
        while start.elapsed() < time {
            self.rest();
            let event = EVENTS[self.random.below(EVENTS.len() as u64) as usize];
            *self.counts.entry(event).or_default() += 1;
            let before = start.elapsed();
            self.happen(event);
            self.assert_books();
            rounds += 1;
            let memory = self.vm.memory();
            println!(
                "SOAK {rounds} at {:.1} s: {event:?} took {:.1} s; target {} actual {} plugged {} rss {}, grown {} kept {}",
                start.elapsed().as_secs_f64(),
                (start.elapsed() - before).as_secs_f64(),
                memory.target,
                memory.actual,
                memory.plug.map_or(Bytes::ZERO, |plug| plug.plugged),
                memory.host_rss.unwrap(),
                self.grown,
                self.kept,
            );
        }
        assert_eq!(self.handles(), handles, "threads or files leak");
        let grown = self.beside().saturating_sub(beside);
        assert!(grown <= GRAIN, "the process grew by {grown} beside its guest");
        let counters = self.vm.memory().counters;
        let rested = self.rested >= REST;
        assert!(!rested || counters.reported > Bytes::ZERO, "a guest at rest reports: {counters:#?}");
        self.vm.type_in("end\n");
        self.vm.wait_for_line(&format!("SUMMARY oom_kills={}", self.kills), MOVING);
        let took = start.elapsed().as_secs_f64();
        println!(
            "SOAK END {rounds} rounds in {took:.0} s, {:.0} s of them at rest",
            self.rested.as_secs_f64()
        );
        println!("SOAK END {:?}, {} of virtio-mem done; {counters:#?}", self.counts, self.mem_resets);
    }
}

fn soak(kernel: Kernel, arguments: &[&str]) {
    let seed = number(SEED, 1);
    let time = Duration::from_secs(number(SECONDS, 60));
    println!("SOAK seed {seed}, {time:?}, {arguments:?}");
    Soak::start(kernel, arguments, seed).run(time);
}

fn host() -> Host {
    let limit = Duration::from_secs(120 + number(SECONDS, 60));
    Host::new().deterministic().without_halt_polling().with_variables(&[SEED, SECONDS]).usually(limit)
}

#[test]
fn memory_that_is_plugged_survives_all_that_happens() {
    host().guest(Kernel::V6_12).run(|| soak(Kernel::V6_12, &["--grow", "plug"]));
}

#[test]
fn memory_that_is_ballooned_survives_all_that_happens() {
    host().guest(Kernel::V6_1).run(|| soak(Kernel::V6_1, &["--grow", "balloon"]));
}
