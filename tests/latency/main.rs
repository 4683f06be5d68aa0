//! `latency`: how long a guest in distress waits until it is granted memory, called for and polled.
//!
//! Four real guests in the deterministic lab, where a nanosecond is an instruction: how slow the
//! machine is that emulates all this does not show in any figure. That takes some ten minutes; with `--wall` the
//! emulated host goes by the machine's clock, and its slowness is in the figures: how long a guest takes to
//! answer a line on its console stands beside them.
//!
//! A spike counts from when tasks of its guest first waited for memory, as the guest's kernel says
//! (`/proc/pressure/memory`), until the balancer next raised its target. A spike in which nobody waited is
//! counted as such.

mod clock;
mod figures;
mod spikes;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use api::units::Bytes;
use clap::{Parser, ValueEnum};
use lab::{Emulator, Execution, Kernel, Terminal, inside};

use crate::figures::Samples;
use crate::spikes::GUESTS;

/// When to give up on one host.
const LIMIT: Duration = Duration::from_secs(3600);
/// Guests are told to do something every few seconds.
const SILENCE: Duration = Duration::from_secs(120);
/// So many hosts in a row may come to nothing.
const ATTEMPTS: u32 = 4;

/// How long a guest in distress waits until it is granted memory.
///
/// Four real guests in an emulated host take memory one after the other, under `ballast balancer`.
#[derive(Parser)]
#[command(name = "latency")]
struct Order {
    /// How the daemon learns of a guest's distress; both ways without this.
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// How often each guest takes memory.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Go by the machine's clock: the emulator's slowness is in the figures.
    #[arg(long)]
    wall: bool,
    /// Leave out so many spikes.
    #[arg(long, hide = true, default_value_t = 0)]
    skip: u32,
}

/// How the daemon learns of a guest's distress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// The guests run the agent, which calls.
    Called,
    /// They don't; the daemon asks once a second.
    Polled,
}

impl Mode {
    const fn name(self) -> &'static str {
        match self {
            Self::Called => "called",
            Self::Polled => "polled",
        }
    }
}

fn main() -> ExitCode {
    lab::progress::show();
    let order = Order::parse();
    let outcome = match order.mode {
        Some(mode) if inside() => {
            spikes::measure(mode, order.skip..order.spikes()).map(|()| ExitCode::SUCCESS)
        }
        _ => measure(&order),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("latency: {error:#}");
        ExitCode::FAILURE
    })
}

impl Order {
    /// Of each mode.
    const fn spikes(&self) -> u32 {
        self.rounds * GUESTS.len() as u32
    }
}

fn measure(order: &Order) -> Result<ExitCode> {
    let modes = order.mode.map_or(vec![Mode::Called, Mode::Polled], |mode| vec![mode]);
    let all: Vec<(Mode, Samples)> =
        modes.into_iter().map(|mode| Ok((mode, emulated(mode, order)?))).collect::<Result<_>>()?;
    let clock = if order.wall {
        "of the machine's time, the emulator's slowness included"
    } else {
        "of virtual time, 1e6 instructions each"
    };
    println!("\nfrom a guest's first wait for memory; milliseconds {clock}");
    println!("four guests on one processor; p99 is the worst where there are below 100");
    for (mode, samples) in &all {
        samples.print(mode.name());
    }
    let killed: u64 = all.iter().map(|(_, samples)| samples.oom_kills()).sum();
    println!("processes killed for lack of memory: {killed}");
    Ok(if killed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All spikes of a mode. A host that stands still (see [`Emulator::attempts`]) costs the spike that it was at:
/// the next one goes on with that.
fn emulated(mode: Mode, order: &Order) -> Result<Samples> {
    let mut host = Emulator {
        execution: if order.wall { Execution::Emulated } else { Execution::Counted },
        halt_polling: false,
        memory: Bytes::gib(4),
        guests: vec![Kernel::V6_1],
        terminal: Terminal::Output,
        limit: LIMIT,
        silence: SILENCE,
        attempts: ATTEMPTS,
        ..Emulator::default()
    };
    let program = std::env::current_exe()?;
    let mut samples = Samples::default();
    loop {
        let before = samples.len();
        let (rounds, skip) = (order.rounds.to_string(), before.to_string());
        let arguments = ["--mode", mode.name(), "--rounds", &rounds, "--skip", &skip];
        let attempt = host.attempt(&program, &arguments, || false)?;
        samples.read(&attempt.said);
        match attempt.code {
            Ok(code) => {
                ensure!(code == 0, "{} spikes ended with {code}", mode.name());
                return Ok(samples);
            }
            Err(why) if samples.len() == before && host.attempts <= 1 => bail!(why),
            Err(why) => eprintln!("{why}\nAnother host goes on."),
        }
        host = host.another();
        if samples.len() > before {
            host.attempts = ATTEMPTS;
        }
    }
}
