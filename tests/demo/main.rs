//! `demo`: three guests whose demands rise and fall in turn share a host that is too small for all peaks.
//!
//! On a host whose KVM can't boot stock kernels it starts itself anew in an emulated one.

mod history;
mod plot;
mod scenario;
mod summary;
mod view;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use api::units::Bytes;
use lab::{Emulator, Kernel, Terminal, inside};

/// Set for the demo in an emulated host: whether the real output is a terminal.
const TERMINAL: &str = "BALLAST_DEMO_TERMINAL";
/// Where it writes in an emulated host.
const OUT_INSIDE: &str = "/out";
/// When an emulated host is given up; the demo usually takes about three minutes.
const LIMIT: Duration = Duration::from_secs(1500);

fn main() -> ExitCode {
    lab::progress::show();
    let outcome = if inside() || guests::kvm_boots_stock_kernels() { here() } else { emulated() };
    outcome.unwrap_or_else(|error| {
        eprintln!("demo: {error:#}");
        ExitCode::FAILURE
    })
}

fn terminal() -> bool {
    match std::env::var(TERMINAL) {
        Ok(value) => value == "1",
        Err(_) => std::io::IsTerminal::is_terminal(&std::io::stdout()),
    }
}

fn emulated() -> Result<ExitCode> {
    println!("This machine's KVM can't boot stock kernels: the demo runs in an emulated host.");
    let emulator = Emulator {
        memory: Bytes::gib(3),
        guests: vec![Kernel::V6_1],
        bring: vec![PathBuf::from(OUT_INSIDE)],
        environment: vec![(TERMINAL.to_owned(), u8::from(terminal()).to_string())],
        terminal: Terminal::Output,
        limit: LIMIT,
        ..Emulator::default()
    };
    let outcome = emulator.run(&std::env::current_exe()?, &[])?;
    // Files come back as /out/NAME and belong into out/NAME.
    outcome.results.write_below(Path::new("."))?;
    Ok(ExitCode::from(u8::try_from(outcome.code).unwrap_or(u8::MAX)))
}

fn here() -> Result<ExitCode> {
    let out = PathBuf::from(if inside() { OUT_INSIDE } else { "out" });
    std::fs::create_dir_all(&out).with_context(|| format!("{} can't be made", out.display()))?;
    let history = scenario::run(&out, terminal())?;
    plot::draw(&history, &out.join("demo.svg")).context("the plot can't be drawn")?;
    let passed = summary::print(&history);
    println!("The plot is out/demo.svg; what the balancer decided is in out/balancer.log.");
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
