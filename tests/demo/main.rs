//! `demo`: three guests whose demands rise and fall in turn share a host that is too small for all peaks. `demo
//! disks`: two stock guests whose page caches are more than the host has.
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
use lab::{DebianImage, Emulator, Kernel, Terminal, inside};

/// Set for the demo in an emulated host: whether the real output is a terminal.
const TERMINAL: &str = "BALLAST_DEMO_TERMINAL";
/// Where it writes in an emulated host.
const OUT_INSIDE: &str = "/out";

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Demo {
    /// Memory follows the demands of three guests
    #[default]
    Peaks,
    /// The page cache of a guest at rest makes room for another guest
    Disks,
}

/// Shows how guests share a host's memory
#[derive(clap::Parser)]
struct Args {
    #[arg(value_enum, default_value_t)]
    demo: Demo,
}

impl Demo {
    const fn name(self) -> &'static str {
        match self {
            Self::Peaks => "peaks",
            Self::Disks => "disks",
        }
    }

    const fn plot(self) -> &'static str {
        match self {
            Self::Peaks => "demo.svg",
            Self::Disks => "demo-disks.svg",
        }
    }

    /// When an emulated host is given up: the first usually takes about three minutes, the second about ten.
    const fn limit(self) -> Duration {
        match self {
            Self::Peaks => Duration::from_secs(1500),
            Self::Disks => Duration::from_secs(6000),
        }
    }
}

fn main() -> ExitCode {
    let Args { demo } = clap::Parser::parse();
    lab::progress::show();
    let outcome = if inside() || guests::kvm_boots_stock_kernels() { here(demo) } else { emulated(demo) };
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

fn emulated(demo: Demo) -> Result<ExitCode> {
    println!("This machine's KVM can't boot stock kernels: the demo runs in an emulated host.");
    let (memory, guests, files) = match demo {
        Demo::Peaks => (Bytes::gib(3), vec![Kernel::V6_1], Vec::new()),
        Demo::Disks => (Bytes::gib(4), Vec::new(), DebianImage::bookworm()?.placed()),
    };
    let emulator = Emulator {
        memory,
        guests,
        files,
        bring: vec![PathBuf::from(OUT_INSIDE)],
        environment: vec![(TERMINAL.to_owned(), u8::from(terminal()).to_string())],
        terminal: Terminal::Output,
        limit: demo.limit(),
        ..Emulator::default()
    };
    let outcome = emulator.run(&std::env::current_exe()?, &[demo.name()])?;
    // Files come back as /out/NAME and belong into out/NAME.
    outcome.results.write_below(Path::new("."))?;
    Ok(ExitCode::from(u8::try_from(outcome.code).unwrap_or(u8::MAX)))
}

fn here(demo: Demo) -> Result<ExitCode> {
    let out = PathBuf::from(if inside() { OUT_INSIDE } else { "out" });
    std::fs::create_dir_all(&out).with_context(|| format!("{} can't be made", out.display()))?;
    let history = match demo {
        Demo::Peaks => scenario::peaks::run(&out, terminal())?,
        Demo::Disks => scenario::disks::run(&out, terminal())?,
    };
    plot::draw(&history, &out.join(demo.plot())).context("the plot can't be drawn")?;
    let passed = summary::print(&history);
    println!("The plot is out/{}; what the balancer decided is in out/balancer.log.", demo.plot());
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
