//! An emulated host: how it is made, what is put into it, and what comes of it.

use std::env;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use api::units::Bytes;
use lab_init::job::{JOB, Job};
use lab_init::results::{self, EXIT_CODE};
use rustix::thread::sched_setaffinity;

use crate::archive::Archive;
use crate::artifacts::{self, BALLAST_INSIDE};
use crate::cores::Cores;
use crate::ending::{Ended, faults, wait};
use crate::error::files;
use crate::kernels::Kernel;
use crate::machine::{Boot, Execution, Machine, Program, Vendor};
use crate::output::Output;
use crate::progress::{self, Step};
use crate::{Error, INIT, INSIDE, InstalledKernel, TIME, keyboard, packages};

/// Variables of this machine that programs inside see too.
const PASSED_ON: &[&str] = &["RUST_LOG", "RUST_BACKTRACE", "PROPTEST_CASES", "NO_COLOR"];
/// What [`TIME`] says.
const EMULATED: &str = "emulated";
/// How much more memory a second host has than the first.
const MORE: Bytes = Bytes::mib(64);

/// Whether this process runs in an emulated host.
pub fn inside() -> bool {
    env::var_os(INSIDE).is_some()
}

/// Whether this process runs in a host whose time an emulator makes.
pub fn time_is_emulated() -> bool {
    env::var_os(TIME).is_some_and(|time| time == EMULATED)
}

/// An emulated host: how it is made, and what is put into it.
#[derive(Clone, Debug)]
pub struct Emulator {
    /// Whose virtualisation its processor has.
    pub vendor: Vendor,
    /// What runs its instructions.
    pub execution: Execution,
    /// Whether KVM translates guest addresses in hardware, or by shadow paging.
    pub nested_paging: bool,
    /// Further parameters of the vendor's KVM module, with their values.
    pub module_parameters: Vec<(String, String)>,
    /// Whether KVM may use the MMU that it has for nested paging alone, or only the one that it has
    /// for shadow paging too.
    pub tdp_mmu: bool,
    /// Whether KVM waits for a halted guest in a loop for a while, as is its way (`halt_poll_ns`). Each
    /// turn of that loop ends a translated block early, so that idle time passes very slowly here.
    pub halt_polling: bool,
    /// Processors.
    pub cpus: usize,
    /// The host's memory.
    pub memory: Bytes,
    /// What it boots; Debian's 6.1 where none is named.
    pub kernel: Option<InstalledKernel>,
    /// Its first process; the lab's own where none is named.
    pub init: Option<Init>,
    /// Whether busybox and its commands lie in `/bin`.
    pub shell: bool,
    /// Whether `ballast` lies in `/bin`.
    pub ballast: bool,
    /// Kernels whose images guests inside will need, below `/guest/SERIES`.
    pub guests: Vec<Kernel>,
    /// Modules that it loads beside those that it needs.
    pub modules: Vec<&'static str>,
    /// Files of this machine, and where they lie inside.
    pub files: Vec<(PathBuf, String)>,
    /// Paths inside that are brought back: files, or directories with all below them.
    pub bring: Vec<PathBuf>,
    /// Variables for the program.
    pub environment: Vec<(String, String)>,
    /// Where the program's output and input go.
    pub terminal: Terminal,
    /// Whether each memory reference between two instructions `xchg bx, bx` is written down, in order: by Bochs
    /// alone, in as many such pairs as [`RECORDS`](crate::RECORDS).
    pub references: bool,
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

/// A program of this machine that calls [`lab_init::host::main`] as the first process of a host.
#[derive(Clone, Debug)]
pub struct Init {
    /// Its file, which lies at [`INIT`] inside.
    pub program: PathBuf,
    /// Its arguments, with spaces between them.
    pub arguments: String,
}

/// Where a program's output and input go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminal {
    /// Output is printed as a test prints, so that a passing test stays quiet; no input.
    Printed,
    /// Output goes to this process's standard output; no input.
    Output,
    /// Output is kept and shown to nobody; no input.
    Kept,
    /// A terminal, both ways; Ctrl-C reaches the program.
    Interactive,
}

/// How a program in an emulated host ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code, 128 and the number of the signal that ended it, or 127 where it did not start.
    pub code: i32,
    /// What it left.
    pub results: Results,
}

