//! `latency`: how long a guest in distress waits until it is granted memory, called for and polled.
//!
//! Four real guests in the deterministic lab, where a nanosecond is an instruction: how slow the
//! machine is that emulates all this does not show in any figure. That takes hours on a busy machine;
//! with `wall` the emulated host goes by the machine's clock, and its slowness is in the figures:
//! how long a guest takes to answer a line on its console stands beside them.

mod clock;
mod daemon;
mod figures;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use balloon::units::Bytes;
use lab::emulator::{Emulator, Terminal};
use lab::{Kernel, Vm, VmSettings, inside, wait_for};

use crate::clock::Offset;
use crate::daemon::Daemon;
use crate::figures::{Sample, Samples};

const GUESTS: [&str; 4] = ["a", "b", "c", "d"];
/// What each guest has before its spike; far more than it uses.
const STARTUP: Bytes = Bytes::mib(208);
const LIMITS: &str = "208M,min=160M,max=448M";
/// There is memory for one spike at a time.
const BUDGET: &str = "1088M";
/// More than a guest has, in a time in which a polled guest is in distress before it is looked at:
/// over three seconds, and mostly over half a one, the balancer was seen to grant before anyone had to wait.
const SPIKE: &str = "spike:200M:100ms";
/// Spikes of each guest in each mode.
const ROUNDS: usize = 5;
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
    println!("four guests on one processor, {rounds} spikes each; p99 is the worst of them");
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

/// Every guest has its startup memory again. No daemon runs, so that the next one knows nothing.
fn settle(vms: &[Vm]) {
    for vm in vms {
        vm.set_target(STARTUP);
    }
    for vm in vms {
        vm.wait_for_memory("the guest to settle", USUALLY, |memory| memory.actual <= STARTUP);
    }
}

fn spike(mode: Mode, vm: &mut Vm, phase: Duration) -> Result<Sample> {
    let offset = Offset::measure(vm, USUALLY)?;
    let daemon = Daemon::start(BUDGET, &GUESTS)?;
    daemon.wait_for_rounds(2, USUALLY);
    std::thread::sleep(phase);
    let before = vm.memory();
    let typed = Instant::now();
    vm.type_in(&format!("{SPIKE}\n"));
    let name = vm.name().to_owned();
    wait_for("a grant", USUALLY, || daemon.grants(&name, typed).first().copied());
    let target = vm.memory().target;
    let called = vm
        .memory()
        .agent
        .and_then(|agent| Some(Instant::now() - Duration::from_millis(agent.distress_age_ms?)));
    let enough = before.actual + Bytes((target.0 - before.actual.0) / 2);
    let mut has = Instant::now();
    vm.wait_for_memory("the granted memory", USUALLY, |memory| {
        has = Instant::now();
        memory.actual >= enough
    });
    let line = vm.wait_for_line("SPIKE onset_us=", USUALLY);
    vm.wait_for_line("DONE spike", USUALLY);
    let grants = daemon.grants(&name, typed);
    vm.step("release", USUALLY);
    let onset = offset.host_time(clock::number(&line, "onset_us="));
    Ok(Sample { mode, onset, called, granted: answer(onset, &grants), has, doubt: offset.doubt() })
}

/// The grant that answers a guest's wait: the first that follows its beginning, or the last one of
/// all, on which the guest lived, where none had to follow.
fn answer(onset: Option<Instant>, grants: &[Instant]) -> Option<Instant> {
    let follows = grants.iter().find(|grant| onset.is_none_or(|onset| **grant >= onset));
    follows.or(grants.last()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_answered_by_the_grant_that_follows_it() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let grants = [at(1), at(3), at(5)];
        assert_eq!(answer(Some(at(2)), &grants), Some(at(3)));
        assert_eq!(answer(Some(at(6)), &grants), Some(at(5)));
        assert_eq!(answer(None, &grants), Some(at(1)));
        assert_eq!(answer(Some(at(1)), &[]), None);
    }
}
