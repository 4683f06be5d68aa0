//! A host's machine: what it is, and which emulator is it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use api::units::Bytes;
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::emulator::Terminal;
use crate::{Error, bochs, qemu};

/// Words for the kernel of each host. Without the last one a kernel that gets too little of a busy machine takes
/// its timer for a broken one.
pub const WORDS: &str = "console=ttyS0 reboot=t panic=1 quiet tsc=reliable no_timer_check";
/// Words for one that is to do the same each time.
pub const UNCHANGING: &str = " norandmaps";

/// Whose virtualisation a host's processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Vendor {
    /// AMD: SVM, with nested page tables.
    Amd,
    /// Intel: VMX, with extended page tables.
    Intel,
}

impl Vendor {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Amd, Self::Intel];

    /// The vendor whose KVM module has this name.
    pub fn of_module(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|vendor| vendor.module() == name)
    }

    /// KVM's module for it.
    pub const fn module(self) -> &'static str {
        match self {
            Self::Amd => "kvm_amd",
            Self::Intel => "kvm_intel",
        }
    }

    /// That module's parameter for second-level address translation.
    pub const fn parameter(self) -> &'static str {
        match self {
            Self::Amd => "npt",
            Self::Intel => "ept",
        }
    }

    /// Its name in words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amd => "AMD",
            Self::Intel => "Intel",
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
    /// Its first root, with the first process at [`INIT`](crate::INIT).
    pub initrd: &'a Path,
    /// Arguments of the first process.
    pub arguments: &'a str,
    /// Where the kernel's messages go.
    pub log: &'a Path,
    /// Where what is handed out goes.
    pub results: &'a Path,
    /// How the program's input and output are wired to this process's.
    pub terminal: Terminal,
    /// Where memory references are written down, if they are.
    pub references: Option<&'a Path>,
}

/// How a host reaches its program's console and what takes files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wires {
    /// Modules that it takes.
    pub modules: &'static [&'static str],
    /// The program's input and output.
    pub console: &'static str,
    /// What takes files.
    pub results: &'static str,
}

/// Which program is the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// QEMU: emulates SVM, and nests by KVM. Boots a kernel itself.
    Qemu,
    /// Bochs: emulates VMX. Boots a disc.
    Bochs,
}

impl Program {
    /// The one that has such a processor.
    pub const fn of(vendor: Vendor, execution: Execution) -> Self {
        match (vendor, execution) {
            (Vendor::Intel, Execution::Emulated | Execution::Counted) => Self::Bochs,
            (Vendor::Amd, _) | (_, Execution::Nested) => Self::Qemu,
        }
    }

    /// Its file's name, and its package in Debian.
    pub const fn file_and_package(self) -> (&'static str, &'static str) {
        match self {
            Self::Qemu => (qemu::PROGRAM, qemu::PACKAGE),
            Self::Bochs => (bochs::PROGRAM, bochs::PACKAGES),
        }
    }

    /// How a host in it is wired.
    pub const fn wires(self) -> Wires {
        match self {
            Self::Qemu => qemu::WIRES,
            Self::Bochs => bochs::WIRES,
        }
    }
}

/// A machine that is ready to be switched on.
#[derive(Debug)]
pub struct Machine {
    /// What runs it. It dies with the thread that starts it.
    pub command: Command,
    /// Where the program's output comes from, where that is not the command's own.
    pub output: Option<File>,
    /// Ends of wires, to be held until the machine has ended: then whoever reads the output comes to its end.
    pub held: Vec<OwnedFd>,
}

impl Boot<'_> {
    /// Real processors that it keeps busy.
    pub const fn threads(&self) -> usize {
        match self.execution {
            Execution::Nested => self.cpus,
            Execution::Emulated | Execution::Counted => 1,
        }
    }

    /// Makes what the machine needs, in `directory`.
    ///
    /// # Errors
    /// Where there is no such machine, or something in it can't be made.
    pub fn machine(&self, directory: &Path) -> Result<Machine, Error> {
        let mut machine = match Program::of(self.vendor, self.execution) {
            Program::Qemu if self.references.is_some() => {
                return Err(Error::Failed(
                    "QEMU tells no memory reference of a page walk: only an emulated Intel host does".into(),
                ));
            }
            Program::Qemu => Machine { command: qemu::command(self), output: None, held: Vec::new() },
            Program::Bochs => bochs::machine(self, directory)?,
        };
        let die_with_us = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
        // SAFETY: prctl is an async-signal-safe system call; nothing is allocated.
        unsafe { machine.command.pre_exec(die_with_us) };
        Ok(machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processor_has_its_emulator() {
        assert_eq!(Program::of(Vendor::Amd, Execution::Counted), Program::Qemu);
        assert_eq!(Program::of(Vendor::Intel, Execution::Emulated), Program::Bochs);
        assert_eq!(Program::of(Vendor::Intel, Execution::Nested), Program::Qemu);
        assert_eq!(Vendor::of_module("kvm_intel"), Some(Vendor::Intel));
        assert_eq!(Vendor::of_module("kvm_pvm"), None);
    }
}
