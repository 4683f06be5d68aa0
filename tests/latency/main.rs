//! `latency`: how long a guest in distress waits until it is granted memory, called for and polled.
//!
//! Four real guests in the deterministic lab, where a nanosecond is an instruction: how slow the
//! machine is that emulates all this does not show in any figure. That takes a quarter of an hour; with
//! `wall` the emulated host goes by the machine's clock, and its slowness is in the figures: how long a
//! guest takes to answer a line on its console stands beside them.
//!
//! A spike counts from when tasks of its guest first waited for memory, as the guest's kernel says
//! (`/proc/pressure/memory`), until the balancer next raised its target. A spike in which nobody waited is
//! counted as such.

mod clock;
mod daemon;
mod figures;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use balloon::units::Bytes;
use lab::emulator::{Emulator, Terminal};
use lab::{Kernel, Vm, VmSettings, inside, wait_looking_every};

use crate::clock::Offset;
use crate::daemon::Daemon;
use crate::figures::{Answer, Sample, Samples};

const GUESTS: [&str; 4] = ["a", "b", "c", "d"];
/// What each guest has before its spike: little more than the 70 MiB or so that it uses, so that it is short
/// soon after a spike has begun and not only after the balancer has looked at it.
const STARTUP: Bytes = Bytes::mib(128);
const LIMITS: &str = "128M,min=96M,max=448M";
/// There is memory for one spike at a time.
const BUDGET: &str = "960M";
/// Over three seconds, and mostly over half a one, the balancer was seen to grant before anyone had to wait.
const SPIKE: &str = "spike:200M:100ms";
/// Spikes of each guest in each mode.
const ROUNDS: usize = 3;
/// A guest that waits is granted something within so many rounds of the daemon, or never: the first may have
/// begun before the wait.
const ENOUGH_ROUNDS: u64 = 3;
/// How often it is looked whether a guest has its memory. Each look costs the processor that all share about 1 ms.
const LOOK: Duration = Duration::from_millis(10);
/// Waits give up after ten times this.
const USUALLY: Duration = Duration::from_secs(60);
const LIMIT: Duration = Duration::from_secs(7200);

/// How the daemon learns of a guest's distress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The guests run the agent.
    Called,
    /// They don't; the daemon asks once a second.
    Polled,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Called => "called",
            Self::Polled => "polled",
        }
    }
}

