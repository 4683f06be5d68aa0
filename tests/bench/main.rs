//! `bench`: what a VM costs beside its guest, for ballast and QEMU microvm in the same run.
//!
//! It runs in the deterministic lab, where a nanosecond is an instruction, so noise can't touch it.

mod balloon;
mod idle;
mod start;
mod trace;
mod transport;
mod vm;

use std::collections::BTreeMap;
use std::fs;
use std::ops::DerefMut;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ::api::units::Bytes;
use anyhow::{Context, Result, ensure};
use guests::{Of, Printed, QemuSettings, Vm, qemu_with_libraries, sum};
use lab::{Emulator, Execution, Kernel, Terminal, inside};

use crate::trace::{Counts, FirstEntry};
use crate::vm::{Transport, guest};

/// The guest's first word, printed by its init before anything else.
const INIT: &str = "INIT";
/// Printed when it has loaded its modules.
const READY: &str = "READY linux=";
const CMDLINE: &str = "ballast.end=hang";
/// Several times what a run usually takes.
const LIMIT: Duration = Duration::from_secs(900);

/// What can be measured, each in an emulated host of its own. A benchmark is asked for by the first
/// word of its name, or by all of it; without a name all are run.
const RUNS: &[(&str, Run)] = &[
    ("boot", boot),
    ("start-6.1", || start::of(Kernel::V6_1)),
    ("start-6.12", || start::of(Kernel::V6_12)),
    ("start-generic", || start::of(Kernel::V6_1Generic)),
    ("idle", idle::idle),
    ("transport", transport::compare),
    ("balloon", balloon::zeroing),
    ("balloon-plain", balloon::plain),
    ("balloon-qemu", balloon::qemu_zeroing),
    ("balloon-qemu-plain", balloon::qemu_plain),
    ("plug", balloon::plug),
    ("reporting", balloon::reporting),
];
type Run = fn() -> Result<()>;

fn main() -> ExitCode {
    lab::progress::show();
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
        let is_of_balloons = ["balloon", "plug", "reporting"].iter().any(|known| is_meant(known, name));
        if is_of_balloons && !std::mem::replace(&mut explained, true) {
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
        execution: Execution::Counted,
        memory: Bytes::gib(3),
        guests: vec![match name {
            "start-6.12" => Kernel::V6_12,
            "start-generic" => Kernel::V6_1Generic,
            _ => Kernel::V6_1,
        }],
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

fn boot() -> Result<()> {
    let images = Kernel::V6_1.guest_images()?;
    let elf = images.elf.clone().context("6.1 has an ELF")?;
    // Once without looking: the first VMM pays for caches and entropy that the others find ready, and unpacks.
    measure(|| Box::new(guest(&images, "256M", CMDLINE, Transport::Mmio, &[]).start()))?;
    println!("256 MiB, 1 vCPU, Debian 6.1; V s: virtual seconds, 1e9 instructions each");
    print_heading();
    for transport in Transport::ALL {
        for (kernel, form) in [(&images.bzimage, "bzImage"), (&elf, "ELF")] {
            let settings = guest(&images, "256M", CMDLINE, transport, &[]).kernel(kernel);
            print(
                &format!("ballast, {}, {form}", transport.name()),
                &measure(|| Box::new(settings.start()))?,
            );
        }
    }
    let settings = guest(&images, "256M", CMDLINE, Transport::Pci, &[]).kernel(&elf).by_default();
    print("ballast's defaults, ELF", &measure(|| Box::new(settings.start()))?);
    let directory = tempfile::tempdir()?;
    let qemu = QemuSettings::new("bench", &images, Bytes::mib(256), CMDLINE, directory.path());
    let qemu = QemuSettings { printed: Printed::No, ..qemu };
    print("QEMU microvm, bzImage", &measure(|| qemu.start())?);
    Ok(())
}

/// What was measured of a VM.
struct Start {
    /// From its start to the first entry into its guest, in a run of its own.
    entry: Duration,
    /// To its guest's first word.
    init: Duration,
    /// Until that has loaded its modules.
    ready: Duration,
    /// What the processor did until then.
    counts: Counts,
    /// What the VM has then beside guest memory, and what of it no file backs.
    beside: [Bytes; 2],
}

fn measure<V: DerefMut<Target = Vm>>(start: impl Fn() -> V) -> Result<Start> {
    let entry = {
        let watch = FirstEntry::watch()?;
        let begun = trace::now();
        start().wait_until_ready();
        watch.time()?.saturating_sub(begun)
    };
    let begun = Instant::now();
    let mut vm = start();
    vm.wait_until_ready();
    let counts = Counts::read(vm.pid())?;
    let [init, ready] = [INIT, READY].map(|word| vm.heard(word).map(|at| at - begun).context(word));
    let smaps = vm.smaps();
    let beside = [Of::Rest, Of::Anonymous].map(|of| sum(&smaps, of, &["Private_Clean", "Private_Dirty"]));
    Ok(Start { entry, init: init?, ready: ready?, counts, beside })
}

fn print_heading() {
    println!(
        "                     exec to guest      to init   to modules loaded, exits, of it ports   private beside guest RAM   of it not backed by a file"
    );
}

fn print(name: &str, Start { entry, init, ready, counts, beside: [private, anonymous] }: &Start) {
    println!(
        "{name:<22} {:>8.4} V s {:>8.4} V s        {:>8.4} V s {:>6} {:>6}          {:>20}   {:>28}",
        entry.as_secs_f64(),
        init.as_secs_f64(),
        ready.as_secs_f64(),
        counts.exits,
        counts.ports,
        private.to_string(),
        anonymous.to_string(),
    );
}