/// One host, and what came of it.
#[derive(Debug)]
pub struct Attempt {
    /// The program's exit code as in [`Outcome`], or why it is not known.
    pub code: Result<i32, String>,
    /// What it left, and what was handed out before the end.
    pub results: Results,
    /// What the program said; nothing where it had a terminal.
    pub said: String,
    /// The emulator's own record of memory references, where it was to make one.
    pub references: String,
}

/// Files that were brought back.
#[derive(Debug)]
pub struct Results(Vec<(String, Vec<u8>)>);

impl Results {
    /// The contents of a file, by its path inside.
    pub fn get(&self, path: &str) -> Option<&[u8]> {
        self.0.iter().rev().find(|(name, _)| name == path).map(|(_, contents)| contents.as_slice())
    }

    /// Writes all files below `directory`, at the paths they had inside.
    ///
    /// # Errors
    /// Where one can't be written.
    pub fn write_below(&self, directory: &Path) -> Result<(), Error> {
        for (name, contents) in &self.0 {
            // Names come out of the emulated host: none may lead out of the directory.
            let inner = Path::new(name).components().filter(|part| matches!(part, Component::Normal(_)));
            let path = directory.join(inner.collect::<PathBuf>());
            let write = || {
                fs::create_dir_all(path.parent().unwrap_or(directory))?;
                fs::write(&path, contents)
            };
            write().map_err(files(path.display()))?;
        }
        Ok(())
    }
}

