//! The emulated host: QEMU's software emulation of a processor with SVM.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use api::units::Bytes;
use rustix::thread::sched_setaffinity;
use slat::lab::archive::Archive;
use slat::lab::emulator::{Ended, Kind, Machine, PROGRAM, wait};

use crate::archive;
use crate::artifacts::{self, BALLAST_INSIDE};
use crate::cores::Cores;
use crate::kernels::Kernel;
use crate::output::Output;
use crate::packages;

/// Set for programs in an emulated host, to the paging that its KVM uses.
pub const INSIDE: &str = "BALLAST_LAB";

/// The modules of an emulated host, `kvm-amd` aside, which takes a parameter.
const HOST_MODULES: &[&str] = &["virtio_pci", "virtio_console", "kvm-amd"];
/// Variables of this machine that programs inside see too.
const PASSED_ON: &[&str] = &["RUST_LOG", "RUST_BACKTRACE", "PROPTEST_CASES", "NO_COLOR"];
/// How much more memory a second host has than the first.
const MORE: Bytes = Bytes::mib(64);

/// An emulated host: how it is made, and what is put into it.
#[derive(Clone, Debug)]
pub struct Emulator {
    /// Whether KVM uses nested paging (`npt=1`) or shadow paging (`npt=0`).
    pub nested_paging: bool,
    /// Emulated processors; each keeps a real one busy.
    pub cpus: usize,
    /// The emulated host's memory.
    pub memory: Bytes,
    /// Counts instructions as time and draws no randomness: two runs are the same to the bit.
    pub deterministic: bool,
    /// Whether KVM waits for a halted guest in a loop for a while, as is its way (`halt_poll_ns`). Each
    /// turn of that loop ends a translated block early, so that idle time passes very slowly here.
    pub halt_polling: bool,
    /// Kernels whose images guests inside will need, below `/guest/SERIES`.
    pub guests: Vec<Kernel>,
    /// Whether `ballast` lies in `/bin`.
    pub ballast: bool,
    /// Files of this machine, and where they lie inside.
    pub files: Vec<(PathBuf, String)>,
    /// Paths inside that are brought back: files, or directories with all below them.
    pub bring: Vec<PathBuf>,
    /// Variables for the program.
    pub environment: Vec<(String, String)>,
    /// Where the program's output and input go.
    pub terminal: Terminal,
    /// When to give up.
    pub limit: Duration,
    /// When to give up on a program that says nothing for as long.
    pub silence: Duration,
    /// How many hosts may come to no end before the last does. QEMU 7.2 may interrupt a guest again that has taken
    /// an interrupt's lock and not yet ended the interrupt (`vmm::cpuid`; kernel/irq/chip.c, `handle_edge_irq`): it
    /// waits for itself, each turn of its loop ends an emulated block, and virtual time all but stands. That needs
    /// a host whose timer ends just then; one that is the same to the bit would come to the same pass, so that each
    /// further one has a little more memory.
    pub attempts: u32,
}

/// Where a program's output and input go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminal {
    /// Output is printed as a test prints, so that a passing test stays quiet; no input.
    Printed,
    /// Output goes to this process's standard output; no input.
    Output,
    /// A terminal, both ways; Ctrl-C reaches the program.
    Interactive,
}

/// How a program in an emulated host ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code, 128 and the number of the signal that killed it, or 127 where it did not start.
    pub code: i32,
    /// What it left.
    pub results: Results,
}

/// One host, and what came of it.
#[derive(Debug)]
pub struct Attempt {
    /// How the program ended, or why it is not known.
    pub outcome: std::result::Result<Outcome, String>,
    /// What the program said; nothing where it had a terminal.
    pub said: String,
}

/// Files that were brought back.
#[derive(Debug)]
pub struct Results(Vec<(String, Vec<u8>)>);

impl Results {
    /// The contents of a file, by its path inside.
    pub fn get(&self, path: &str) -> Option<&[u8]> {
        self.0.iter().find(|(name, _)| name == path).map(|(_, contents)| contents.as_slice())
    }

    /// Writes all files below `directory`, at the paths they had inside.
    ///
    /// # Errors
    /// Where one can't be written.
    pub fn write_below(&self, directory: &Path) -> Result<()> {
        for (name, contents) in &self.0 {
            // Names come out of the emulated host: none may lead out of the directory.
            let relative: PathBuf = Path::new(name)
                .components()
                .filter(|c| matches!(c, std::path::Component::Normal(_)))
                .collect();
            let path = directory.join(relative);
            fs::create_dir_all(path.parent().unwrap_or(directory))?;
            fs::write(&path, contents).with_context(|| format!("{} can't be written", path.display()))?;
        }
        Ok(())
    }
}

