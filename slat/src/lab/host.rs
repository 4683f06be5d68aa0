//! One emulated host: what it is for, what lies in it, and its result.

use std::cell::Cell;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use api::units::Bytes;

use super::archive::Archive;
use super::emulator::{Ended, Kind, Machine, wait};
use super::{Error, Kernel, files, inside};
use crate::linux;
use crate::run::Run;

/// CPUs of the scaling series. Emulated ones share a thread: exits are exact, and time says nothing of contention.
const SCALING_CPUS: usize = 4;
/// A host that says nothing for as long stands still. It says which payload it begins, when a guest boots and
/// when sessions have answered; on an idle machine a minute lies between two of these at most.
const SILENCE: Duration = Duration::from_secs(300);
/// Where its console goes, below a directory of its own.
const CONSOLE: &str = "console";
/// Where its result goes.
const RESULT: &str = "result";

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
    /// Page-table work on more and more vCPUs, in emulated time.
    Scale,
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
            Self::Reasons => ["guests", "reasons"],
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
            Errand::Count | Errand::Memory | Errand::Reasons => (1, Bytes::gib(2), Kind::Counted),
            // Room for as many guests as are to be started: this is about the processor.
            Errand::Density => (1, Bytes::gib(3), Kind::Counted),
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
        let linux = !matches!(self.errand, Errand::Memory | Errand::Scale);
        fs::write(at("initrd"), image(kernel, linux)?).map_err(files("the emulated host's initramfs"))?;
        let line = format!(" rdinit=/ballast -- {}", self.arguments().join(" "));
        let mut command = self.machine().command(&kernel.image, &at("initrd"), &line);
        for port in [CONSOLE, RESULT] {
            command.args(["-serial", &format!("file:{}", at(port).display())]);
        }
        let errors = fs::File::create(at("errors")).map_err(files("the emulator's messages"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let mut child = command.spawn().map_err(Error::NoEmulator)?;
        let silence = Silence::of(directory.path());
        let ended = wait(&mut child, self.limit, || stopped() || silence.lasts())
            .map_err(files("the emulator's end"))?;
        // Not all that an emulator or a guest writes need be text.
        let read = |name| String::from_utf8_lossy(&fs::read(at(name)).unwrap_or_default()).into_owned();
        let reason = match ended {
            // A terminal's Ctrl-C ends the emulator as well.
            Ended::Stopped | Ended::Left(_) if stopped() => return Err(Error::Interrupted),
            Ended::Stopped => format!("and said nothing for {} s", SILENCE.as_secs()),
            Ended::TooLate => format!("within {} s", self.limit.as_secs()),
            Ended::Left(status) => format!("and left ({status}; {})", read("errors").trim()),
        };
        last(&read(RESULT)).map_err(|why| {
            let console = read(CONSOLE);
            let from = console.char_indices().rev().nth(2000).map_or(0, |(at, _)| at);
            let words = console.get(from..).unwrap_or_default().to_owned();
            Error::NoResult(format!("{reason}: {why}"), words)
        })
    }
}

/// The last of the results that a host sent, a line each, that is whole.
fn last(sent: &str) -> Result<Run, String> {
    let mut why = "nothing was sent".to_owned();
    for line in sent.lines().rev().filter(|line| !line.trim().is_empty()) {
        match serde_json::from_str(line) {
            Ok(run) => return Ok(run),
            Err(error) => why = error.to_string(),
        }
    }
    Err(why)
}

/// How long a host has said nothing, neither on its console nor as a result.
struct Silence<'a> {
    directory: &'a Path,
    /// How much it had said when it last said more, and when that was.
    heard: Cell<(u64, Instant)>,
}

impl<'a> Silence<'a> {
    fn of(directory: &'a Path) -> Self {
        Self { directory, heard: Cell::new((0, Instant::now())) }
    }

    /// Whether it has lasted too long.
    fn lasts(&self) -> bool {
        let length = |name| fs::metadata(self.directory.join(name)).map_or(0, |file| file.len());
        let said = length(CONSOLE) + length(RESULT);
        let (before, when) = self.heard.get();
        if said != before {
            self.heard.set((said, Instant::now()));
            return false;
        }
        when.elapsed() > SILENCE
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_off_is_no_result() {
        assert_eq!(last(""), Err("nothing was sent".into()));
        let error = last("{\"schema\": 3").expect_err("it has no end");
        assert!(error.contains("EOF"), "{error}");
    }

    #[test]
    fn a_host_that_speaks_is_not_silent() {
        let directory = tempfile::tempdir().expect("a directory");
        let silence = Silence::of(directory.path());
        let long_ago = Instant::now().checked_sub(SILENCE * 2).expect("the machine runs for longer");
        silence.heard.set((0, long_ago));
        assert!(silence.lasts(), "nothing was ever said");
        fs::write(directory.path().join(CONSOLE), "booting").expect("written");
        assert!(!silence.lasts());
        silence.heard.set((7, long_ago));
        assert!(silence.lasts(), "it said no more");
        fs::write(directory.path().join(RESULT), "{}").expect("written");
        assert!(!silence.lasts());
    }
}
