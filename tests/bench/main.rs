//! `bench`: what a VM costs beside its guest, for ballast and QEMU microvm in the same run.
//!
//! It runs in the deterministic lab, where a nanosecond is an instruction, so noise can't touch it.

mod balloon;
mod memory;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ::balloon::units::Bytes;
use anyhow::{Context, Result, bail};
use lab::emulator::{Emulator, Terminal};
use lab::{GuestImages, Kernel, inside, qemu_with_libraries};

use crate::memory::Beside;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// The guest's first word, printed by its init before anything else.
const INIT: &str = "INIT";
/// Printed when it has loaded its modules.
const READY: &str = "READY";
const CMDLINE: &str = "console=ttyS0 reboot=t panic=-1 quiet ballast.end=hang";
/// Ten times what it usually takes: virtual time stands still for minutes now and then.
const LIMIT: Duration = Duration::from_secs(3000);

/// What can be measured, by the words that name it on the command line; with none, all of it.
const BENCHMARKS: &[(&str, Benchmark)] = &[("boot", boot), ("balloon", balloon)];
type Benchmark = fn() -> Result<()>;

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    if let Some(name) = names.iter().find(|name| BENCHMARKS.iter().all(|(known, _)| known != name)) {
        eprintln!("bench: `{name}` is no benchmark: use boot, balloon, or none for all of them");
        return ExitCode::from(2);
    }
    match if inside() { measure(&names) } else { emulated(&names) } {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn emulated(names: &[String]) -> Result<ExitCode> {
    let emulator = Emulator {
        deterministic: true,
        memory: Bytes::gib(3),
        guests: vec![Kernel::V6_1],
        files: qemu_with_libraries()?,
        bring: if wanted(names, "balloon") { vec![PathBuf::from(balloon::SPEEDS)] } else { Vec::new() },
        terminal: Terminal::Output,
        limit: LIMIT,
        ..Emulator::default()
    };
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let outcome = emulator.run(&std::env::current_exe()?, &names)?;
    if let Some(speeds) = outcome.results.get(balloon::SPEEDS) {
        fs::create_dir_all("out")?;
        fs::write("out/speeds.json", speeds)?;
        println!("\nfor the simulator: ballast sim --speeds out/speeds.json");
    }
    Ok(ExitCode::from(u8::try_from(outcome.code).unwrap_or(u8::MAX)))
}

/// What was measured of one VM.
struct Measured {
    init: Duration,
    ready: Duration,
    beside: Beside,
}

fn measure(names: &[String]) -> Result<ExitCode> {
    for (name, benchmark) in BENCHMARKS {
        if wanted(names, name) {
            benchmark().with_context(|| (*name).to_owned())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether `name` was asked for, by name or with all others.
fn wanted(names: &[String], name: &str) -> bool {
    names.is_empty() || names.iter().any(|wanted| wanted == name)
}

fn balloon() -> Result<()> {
    balloon::compare(&Kernel::V6_1.guest_images())
}

fn boot() -> Result<()> {
    let images = Kernel::V6_1.guest_images();
    // Once without looking: the first VMM pays for caches and entropy that the others find ready.
    run(ballast(&images))?;
    println!("256 MiB, 1 vCPU, Debian 6.1 as bzImage; V s: virtual seconds, 1e9 instructions each");
    println!(
        "              exec to init   to modules loaded   private beside guest RAM   of it not backed by a file"
    );
    for (name, command) in [("ballast", ballast(&images)), ("QEMU microvm", microvm(&images))] {
        let measured = run(command).with_context(|| name.to_owned())?;
        println!(
            "{name:<12}  {:>8.4} V s   {:>11.4} V s     {:>20}   {:>28}",
            measured.init.as_secs_f64(),
            measured.ready.as_secs_f64(),
            measured.beside.private.to_string(),
            measured.beside.anonymous.to_string(),
        );
    }
    Ok(())
}

fn ballast(images: &GuestImages) -> Command {
    let mut command = Command::new(lab::ballast());
    command.args(["run", "--name", "bench", "--memory", "256M", "--cmdline", CMDLINE]);
    with_images(command, images, "--kernel", "--initrd")
}

fn microvm(images: &GuestImages) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-M", "microvm,accel=kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-serial", "stdio", "-no-reboot", "-append", CMDLINE]);
    with_images(command, images, "-kernel", "-initrd")
}

fn with_images(mut command: Command, images: &GuestImages, kernel: &str, initrd: &str) -> Command {
    // Not the ELF: under QEMU's PVH entry it dies of a divide error with the first timer interrupt,
    // in this emulated host alone.
    command.arg(kernel).arg(&images.bzimage).arg(initrd).arg(&images.initrd);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

fn run(mut command: Command) -> Result<Measured> {
    let start = Instant::now();
    let mut child = command.spawn().context("can't be started")?;
    let measured = watch(&mut child, start);
    child.kill()?;
    child.wait()?;
    measured
}

fn watch(child: &mut Child, start: Instant) -> Result<Measured> {
    let mut console = BufReader::new(child.stdout.take().context("its output is piped")?);
    let init = wait_for(&mut console, INIT, start)?;
    let ready = wait_for(&mut console, READY, start)?;
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", child.id()))?;
    Ok(Measured { init, ready, beside: memory::beside_guest(&smaps) })
}

fn wait_for(console: &mut impl BufRead, word: &str, start: Instant) -> Result<Duration> {
    let (mut line, mut said) = (Vec::new(), String::new());
    while console.read_until(b'\n', &mut line)? > 0 {
        if line.starts_with(word.as_bytes()) {
            return Ok(start.elapsed());
        }
        said.push_str(&String::from_utf8_lossy(&line));
        line.clear();
    }
    bail!("it ended before its guest said {word}; it said:\n{said}")
}
