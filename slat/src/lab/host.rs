//! One host of the lab: what it is for, what lies in it, and its result.

use std::env;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use api::units::Bytes;
use lab::archive::Archive;
use lab::{Attempt, Emulator, Execution, INIT, Init, InstalledKernel, Terminal, Vendor};

use super::{Error, RESULT, walks};
use crate::linux;
use crate::run::Run;

/// CPUs of the scaling series. Emulated ones share a thread: exits are exact, and time says nothing of contention.
const SCALING_CPUS: usize = 4;
/// A host that says nothing for as long stands still. It says which payload it begins, when a guest boots and
/// when sessions have answered; on an idle machine a minute lies between two of these at most.
const SILENCE: Duration = Duration::from_secs(300);
/// How much of what a host said is told where it gave nothing, in characters.
const LAST_WORDS: usize = 2000;

/// How a host's KVM translates a guest's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// `npt=1`, `ept=1`: SLAT.
    Nested,
    /// The same and `tdp_mmu=0`: SLAT by the code that also does shadow paging. What is left of the difference
    /// to [`Paging::Shadow`] is SLAT's own.
    NestedOldMmu,
    /// `ept=1` and `vpid=0`: SLAT over a TLB whose entries bear no tag of their vCPU.
    Untagged,
    /// `npt=0`, `ept=0`: shadow paging.
    Shadow,
}

impl Paging {
    fn words(self, vendor: Vendor) -> String {
        let slat = vendor.parameter();
        match self {
            Self::Nested => format!("{slat}=1"),
            Self::NestedOldMmu => format!("{slat}=1 tdp_mmu=0"),
            Self::Untagged => format!("{slat}=1 vpid=0"),
            Self::Shadow => format!("{slat}=0"),
        }
    }
}

/// What a host is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Payloads and a Linux guest's workloads, counted: one CPU, the same to the bit each time.
    Count,
    /// KVM's memory for a guest, counted.
    Memory,
    /// More and more Linux guests, on the same clock.
    Density,
    /// Page-table work on more and more vCPUs, in emulated time.
    Scale,
    /// What KVM flushes where VMs take turns, counted.
    Switches,
    /// Every memory reference of loads that miss the TLB, as the emulator writes them down.
    Walks,
    /// A Linux guest's exits by reason, on the clock of instructions.
    Reasons,
    /// Every payload and a Linux guest's workloads in real time, in a nested host.
    Time,
}

impl Errand {
    /// In words, for progress.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Count => "counting",
            Self::Memory => "memory",
            Self::Density => "density",
            Self::Scale => "vCPUs",
            Self::Switches => "switches",
            Self::Walks => "walks",
            Self::Reasons => "reasons",
            Self::Time => "time",
        }
    }

    /// The set of payloads and the guests' work, as the hidden command takes them.
    const fn arguments(self) -> [&'static str; 2] {
        match self {
            Self::Count => ["lab", "workloads"],
            Self::Memory => ["memory", "none"],
            Self::Density => ["guests", "density"],
            Self::Scale => ["scaling", "none"],
            Self::Switches => ["switches", "none"],
            Self::Walks => ["walks", "none"],
            Self::Reasons => ["guests", "reasons"],
            Self::Time => ["full", "workloads"],
        }
    }

    const fn execution(self) -> Execution {
        match self {
            Self::Count | Self::Memory | Self::Density | Self::Switches | Self::Walks | Self::Reasons => {
                Execution::Counted
            }
            Self::Scale => Execution::Emulated,
            Self::Time => Execution::Nested,
        }
    }

    /// Processors and memory.
    const fn size(self, vendor: Vendor) -> (usize, Bytes) {
        match self {
            // An emulated Intel host has no more.
            Self::Scale if matches!(vendor, Vendor::Intel) => (1, Bytes::gib(2)),
            Self::Count | Self::Memory | Self::Switches | Self::Walks | Self::Reasons => (1, Bytes::gib(2)),
            // Room for as many guests as are to be started: this is about the processor.
            Self::Density => (1, Bytes::gib(3)),
            Self::Scale => (SCALING_CPUS, Bytes::gib(2)),
            // A quarter of it is room for the chase over 1 GiB.
            Self::Time => (SCALING_CPUS, Bytes::gib(5)),
        }
    }
}

