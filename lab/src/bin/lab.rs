//! `lab`: runs a program in an emulated host whose KVM works.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use api::units::Bytes;
use clap::{Parser, Subcommand};
use lab::{Emulator, Error, Execution, Kernel, Terminal, Vendor};

/// Hosts that can run real KVM guests, on any machine.
///
/// An emulated AMD host boots a Debian kernel in a few seconds and loads the real kvm_amd; an emulated Intel host
/// (--vendor intel) takes a minute, and loads the real kvm_intel.
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
  lab run --vendor intel --ept 0 -- ballast check shadow paging on an Intel host
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
    /// Whose virtualisation the host's processor has: AMD's SVM (in QEMU) or Intel's VMX (in Bochs).
    #[arg(long, value_enum, default_value = "amd")]
    vendor: Vendor,
    /// AMD: KVM uses nested paging (1, as without it) or shadow paging (0).
    #[arg(long, value_parser = switch())]
    npt: Option<u8>,
    /// Intel: the same by extended page tables.
    #[arg(long, value_parser = switch())]
    ept: Option<u8>,
    /// Intel: KVM tags what it has in the TLB by the vCPU (1, as without it), or flushes it at each entry and exit (0).
    #[arg(long, value_parser = switch())]
    vpid: Option<u8>,
    /// Intel: EPT has accessed and dirty bits (1, as without it) or not (0).
    #[arg(long, value_parser = switch())]
    eptad: Option<u8>,
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
    /// Whether KVM is to use nested paging, and what else its module is told.
    fn paging(&self) -> Result<(bool, Vec<(String, String)>), Error> {
        let switches = [
            ("npt", self.npt, Vendor::Amd),
            ("ept", self.ept, Vendor::Intel),
            ("vpid", self.vpid, Vendor::Intel),
            ("eptad", self.eptad, Vendor::Intel),
        ];
        let given = || switches.into_iter().filter_map(|(name, value, of)| Some((name, value?, of)));
        if let Some((name, _, of)) = given().find(|(.., of)| *of != self.vendor) {
            let (module, here, host) = (of.module(), self.vendor.module(), self.vendor.name());
            let instead = match name {
                "npt" | "ept" => format!("; what {here} has instead is --{}", self.vendor.parameter()),
                _ => String::new(),
            };
            return Err(Error::Failed(format!(
                "--{name} is of {module}, and an emulated {host} host loads {here}{instead}"
            )));
        }
        let slat = self.vendor.parameter();
        let paging = given().find(|(name, ..)| *name == slat).is_none_or(|(_, value, _)| value == 1);
        let rest = given().filter(|(name, ..)| *name != slat);
        Ok((paging, rest.map(|(name, value, _)| (name.to_owned(), value.to_string())).collect()))
    }

    fn run(self) -> Result<ExitCode, Error> {
        let (nested_paging, module_parameters) = self.paging()?;
        let interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
        let forever = if interactive { 365 * 24 * 3600 } else { 1800 };
        let emulator = Emulator {
            vendor: self.vendor,
            nested_paging,
            module_parameters,
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

/// 0 or 1.
fn switch() -> clap::builder::RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(0..=1)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn paging(words: &str) -> Result<(bool, Vec<(String, String)>), String> {
        let words = format!("lab run {words} -- true");
        match Arguments::try_parse_from(words.split_whitespace()).expect("it is understood").command {
            Task::Run(run) => run.paging().map_err(|error| error.to_string()),
            Task::Fetch => unreachable!("`run` was asked for"),
        }
    }

    #[test]
    fn each_vendor_has_its_own_switches() {
        assert_eq!(paging(""), Ok((true, Vec::new())));
        assert_eq!(paging("--npt 0"), Ok((false, Vec::new())));
        assert_eq!(paging("--vendor intel --ept 0"), Ok((false, Vec::new())));
        let vpid = vec![("vpid".to_owned(), "0".to_owned())];
        assert_eq!(paging("--vendor intel --vpid 0"), Ok((true, vpid)));
        for (words, sentence) in [
            ("--ept 0", "what kvm_amd has instead is --npt"),
            ("--vendor intel --npt 1", "what kvm_intel has instead is --ept"),
            ("--eptad 0", "--eptad is of kvm_intel"),
        ] {
            let refused = paging(words).expect_err("it is the other vendor's");
            assert!(refused.contains(sentence), "{refused}");
        }
    }
}