impl Default for Emulator {
    fn default() -> Self {
        Self {
            nested_paging: true,
            cpus: 1,
            memory: Bytes::gib(2),
            deterministic: false,
            halt_polling: true,
            guests: Vec::new(),
            ballast: true,
            files: Vec::new(),
            bring: Vec::new(),
            environment: Vec::new(),
            terminal: Terminal::Printed,
            limit: Duration::from_secs(300),
            silence: Duration::MAX,
            attempts: 1,
        }
    }
}

impl Emulator {
    /// Boots the host and runs a program in it: a file of this machine, which is
    /// copied, or else a path inside. It must be static: there are no libraries.
    ///
    /// # Errors
    /// Where the host could not be made or did not come to an end in time. A
    /// program that fails is an [`Outcome`], not an error.
    pub fn run(&self, program: &Path, arguments: &[&str]) -> Result<Outcome> {
        let mut host = self.clone();
        loop {
            match host.attempt(program, arguments)?.outcome {
                Ok(outcome) => return Ok(outcome),
                Err(why) if host.attempts <= 1 => bail!(why),
                Err(why) => eprintln!("{why}\nOnce more, in a host with more memory."),
            }
            host = host.another();
        }
    }

    /// A host for the next attempt.
    pub fn another(&self) -> Self {
        let attempts = self.attempts.saturating_sub(1);
        Self { attempts, memory: self.memory.saturating_add(MORE), ..self.clone() }
    }

