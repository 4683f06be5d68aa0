//! One emulated host: what it is for, what lies in it, and its result.

use std::fs;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use balloon::units::Bytes;

use super::archive::Archive;
use super::emulator::{Ended, Kind, Machine, wait};
use super::{Error, Kernel, files, inside};
use crate::linux;
use crate::run::Run;

/// CPUs of the scaling series. Emulated ones share a thread: exits are exact, and time says nothing of contention.
const SCALING_CPUS: usize = 4;

/// How an emulated host's KVM translates a guest's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// `npt=1`: SLAT.
    Nested,
    /// `npt=1` and `tdp_mmu=0`: SLAT by the code that also does shadow paging. What is left of the difference
    /// to [`Paging::Shadow`] is SLAT's own.
    NestedOldMmu,
    /// `npt=0`: shadow paging.
    Shadow,
}

impl Paging {
    const fn words(self) -> &'static str {
        match self {
            Self::Nested => "npt=1",
            Self::NestedOldMmu => "npt=1 tdp_mmu=0",
            Self::Shadow => "npt=0",
        }
    }
}

/// What an emulated host is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Payloads and a Linux guest's workloads, counted: one CPU, the same to the bit each time.
    Count,
    /// KVM's memory for a guest, counted.
    Memory,
    /// More and more Linux guests, on the same clock.
    Density,
    /// Page-table work on more and more vCPUs, and a Linux guest's exits by reason; in emulated time.
    Scale,
    /// Every payload and a Linux guest's workloads in real time, in a nested host.
    Time,
}

impl Errand {
    const fn words(self) -> &'static str {
        match self {
            Self::Count => "counting",
            Self::Memory => "memory",
            Self::Density => "density",
            Self::Scale => "vCPUs and reasons",
            Self::Time => "time",
        }
    }

    /// The set of payloads and the guests' work, as the hidden command takes them.
    const fn arguments(self) -> [&'static str; 2] {
        match self {
            Self::Count => ["lab", "workloads"],
            Self::Memory => ["memory", "none"],
            Self::Density => ["guests", "density"],
            Self::Scale => ["scaling", "reasons"],
            Self::Time => ["full", "workloads"],
        }
    }

    /// Whether the clock counts instructions.
    const fn is_counted(self) -> bool {
        !matches!(self, Self::Scale | Self::Time)
    }
}

/// One emulated host.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// SLAT on or off.
    pub paging: Paging,
    /// What it is for.
    pub errand: Errand,
    /// How long it may take.
    pub limit: Duration,
}

impl Host {
    /// What runs inside.
    fn arguments(&self) -> Vec<&'static str> {
        let [set, guests] = self.errand.arguments();
        let mut arguments = vec!["slat", "inside", "--set", set, "--guests", guests];
        if self.paging != Paging::Shadow {
            arguments.push("--nested-paging");
        }
        if self.paging == Paging::NestedOldMmu {
            arguments.push("--no-tdp-mmu");
        }
        if self.errand.is_counted() {
            arguments.push("--instructions");
        }
        arguments
    }

    fn machine(&self) -> Machine {
        let (cpus, memory, kind) = match self.errand {
            Errand::Count | Errand::Memory | Errand::Density => (1, Bytes::gib(2), Kind::Counted),
            Errand::Scale => (SCALING_CPUS, Bytes::gib(2), Kind::Emulated),
            // A quarter of it is room for the chase over 1 GiB.
            Errand::Time => (SCALING_CPUS, Bytes::gib(5), Kind::Nested),
        };
        Machine { cpus, memory, kind }
    }

    /// What it does, for progress.
    pub fn describe(&self) -> String {
        format!("{}, {}", self.errand.words(), self.paging.words())
    }

    /// Boots the host and waits for its result, or until `stopped` says that nobody wants it any more.
    ///
    /// # Errors
    /// Where it can't be started, gives nothing in time, or gives nonsense.
    pub fn run(&self, kernel: &Kernel, stopped: impl Fn() -> bool) -> Result<Run, Error> {
        let directory = tempfile::tempdir().map_err(files("a temporary directory"))?;
        let at = |name: &str| directory.path().join(name);
        fs::write(at("initrd"), image(kernel, self.errand != Errand::Memory)?)
            .map_err(files("the emulated host's initramfs"))?;
        let line = format!(" rdinit=/ballast -- {}", self.arguments().join(" "));
        let mut command = self.machine().command(&kernel.image, &at("initrd"), &line);
        for port in ["console", "result"] {
            command.args(["-serial", &format!("file:{}", at(port).display())]);
        }
        let errors = fs::File::create(at("errors")).map_err(files("the emulator's messages"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let mut child = command.spawn().map_err(Error::NoEmulator)?;
        let ended = wait(&mut child, self.limit, &stopped).map_err(files("the emulator's end"))?;
        // Not all that an emulator or a guest writes need be text.
        let read = |name| String::from_utf8_lossy(&fs::read(at(name)).unwrap_or_default()).into_owned();
        let reason = match ended {
            Ended::Stopped => return Err(Error::Interrupted),
            // A terminal's Ctrl-C ends the emulator as well.
            Ended::Left(_) if stopped() => return Err(Error::Interrupted),
            Ended::TooLate => format!("within {} s", self.limit.as_secs()),
            Ended::Left(status) => format!("and left ({status}; {})", read("errors").trim()),
        };
        serde_json::from_str(&read("result")).map_err(|e| {
            let console = read("console");
            let from = console.char_indices().rev().nth(2000).map_or(0, |(at, _)| at);
            let words = console.get(from..).unwrap_or_default().to_owned();
            Error::NoResult(format!("{reason}: {e}"), words)
        })
    }
}

/// The emulated host's initramfs: this program, KVM's modules, and what a Linux guest boots.
fn image(kernel: &Kernel, linux: bool) -> Result<Vec<u8>, Error> {
    let this = std::env::current_exe().map_err(files("this program's own file"))?;
    let this = fs::read(&this).map_err(files(this.display().to_string()))?;
    let mut parts = vec![];
    for (number, module) in kernel.modules().iter().enumerate() {
        let path = kernel.modules.join(module);
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        parts.push((format!("/{}/{number}-{name}", inside::MODULES), path));
    }
    if linux {
        parts.push((linux::KERNEL.to_owned(), kernel.image.clone()));
    }
    let build = || -> io::Result<Vec<u8>> {
        let mut archive = Archive::with_program("/ballast", &this)?;
        for directory in ["/proc", "/sys"] {
            archive.directory(directory)?;
        }
        for (path, source) in &parts {
            archive.file(path, source)?;
        }
        if linux {
            archive.contents(linux::INITRD, 0o644, &guest_image(&this)?)?;
        }
        archive.finish()
    };
    build().map_err(files("the emulated host's initramfs"))
}

/// A Linux guest's initramfs: this program, and one to execute.
fn guest_image(this: &[u8]) -> io::Result<Vec<u8>> {
    let mut archive = Archive::with_program("/ballast", this)?;
    let (path, program) = linux::guest::program();
    archive.contents(path, 0o755, &program)?;
    archive.finish()
}
