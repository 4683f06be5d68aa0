//! `lab`: runs a program in an emulated host whose KVM works.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use api::units::Bytes;
use clap::{Parser, Subcommand};
use lab::{Emulator, Error, Execution, Kernel, Terminal};

/// Hosts that can run real KVM guests, on any machine.
///
/// An emulated AMD host boots a Debian kernel in a few seconds and loads the real kvm_amd.
/// In it: /bin/ballast, busybox, and for each --kernel the files /guest/SERIES/bzImage and
/// initrd (for 6.1 also vmlinux, the ELF). Programs must be static. They see one variable,
/// BALLAST_LAB, which is `nested` or `shadow`.
#[derive(Parser)]
#[command(name = "lab", after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

const EXAMPLES: &str = "Examples:
  lab run -- sh                                   a shell in an emulated host
  lab run --npt 0 -- ballast check                shadow paging
  lab run -- ballast run --kernel /guest/6.1/bzImage --initrd /guest/6.1/initrd --memory 256M
  lab run --kernel 6.12 --bring /tmp/trace -- ./target/x86_64-unknown-linux-gnu/release/my-tool
  lab fetch                                       fills the cache and stops";

#[derive(Subcommand)]
enum Task {
    /// Boots an emulated host and runs a program in it; its exit code is this command's.
    Run(Run),
    /// Fetches and verifies what the lab needs, and makes the guests' images.
    Fetch,
}

#[derive(clap::Args)]
struct Run {
    /// KVM uses nested paging (1) or shadow paging (0).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    npt: u8,
    /// Emulated processors; each keeps a real one busy.
    #[arg(long, default_value_t = 1)]
    cpus: usize,
    /// Memory of the emulated host.
    #[arg(long, default_value = "2G")]
    memory: Bytes,
    /// Kernels for guests; may be given more than once.
    #[arg(long, value_enum, default_values = ["6.1"])]
    kernel: Vec<Kernel>,
    /// Counts instructions as time: two runs are the same to the bit. One CPU.
    #[arg(long, conflicts_with = "cpus")]
    deterministic: bool,
    /// Puts a file into the host: PATH lands in /lab, PATH=INSIDE at INSIDE.
    #[arg(long, value_name = "PATH[=INSIDE]", value_parser = placed)]
    file: Vec<(PathBuf, String)>,
    /// Brings a file or directory back, into --out.
    #[arg(long, value_name = "INSIDE")]
    bring: Vec<PathBuf>,
    /// Where files that come back are written.
    #[arg(long, default_value = "out")]
    out: PathBuf,
    /// Sets a variable for the program.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Does not put ballast in, nor build it.
    #[arg(long)]
    without_ballast: bool,
    /// Gives up after so many seconds; without it, never for a person at a terminal, else after 1800.
    #[arg(long)]
    limit: Option<u64>,
    /// The program, a file here or a path inside, and its arguments.
    #[arg(last = true, required = true)]
    program: Vec<String>,
}

fn main() -> ExitCode {
    lab::progress::show();
    let outcome = match Arguments::parse().command {
        Task::Run(run) => run.run(),
        Task::Fetch => fetch(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("lab: {error}");
        ExitCode::FAILURE
    })
}

fn fetch() -> Result<ExitCode, Error> {
    for kernel in [Kernel::V6_1, Kernel::V6_12] {
        let images = kernel.guest_images()?;
        println!("{}: {} and {}", kernel.series(), images.bzimage.display(), images.initrd.display());
    }
    println!("{}", lab::promtool::program()?.display());
    println!("{}", lab::schemathesis::environment()?.display());
    Ok(ExitCode::SUCCESS)
}

impl Run {
    fn run(self) -> Result<ExitCode, Error> {
        let interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
        let forever = if interactive { 365 * 24 * 3600 } else { 1800 };
        let emulator = Emulator {
            nested_paging: self.npt == 1,
            cpus: self.cpus,
            memory: self.memory,
            execution: if self.deterministic { Execution::Counted } else { Execution::Emulated },
            guests: self.kernel,
            ballast: !self.without_ballast,
            files: self.file,
            bring: self.bring,
            environment: self.env,
            terminal: if interactive { Terminal::Interactive } else { Terminal::Output },
            limit: Duration::from_secs(self.limit.unwrap_or(forever)),
            ..Emulator::default()
        };
        let program = PathBuf::from(&self.program[0]);
        let arguments: Vec<&str> = self.program[1..].iter().map(String::as_str).collect();
        let outcome = emulator.run(&program, &arguments)?;
        outcome.results.write_below(&self.out)?;
        Ok(ExitCode::from(u8::try_from(outcome.code).unwrap_or(u8::MAX)))
    }
}

fn placed(file: &str) -> Result<(PathBuf, String), String> {
    if let Some((path, inside)) = file.split_once('=') {
        return Ok((path.into(), inside.to_owned()));
    }
    let path = PathBuf::from(file);
    let name = path.file_name().ok_or_else(|| format!("{file} names no file"))?;
    let inside = format!("/lab/{}", name.to_string_lossy());
    Ok((path, inside))
}

fn variable(pair: &str) -> Result<(String, String), String> {
    let (name, value) = pair.split_once('=').ok_or_else(|| format!("`{pair}` is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}
