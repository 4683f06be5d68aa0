//! QEMU as the emulator of a host: the one place that knows its arguments, and where a host that
//! it boots finds its console.

use std::path::Path;
use std::process::{Command, Stdio};

use api::units::Bytes;
use rustix::process::{Signal, set_parent_process_death_signal};
use std::os::unix::process::CommandExt;

use crate::emulator::Terminal;
use crate::{Error, INIT};

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Its package in Debian.
pub const PACKAGE: &str = "qemu-system-x86";
/// The emulated processor, without what the emulation lacks (it would warn of each).
const PROCESSOR: &str = "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,\
                         -nrip-save,-xsavec";

/// What a host needs to reach [`CONSOLE`] and [`RESULTS`].
pub const MODULES: [&str; 2] = ["virtio_pci", "virtio_console"];
/// The program's input and output.
pub const CONSOLE: &str = "/dev/hvc0";
/// What takes files: the second port of the first controller.
pub const RESULTS: &str = "/dev/vport0p1";

/// Whose virtualisation a host's processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// AMD: SVM, with nested page tables.
    Amd,
    /// Intel: VMX, with extended page tables.
    Intel,
}

impl Vendor {
    /// The vendor whose KVM module has this name.
    pub fn of_module(name: &str) -> Option<Self> {
        [Self::Amd, Self::Intel].into_iter().find(|vendor| vendor.module() == name)
    }

    /// KVM's module for it.
    pub const fn module(self) -> &'static str {
        match self {
            Self::Amd => "kvm_amd",
            Self::Intel => "kvm_intel",
        }
    }

    /// That module's parameter for second-level address translation.
    pub(crate) const fn parameter(self) -> &'static str {
        match self {
            Self::Amd => "npt",
            Self::Intel => "ept",
        }
    }
}

/// What runs a host's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execution {
    /// An emulator, as fast as it can.
    Emulated,
    /// An emulator that counts instructions as time and draws no randomness: two runs are the same
    /// to the bit. Takes a host with one processor.
    Counted,
    /// This machine's processor, by its KVM: the host nests.
    Nested,
}

/// A PC, and what it boots.
#[derive(Debug)]
pub struct Boot<'a> {
    /// Processors.
    pub cpus: usize,
    /// Memory.
    pub memory: Bytes,
    /// Whose virtualisation they have.
    pub vendor: Vendor,
    /// What runs its instructions.
    pub execution: Execution,
    /// The kernel's image.
    pub kernel: &'a Path,
    /// Its first root, with the first process at [`INIT`].
    pub initrd: &'a Path,
    /// Arguments of the first process.
    pub arguments: &'a str,
    /// Where the kernel's messages go.
    pub log: &'a Path,
    /// Where what is handed out goes.
    pub results: &'a Path,
    /// How the program's input and output are wired to this process's.
    pub terminal: Terminal,
}

impl Boot<'_> {
    /// Real processors that it keeps busy.
    pub fn threads(&self) -> usize {
        match self.execution {
            Execution::Nested => self.cpus,
            Execution::Emulated | Execution::Counted => 1,
        }
    }

    /// The command that runs the PC. It dies with the thread that starts it.
    ///
    /// # Errors
    /// Where QEMU has no such processor.
    pub fn command(&self) -> Result<Command, Error> {
        // Without the last word a kernel that gets too little of a busy machine takes its timer for a broken one.
        let mut words = "console=ttyS0 reboot=t panic=1 quiet tsc=reliable no_timer_check".to_owned();
        // The decompressor looks for this word everywhere; the kernel itself doesn't know it
        // and would hand it to the first process in front of all others.
        let mut last = "";
        let mut qemu = Command::new(PROGRAM);
        let accelerator = match self.execution {
            Execution::Nested => "kvm",
            _ if self.vendor == Vendor::Intel => return Err(Error::NoProcessor("Intel")),
            // QEMU 7.2 with one thread for each processor delivers interrupts between processors at
            // moments at which SVM holds them back: hosts oops in KVM's entry code, guests triple-fault.
            _ if self.cpus > 1 => "tcg,thread=single",
            _ => "tcg",
        };
        qemu.args(["-M", "q35", "-accel", accelerator, "-nodefaults", "-no-user-config", "-display", "none"]);
        qemu.args(["-no-reboot", "-smp", &self.cpus.to_string(), "-m", &format!("{}M", self.memory.0 >> 20)]);
        match self.execution {
            Execution::Emulated => qemu.args(["-cpu", PROCESSOR]),
            Execution::Nested => qemu.args(["-cpu", "host"]),
            Execution::Counted => {
                words += " norandmaps random.trust_cpu=off";
                last = " nokaslr";
                qemu.args(["-cpu", &format!("{PROCESSOR},-rdrand")]);
                qemu.args(["-icount", "shift=0,sleep=off", "-seed", "1"]);
                qemu.args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"])
            }
        };
        qemu.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initrd);
        qemu.args(["-append", &format!("{words} rdinit={INIT} -- {}{last}", self.arguments)]);
        qemu.args(["-serial", &format!("file:{}", self.log.display())]);
        let signal = if self.terminal == Terminal::Interactive { "off" } else { "on" };
        qemu.args(["-chardev", &format!("stdio,id=program,signal={signal}")]);
        qemu.args(["-chardev", &format!("file,id=results,path={}", self.results.display())]);
        // Without ioeventfd the emulated CPU itself does the I/O: that is deterministic, and no slower here.
        qemu.args(["-device", "virtio-serial-pci,ioeventfd=off"]);
        qemu.args(["-device", "virtconsole,chardev=program,nr=0"]);
        qemu.args(["-device", "virtserialport,chardev=results,nr=1"]);
        match self.terminal {
            Terminal::Interactive => qemu.stdin(Stdio::inherit()),
            _ => qemu.stdin(Stdio::null()).stdout(Stdio::piped()),
        };
        let die_with_us = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
        // SAFETY: prctl is an async-signal-safe system call; nothing is allocated.
        unsafe { qemu.pre_exec(die_with_us) };
        Ok(qemu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(boot: &Boot) -> String {
        let command = boot.command().expect("QEMU has it");
        command.get_args().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_counted_host_has_no_clock_and_no_chance_of_its_own() {
        let (path, terminal) = (Path::new("p"), Terminal::Kept);
        let (kernel, initrd, log, results) = (path, path, path, path);
        let (vendor, memory) = (Vendor::Amd, Bytes::gib(2));
        let machine = |cpus, execution, vendor| Boot {
            cpus,
            memory,
            vendor,
            execution,
            kernel,
            initrd,
            arguments: "more",
            log,
            results,
            terminal,
        };
        let counted = words(&machine(1, Execution::Counted, vendor));
        for word in ["-icount", "clock=vm", "-rdrand", "norandmaps", "-m 2048M", "-- more nokaslr"] {
            assert!(counted.contains(word), "{word}: {counted}");
        }
        let timed = machine(4, Execution::Emulated, vendor);
        assert!(words(&timed).contains("thread=single") && !words(&timed).contains("icount"));
        assert_eq!(timed.threads(), 1);
        let nested = machine(4, Execution::Nested, Vendor::Intel);
        assert!(words(&nested).contains("-accel kvm") && words(&nested).contains("-cpu host"));
        assert_eq!(nested.threads(), 4);
        let intel = machine(1, Execution::Emulated, Vendor::Intel).command();
        assert!(matches!(intel, Err(Error::NoProcessor(_))), "{intel:?}");
    }
}