impl Default for Emulator {
    fn default() -> Self {
        Self {
            vendor: Vendor::Amd,
            execution: Execution::Emulated,
            nested_paging: true,
            module_parameters: Vec::new(),
            tdp_mmu: true,
            halt_polling: true,
            cpus: 1,
            memory: Bytes::gib(2),
            kernel: None,
            init: None,
            shell: true,
            ballast: true,
            guests: Vec::new(),
            modules: Vec::new(),
            files: Vec::new(),
            bring: Vec::new(),
            environment: Vec::new(),
            terminal: Terminal::Printed,
            references: false,
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
    pub fn run(&self, program: &Path, arguments: &[&str]) -> Result<Outcome, Error> {
        let mut host = self.clone();
        loop {
            let attempt = host.attempt(program, arguments, || false)?;
            match attempt.code {
                Ok(code) => return Ok(Outcome { code, results: attempt.results }),
                Err(why) if host.attempts <= 1 => return Err(Error::Failed(why)),
                Err(why) => progress::line(format_args!("{why}\nOnce more, in a host with more memory.")),
            }
            host = host.another();
        }
    }

    /// A host for the next attempt.
    pub fn another(&self) -> Self {
        let attempts = self.attempts.saturating_sub(1);
        Self { attempts, memory: self.memory.saturating_add(MORE), ..self.clone() }
    }

    /// As [`Self::run`], in one host only, until `stopped` says that nobody wants it any more.
    ///
    /// # Errors
    /// Where the host could not be made, or was stopped. One that came to no end is an [`Attempt`].
    pub fn attempt(
        &self,
        program: &Path,
        arguments: &[&str],
        stopped: impl Fn() -> bool + Sync,
    ) -> Result<Attempt, Error> {
        let directory = tempfile::Builder::new().prefix("ballast-lab-").tempdir();
        let directory = directory.map_err(files("a temporary directory"))?;
        let at = |name: &str| directory.path().join(name);
        let kernel = self.kernel.clone().map_or_else(|| Kernel::V6_1.installed(), Ok)?;
        let packing = progress::begin("packing what goes into an emulated host");
        fs::write(at("initrd"), self.initrd(&kernel, program, arguments)?)
            .map_err(files("the host's initramfs"))?;
        drop(packing);
        let references = at("references");
        let boot = Boot {
            cpus: self.cpus,
            memory: self.memory,
            vendor: self.vendor,
            execution: self.execution,
            kernel: &kernel.image,
            initrd: &at("initrd"),
            arguments: self.init.as_ref().map_or("", |init| &init.arguments),
            log: &at("kernel.log"),
            results: &at("results"),
            terminal: self.terminal,
            references: self.references.then_some(references.as_path()),
        };
        let mut machine = boot.machine(directory.path())?;
        if self.terminal == Terminal::Kept {
            machine.command.stderr(File::create(at("errors")).map_err(files("the emulator's messages"))?);
        }
        let cores = Cores::take(boot.threads(), &stopped)?;
        let booting = progress::begin("booting an emulated host");
        let begun = Instant::now();
        let ran = thread::scope(|scope| {
            // The emulator dies with the thread that started it, and inherits its processors.
            let emulating = || self.emulate(machine, &cores, booting, &stopped);
            let emulating = thread::Builder::new().spawn_scoped(scope, emulating);
            Ok(emulating.map_err(files("a thread for the emulator"))?.join())
        });
        keyboard::give_back();
        let (ended, said) = ran?.unwrap_or(Err(Error::Stopped))?;
        // A terminal's Ctrl-C ends the emulator as well.
        if stopped() {
            return Err(Error::Stopped);
        }
        let read = |name| String::from_utf8_lossy(&fs::read(at(name)).unwrap_or_default()).into_owned();
        let log = read("kernel.log") + &read("errors") + &faults(&read("emulator.log"));
        let mut results = Results(results::read(&fs::read(at("results")).unwrap_or_default()));
        let code = results.get(EXIT_CODE).and_then(|code| str::from_utf8(code).ok()?.parse().ok());
        // The lab's own, and no file of the program.
        results.0.retain(|(name, _)| name != EXIT_CODE);
        let code = code.ok_or_else(|| {
            let how = match ended {
                Ended::ByItself(status) => format!("the emulated host ended ({status})"),
                Ended::Silent => {
                    format!("the emulated host said nothing for {:.0?} and was ended", self.silence)
                }
                Ended::TooLate | Ended::Stopped => format!("gave up after {:.0?}", begun.elapsed()),
            };
            let what = format!("{} {}", program.display(), arguments.join(" "));
            format!("{how} without an outcome of {what}; its kernel said:\n{log}")
        });
        if self.terminal == Terminal::Printed && code.is_ok() {
            print!("{log}");
        }
        Ok(Attempt { code, results, said, references: read("references") })
    }

    /// What the host boots into: its first process, the modules, the job, and all that was asked for.
    fn initrd(&self, kernel: &InstalledKernel, program: &Path, arguments: &[&str]) -> Result<Vec<u8>, Error> {
        let init = match &self.init {
            Some(init) => init.program.clone(),
            None => artifacts::guest_init()?,
        };
        let mut copies = self.files.clone();
        if self.ballast {
            copies.push((artifacts::ballast()?, BALLAST_INSIDE.to_owned()));
        }
        for kernel in &self.guests {
            copies.extend(kernel.images()?.placed_as(&kernel.images_inside()));
        }
        let program = match program.file_name() {
            Some(name) if program.is_file() => {
                let path = format!("/lab/{}", name.to_string_lossy());
                copies.push((program.to_owned(), path.clone()));
                path
            }
            _ => program.to_string_lossy().into_owned(),
        };
        let wires = self.program().wires();
        let modules = kernel.modules(&[wires.modules, &[self.vendor.module()], &self.modules].concat())?;
        let path = |name: &str| format!("/lib/modules/{name}.ko");
        let loaded = modules.iter().map(|module| path(&module.name) + &self.parameters(&module.name));
        let job = self.job(loaded.collect(), program, arguments).text().map_err(Error::Failed)?;
        let busybox = self.shell.then(|| packages::unpacked("busybox-static")).transpose()?;
        let build = || {
            let mut archive = Archive::with_program(INIT, &fs::read(&init)?)?;
            archive.contents(JOB, 0o644, job.as_bytes())?;
            for module in &modules {
                archive.contents(&path(&module.name), 0o644, &module.contents)?;
            }
            for (source, path) in &copies {
                archive.file(path, source)?;
            }
            if let Some(root) = &busybox {
                archive.busybox(&root.join("bin/busybox"))?;
            }
            archive.finish()
        };
        build().map_err(files("the host's initramfs"))
    }

    /// What a module of the host is told.
    fn parameters(&self, module: &str) -> String {
        let mut parameters = String::new();
        if module == self.vendor.module() {
            parameters += &format!(" {}={}", self.vendor.parameter(), u8::from(self.nested_paging));
            for (name, value) in &self.module_parameters {
                parameters += &format!(" {name}={value}");
            }
        }
        if module == "kvm_intel" && self.program() == Program::Bochs {
            // With it the first entry of a VM that has its interrupt controllers in the kernel fails in Bochs 2.7
            // (hardware reason 7).
            parameters += " enable_apicv=0";
        }
        if module == "kvm" && !self.halt_polling {
            parameters += " halt_poll_ns=0";
        }
        if module == "kvm" && !self.tdp_mmu {
            parameters += " tdp_mmu=0";
        }
        parameters
    }

    const fn program(&self) -> Program {
        Program::of(self.vendor, self.execution)
    }

    fn job(&self, modules: Vec<String>, program: String, arguments: &[&str]) -> Job {
        let paging = if self.nested_paging { "nested" } else { "shadow" };
        let wires = self.program().wires();
        let emulated = (self.execution != Execution::Nested).then_some((TIME, EMULATED));
        let fixed = [("PATH", "/bin"), ("HOME", "/tmp"), ("TERM", "xterm"), (INSIDE, paging)];
        let fixed = fixed.into_iter().chain(emulated);
        let fixed = fixed.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let passed_on = PASSED_ON.iter().filter_map(|&name| Some((name.to_owned(), env::var(name).ok()?)));
        let arguments = arguments.iter().map(|&argument| argument.to_owned());
        Job {
            console: wires.console.into(),
            results: wires.results.into(),
            modules,
            environment: fixed.chain(passed_on).chain(self.environment.iter().cloned()).collect(),
            arguments: [program].into_iter().chain(arguments).collect(),
            bring: self.bring.clone(),
            terminal: self.terminal == Terminal::Interactive,
        }
    }

    /// Runs the emulator until it ends or is ended; and what the program said.
    fn emulate(
        &self,
        machine: Machine,
        cores: &Cores,
        booting: Step,
        stopped: impl Fn() -> bool,
    ) -> Result<(Ended, String), Error> {
        sched_setaffinity(None, &cores.set()).map_err(|error| files("processors for it")(error.into()))?;
        let Machine { mut command, output, held } = machine;
        let mut child = command.spawn().map_err(|source| {
            let (program, package) = self.program().file_and_package();
            Error::NoEmulator { program, package, source }
        })?;
        let output: Option<Box<dyn Read + Send>> = match (output, child.stdout.take()) {
            (Some(wire), _) => Some(Box::new(wire)),
            (None, piped) => piped.map(|piped| Box::new(piped) as Box<_>),
        };
        let output = output.map(|output| Output::follow(output, self.terminal, booting));
        let output = output.transpose().map_err(files("a thread for its output"))?;
        let silent = || output.as_ref().is_some_and(|output| output.silence() > self.silence);
        let ended = wait(&mut child, self.limit, silent, stopped).map_err(files("the emulator's end"))?;
        drop(held);
        Ok((ended, output.map(Output::finish).unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_told_how_to_translate() {
        let host = Emulator { nested_paging: false, ..Emulator::default() };
        assert_eq!((host.parameters("kvm_amd"), host.parameters("kvm")), (" npt=0".into(), String::new()));
        let host =
            Emulator { vendor: Vendor::Intel, tdp_mmu: false, halt_polling: false, ..Emulator::default() };
        assert_eq!(
            (host.parameters("kvm_intel"), host.parameters("kvm_amd")),
            (" ept=1 enable_apicv=0".into(), String::new())
        );
        assert_eq!(host.parameters("kvm"), " halt_poll_ns=0 tdp_mmu=0");
    }

    #[test]
    fn no_file_of_a_host_leads_out_of_the_directory() {
        let directory = tempfile::tempdir().expect("a directory");
        let results =
            Results(vec![("../../x/../y".to_owned(), b"1".to_vec()), ("/a/b".to_owned(), b"2".to_vec())]);
        results.write_below(directory.path()).expect("written");
        assert_eq!(fs::read(directory.path().join("x/y")).ok(), Some(b"1".to_vec()));
        assert_eq!(fs::read(directory.path().join("a/b")).ok(), Some(b"2".to_vec()));
    }
}