/// One host.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Whose virtualisation it has.
    pub vendor: Vendor,
    /// SLAT on or off.
    pub paging: Paging,
    /// What it is for.
    pub errand: Errand,
    /// How long it may take.
    pub limit: Duration,
}

impl Host {
    /// What it does, for progress.
    pub fn describe(&self) -> String {
        format!("{}, {}", self.errand.words(), self.paging.words(self.vendor))
    }

    /// Boots the host and waits for its result, or until `stopped` says that nobody wants it any more.
    ///
    /// # Errors
    /// Where it can't be started, gives nothing in time, or gives nonsense.
    pub fn run(&self, kernel: &InstalledKernel, stopped: impl Fn() -> bool + Sync) -> Result<Run, Error> {
        let files = |what: &str| {
            let what = what.to_owned();
            move |source| Error::Files { what, source }
        };
        let this = env::current_exe().map_err(files("this program's own file"))?;
        let directory = tempfile::tempdir().map_err(files("a temporary directory"))?;
        let mut placed = Vec::new();
        if !matches!(self.errand, Errand::Memory | Errand::Scale | Errand::Switches | Errand::Walks) {
            let initrd = directory.path().join("initrd");
            guest_image(&this)
                .and_then(|image| fs::write(&initrd, image))
                .map_err(files("a guest's initramfs"))?;
            placed.push((kernel.image.clone(), linux::KERNEL.to_owned()));
            placed.push((initrd, linux::INITRD.to_owned()));
        }
        let (cpus, memory) = self.errand.size(self.vendor);
        let emulator = Emulator {
            vendor: self.vendor,
            execution: self.errand.execution(),
            nested_paging: self.paging != Paging::Shadow,
            module_parameters: match self.paging {
                Paging::Untagged => vec![("vpid".into(), "0".into())],
                Paging::Nested | Paging::NestedOldMmu | Paging::Shadow => Vec::new(),
            },
            tdp_mmu: self.paging != Paging::NestedOldMmu,
            cpus,
            memory,
            kernel: Some(kernel.clone()),
            init: Some(Init { program: this, arguments: "slat inside".to_owned() }),
            shell: false,
            ballast: false,
            files: placed,
            terminal: Terminal::Kept,
            references: self.errand == Errand::Walks,
            limit: self.limit,
            silence: SILENCE,
            ..Emulator::default()
        };
        let [set, guests] = self.errand.arguments();
        let mut arguments = vec!["slat", "inside", "--set", set, "--guests", guests];
        if emulator.execution == Execution::Counted {
            arguments.push("--instructions");
        }
        match emulator.attempt(Path::new(INIT), &arguments, stopped) {
            Ok(attempt) => {
                let mut run = result(&attempt)?;
                if self.errand == Errand::Walks {
                    run.misses = walks::misses(&run, &attempt.references).map_err(Error::Record)?;
                }
                Ok(run)
            }
            Err(lab::Error::Stopped) => Err(Error::Interrupted),
            Err(error) => Err(Error::Host(error)),
        }
    }
}

/// The last result that a host handed out, whether it came to its end or not.
fn result(attempt: &Attempt) -> Result<Run, Error> {
    let why = match attempt.results.get(RESULT).map(serde_json::from_slice) {
        Some(Ok(run)) => return Ok(run),
        Some(Err(error)) => error.to_string(),
        None => match &attempt.code {
            Ok(code) => format!("its program ended with {code}"),
            Err(why) => why.clone(),
        },
    };
    let said = &attempt.said;
    let from = said.char_indices().rev().nth(LAST_WORDS).map_or(0, |(at, _)| at);
    Err(Error::NoResult(why, said.get(from..).unwrap_or_default().to_owned()))
}

/// A Linux guest's initramfs: this program, and one to execute.
fn guest_image(this: &Path) -> io::Result<Vec<u8>> {
    let mut archive = Archive::with_program(linux::GUEST_INIT, &fs::read(this)?)?;
    let (path, program) = linux::guest::program();
    archive.contents(path, 0o755, &program)?;
    archive.finish()
}