fn main() -> ExitCode {
    let outcome =
        Order::from_arguments().and_then(|order| if inside() { measure(&order) } else { emulated(&order) });
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("latency: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn emulated(order: &Order) -> Result<ExitCode> {
    let emulator = Emulator {
        deterministic: !order.wall,
        memory: Bytes::gib(4),
        guests: vec![Kernel::V6_1],
        terminal: Terminal::Output,
        limit: LIMIT,
        ..Emulator::default()
    };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = emulator.run(&std::env::current_exe()?, &arguments)?;
    Ok(ExitCode::from(u8::try_from(outcome.code).unwrap_or(u8::MAX)))
}

/// What is measured.
struct Order {
    rounds: usize,
    modes: Vec<Mode>,
    wall: bool,
}

impl Order {
    fn from_arguments() -> Result<Self> {
        let mut order = Self { rounds: ROUNDS, modes: vec![Mode::Called, Mode::Polled], wall: false };
        for argument in std::env::args().skip(1) {
            match argument.as_str() {
                "called" => order.modes = vec![Mode::Called],
                "polled" => order.modes = vec![Mode::Polled],
                "wall" => order.wall = true,
                number => {
                    order.rounds = number.parse().with_context(|| {
                        format!("`{number}` is no number of spikes, nor `called`, `polled` or `wall`")
                    })?;
                }
            }
        }
        Ok(order)
    }
}

fn measure(order: &Order) -> Result<ExitCode> {
    let rounds = order.rounds;
    let all: Vec<Samples> = order.modes.iter().map(|mode| run(*mode, rounds)).collect::<Result<_>>()?;
    let clock = if order.wall {
        "of the machine's time, the emulator's slowness included"
    } else {
        "of virtual time, 1e6 instructions each"
    };
    println!("\nfrom a guest's first wait for memory; milliseconds {clock}");
    println!(
        "four guests on one processor, {rounds} spikes each; p99 is the worst where there are below 100"
    );
    for (mode, samples) in order.modes.iter().zip(&all) {
        samples.print(mode.name());
    }
    let killed: u64 = all.iter().map(|samples| samples.oom_kills).sum();
    println!("processes killed for lack of memory: {killed}");
    Ok(if killed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run(mode: Mode, rounds: usize) -> Result<Samples> {
    let images = Kernel::V6_1.guest_images();
    // One after the other: four that boot at once on one processor take four times as long each.
    let mut vms: Vec<Vm> = GUESTS
        .iter()
        .map(|name| {
            let settings = VmSettings::new(name, &images, LIMITS, "ballast.console");
            let settings = if mode == Mode::Called { settings.agent(&images) } else { settings };
            let mut vm = settings.start();
            vm.wait_until_ready();
            vm
        })
        .collect();
    let mut samples = Samples::default();
    for round in 0..rounds {
        for index in 0..vms.len() {
            settle(&vms);
            // Each at another moment between two rounds of the daemon.
            let phase = Duration::from_millis(((round * vms.len() + index) * 370 % 1000) as u64);
            samples.add(spike(mode, &mut vms[index], phase)?);
        }
    }
    for mut vm in vms {
        vm.type_in("end\n");
        let summary = vm.wait_for_line("SUMMARY oom_kills=", USUALLY);
        let kills = summary.rsplit('=').next().and_then(|kills| kills.parse::<u64>().ok());
        samples.oom_kills += kills.context("the guest counts what was killed")?;
        vm.wait_for_end(USUALLY);
    }
    Ok(samples)
}

/// Every guest has its startup memory again. No daemon runs, so that the next one knows nothing. A guest that
/// got no time of a busy machine seems to have no memory to give, and is asked again.
fn settle(vms: &[Vm]) {
    for vm in vms {
        vm.set_target(STARTUP);
    }
    for vm in vms {
        vm.wait_for_memory("the guest to settle", USUALLY, |memory| {
            if memory.settled && memory.actual > STARTUP {
                vm.set_target(STARTUP);
            }
            memory.actual <= STARTUP
        });
    }
}

fn spike(mode: Mode, vm: &mut Vm, phase: Duration) -> Result<Sample> {
    let offset = Offset::measure(vm, USUALLY)?;
    let daemon = Daemon::start(BUDGET, &GUESTS)?;
    daemon.wait_for_rounds(2, USUALLY);
    std::thread::sleep(phase);
    let before = vm.memory().actual;
    let typed = Instant::now();
    vm.type_in(&format!("{SPIKE}\n"));
    let (called, has) = watch(vm, &daemon, typed, before);
    let line = vm.wait_for_line("SPIKE onset_us=", USUALLY);
    vm.wait_for_line("DONE spike", USUALLY);
    let onset = offset.host_time(clock::number(&line, "onset_us="));
    let grants = daemon.grants(vm.name(), typed);
    vm.step("release", USUALLY);
    let waited = Duration::from_micros(clock::number(&line, "waited_us=").unwrap_or(0));
    let called = called.filter(|called| onset.is_some_and(|onset| *called + offset.doubt() >= onset));
    Ok(Sample { mode, answer: Answer::of(onset, &grants), called, has, waited, doubt: offset.doubt() })
}

/// Looks on until the spike is over, and long enough after it for the daemon to have seen it: when the VM heard
/// its guest's call, as of the first grant, and when the guest had half of that grant.
fn watch(vm: &Vm, daemon: &Daemon, typed: Instant, before: Bytes) -> (Option<Instant>, Option<Instant>) {
    let (mut called, mut enough, mut has, mut last_round) = (None, None, None, None);
    wait_looking_every(LOOK, "the end of a spike", USUALLY, || {
        if enough.is_none() && !daemon.grants(vm.name(), typed).is_empty() {
            let memory = vm.memory();
            let age = memory.agent.and_then(|agent| agent.distress_age_ms);
            called = age.and_then(|age| Instant::now().checked_sub(Duration::from_millis(age)));
            enough = Some(before + Bytes(memory.target.saturating_sub(before).0 / 2));
        }
        if has.is_none() && enough.is_some_and(|enough| vm.memory().actual >= enough) {
            has = Some(Instant::now());
        }
        let line = vm.line("SPIKE onset_us=")?;
        vm.line("DONE spike")?;
        if enough.is_some() {
            return has.map(drop);
        }
        // Nobody waited, so nobody need be granted anything.
        if clock::number(&line, "onset_us=").is_none() {
            return Some(());
        }
        let last = *last_round.get_or_insert_with(|| daemon.rounds(USUALLY).saturating_add(ENOUGH_ROUNDS));
        (daemon.rounds(USUALLY) >= last).then_some(())
    });
    (called, has)
}
