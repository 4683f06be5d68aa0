//! `bench`: what a VM costs beside its guest, for ballast and QEMU microvm in the same run.
//!
//! It runs in the deterministic lab, where a nanosecond is an instruction, so noise can't touch it.

mod balloon;
mod memory;
mod trace;
mod vm;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ::api::units::Bytes;
use anyhow::{Context, Result, bail, ensure};
use lab::emulator::{Emulator, Terminal};
use lab::{GuestImages, Kernel, inside, qemu_with_libraries};

use crate::memory::Beside;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// The guest's first word, printed by its init before anything else.
const INIT: &str = "INIT";
/// Printed when it has loaded its modules.
const READY: &str = "READY";
const CMDLINE: &str = "console=ttyS0 reboot=t panic=-1 quiet ballast.end=hang";
/// Several times what a run usually takes.
const LIMIT: Duration = Duration::from_secs(900);

/// What can be measured, each in an emulated host of its own. A benchmark is asked for by the first
/// word of its name, or by all of it; without a name all are run.
const RUNS: &[(&str, Run)] = &[
    ("boot", boot),
    ("balloon", balloon::zeroing),
    ("balloon-plain", balloon::plain),
    ("balloon-qemu", balloon::qemu_zeroing),
    ("balloon-qemu-plain", balloon::qemu_plain),
    ("plug", balloon::plug),
    ("reporting", balloon::reporting),
];
type Run = fn() -> Result<()>;

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    if let Some(name) = names.iter().find(|name| RUNS.iter().all(|(known, _)| !is_meant(name, known))) {
        let known: Vec<&str> = RUNS.iter().map(|(name, _)| *name).collect();
        eprintln!("bench: `{name}` is no benchmark: use {}, or none for all of them", known.join(", "));
        return ExitCode::from(2);
    }
    let done = if inside() {
        RUNS.iter()
            .filter(|(name, _)| names.iter().any(|wanted| wanted == name))
            .try_for_each(|(_, run)| run())
    } else {
        emulated(&names)
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether `wanted` asks for the run `name`.
fn is_meant(wanted: &str, name: &str) -> bool {
    name.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// Each run alone, so that one that fails leaves the others' figures standing.
fn emulated(names: &[String]) -> Result<()> {
    let mut failed = Vec::new();
    let mut explained = false;
    for (name, _) in RUNS {
        if !names.is_empty() && !names.iter().any(|wanted| is_meant(wanted, name)) {
            continue;
        }
        if *name != "boot" && !std::mem::replace(&mut explained, true) {
            println!("{}", balloon::HEADING);
        }
        if let Err(error) = emulate(name) {
            eprintln!("bench: {name}: {error:#}");
            failed.push(*name);
        }
    }
    ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

fn emulate(name: &str) -> Result<()> {
    let emulator = Emulator {
        deterministic: true,
        memory: Bytes::gib(3),
        guests: vec![Kernel::V6_1],
        files: qemu_with_libraries()?,
        bring: if ["balloon", "plug"].contains(&name) {
            vec![PathBuf::from(balloon::SPEEDS)]
        } else {
            Vec::new()
        },
        terminal: Terminal::Output,
        limit: LIMIT,
        attempts: 2,
        ..Emulator::default()
    };
    let program = std::env::current_exe()?;
    let outcome = emulator.run(&program, &[name])?;
    ensure!(outcome.code == 0, "it ended with {}", outcome.code);
    if let Some(speeds) = outcome.results.get(balloon::SPEEDS) {
        add_speeds(Path::new("out/speeds.json"), speeds)?;
        println!("for the simulator: ballast sim --speeds out/speeds.json");
    }
    Ok(())
}

/// Adds a run's speeds to what other runs have left in `file`.
fn add_speeds(file: &Path, speeds: &[u8]) -> Result<()> {
    let read = |text: &[u8]| serde_json::from_slice::<BTreeMap<String, u64>>(text);
    // What makes no sense is written anew.
    let mut all = fs::read(file).ok().and_then(|text| read(&text).ok()).unwrap_or_default();
    all.extend(read(speeds)?);
    file.parent().map_or(Ok(()), fs::create_dir_all)?;
    Ok(fs::write(file, serde_json::to_vec_pretty(&all)?)?)
}

/// What was measured of one VM.
struct Measured {
    init: Duration,
    ready: Duration,
    beside: Beside,
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