    /// As [`Self::run`], in one host only.
    ///
    /// # Errors
    /// Where the host could not be made. One that came to no end is an [`Attempt`].
    pub fn attempt(&self, program: &Path, arguments: &[&str]) -> Result<Attempt> {
        ensure!(!(self.deterministic && self.cpus > 1), "a deterministic host has one CPU");
        let directory = tempfile::Builder::new().prefix("ballast-lab-").tempdir()?;
        let initrd = directory.path().join("initrd");
        fs::write(&initrd, self.initrd(program, arguments)?)?;
        let command = self.command(&initrd, directory.path())?;
        let cores = Cores::take(self.cpus)?;
        let begun = Instant::now();
        let (ended, said) = thread::scope(|scope| {
            // The emulator dies with the thread that started it, and inherits its processors.
            scope
                .spawn(|| self.emulate(command, &cores))
                .join()
                .expect("the emulator's thread does not panic")
        })?;
        let log = fs::read(directory.path().join("kernel.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let mut files = archive::read(&fs::read(directory.path().join("results")).unwrap_or_default());
        let code = files.pop_if(|(name, _)| name == "exit-code");
        let code = code.and_then(|(_, code)| String::from_utf8(code).ok()?.parse().ok());
        let outcome = code.map(|code| Outcome { code, results: Results(files) }).ok_or_else(|| {
            let what = format!("{} {}", program.display(), arguments.join(" "));
            let how = match ended {
                Ended::Left(status) => format!("the emulated host ended ({status})"),
                Ended::TooLate | Ended::Stopped => format!("gave up after {:.0?}", begun.elapsed()),
            };
            format!("{how} without an outcome of {what}; its kernel said:\n{log}")
        });
        if self.terminal == Terminal::Printed && outcome.is_ok() {
            print!("{log}");
        }
        Ok(Attempt { outcome, said })
    }

    fn initrd(&self, program: &Path, arguments: &[&str]) -> Result<Vec<u8>> {
        let mut archive = Archive::with_program("/init", &fs::read(artifacts::guest_init()?)?)?;
        let mut job = String::new();
        for module in Kernel::V6_1.modules(HOST_MODULES)? {
            let path = format!("/lib/modules/{}.ko", module.name);
            archive.contents(&path, 0o644, &module.contents)?;
            let parameters = match module.name.as_str() {
                "kvm" if !self.halt_polling => " halt_poll_ns=0".to_owned(),
                "kvm_amd" => format!(" npt={}", u8::from(self.nested_paging)),
                _ => String::new(),
            };
            writeln!(job, "module {path}{parameters}")?;
        }
        add_busybox(&mut archive)?;
        if self.ballast {
            archive.file(BALLAST_INSIDE, &artifacts::ballast())?;
        }
        for kernel in &self.guests {
            let (here, inside) = (kernel.images()?, kernel.images_inside());
            archive.file(&inside.bzimage.to_string_lossy(), &here.bzimage)?;
            archive.file(&inside.initrd.to_string_lossy(), &here.initrd)?;
            archive.file(&inside.agent_initrd.to_string_lossy(), &here.agent_initrd)?;
            if let (Some(here), Some(inside)) = (here.elf, inside.elf) {
                archive.file(&inside.to_string_lossy(), &here)?;
            }
        }
        for (source, path) in &self.files {
            archive.file(path, source)?;
        }
        let program = match program.file_name() {
            Some(name) if program.is_file() => {
                let path = format!("/lab/{}", name.to_string_lossy());
                archive.file(&path, program)?;
                path
            }
            _ => program.to_string_lossy().into_owned(),
        };
        self.describe(&mut job, &program, arguments)?;
        archive.contents("/lab/job", 0o644, job.as_bytes())?;
        Ok(archive.finish()?)
    }

    fn describe(&self, job: &mut String, program: &str, arguments: &[&str]) -> Result<()> {
        let paging = if self.nested_paging { "nested" } else { "shadow" };
        let fixed = [("PATH", "/bin"), ("HOME", "/tmp"), ("TERM", "xterm"), (INSIDE, paging)];
        let passed_on = PASSED_ON.iter().filter_map(|name| Some((*name, std::env::var(name).ok()?)));
        let variables = fixed.into_iter().map(|(name, value)| (name, value.to_owned())).chain(passed_on);
        for (name, value) in variables {
            writeln!(job, "env {name}={value}")?;
        }
        for (name, value) in &self.environment {
            writeln!(job, "env {name}={value}")?;
        }
        for argument in [program].iter().chain(arguments) {
            ensure!(
                !argument.contains('\n'),
                "an argument with a line break does not fit into a job: {argument:?}"
            );
            writeln!(job, "argument {argument}")?;
        }
        for path in &self.bring {
            writeln!(job, "bring {}", path.display())?;
        }
        if self.terminal == Terminal::Interactive {
            writeln!(job, "terminal")?;
        }
        Ok(())
    }

    fn command(&self, initrd: &Path, directory: &Path) -> Result<Command> {
        let kind = if self.deterministic { Kind::Counted } else { Kind::Emulated };
        let machine = Machine { cpus: self.cpus, memory: self.memory, kind };
        let mut qemu = machine.command(&Kernel::V6_1.bzimage()?, initrd, "");
        let signal = if self.terminal == Terminal::Interactive { "off" } else { "on" };
        let place = directory.display();
        qemu.args(["-serial", &format!("file:{place}/kernel.log")]);
        qemu.args(["-chardev", &format!("stdio,id=program,signal={signal}")]);
        qemu.args(["-chardev", &format!("file,id=results,path={place}/results")]);
        // Without ioeventfd the emulated CPU itself does the I/O: that is deterministic, and no slower here.
        qemu.args(["-device", "virtio-serial-pci,ioeventfd=off"]);
        qemu.args(["-device", "virtconsole,chardev=program"]);
        qemu.args(["-device", "virtserialport,chardev=results,name=results"]);
        match self.terminal {
            Terminal::Printed | Terminal::Output => qemu.stdin(Stdio::null()).stdout(Stdio::piped()),
            Terminal::Interactive => qemu.stdin(Stdio::inherit()),
        };
        Ok(qemu)
    }

    /// Runs the emulator to its end, or to its limit; and what the program said.
    fn emulate(&self, mut command: Command, cores: &Cores) -> Result<(Ended, String)> {
        sched_setaffinity(None, &cores.set())?;
        let mut child = command.spawn().with_context(|| {
            format!("{PROGRAM} can't be run: install it with `sudo apt-get install qemu-system-x86`")
        })?;
        let output = child.stdout.take().map(|output| Output::follow(output, self.terminal));
        let is_silent = || output.as_ref().is_some_and(|output| output.silence() > self.silence);
        let ended = wait(&mut child, self.limit, is_silent)?;
        Ok((ended, output.map(Output::finish).unwrap_or_default()))
    }
}

/// A static shell with the usual commands, for people who look around.
fn add_busybox(archive: &mut Archive) -> Result<()> {
    let busybox = packages::unpacked("busybox-static")?.join("bin/busybox");
    archive.file("/bin/busybox", &busybox)?;
    let list = Command::new(&busybox).arg("--list").output().context("busybox can't be run")?;
    for applet in String::from_utf8(list.stdout)?.lines().filter(|name| *name != "busybox") {
        archive.link(&format!("/bin/{applet}"), "busybox")?;
    }
    Ok(())
}

/// Whether a person sits before this process.
pub fn at_a_terminal() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Opens for reading and writing what only a host with KVM has.
pub(crate) fn kvm_device() -> std::io::Result<File> {
    File::options().read(true).write(true).open("/dev/kvm")
}
