//! The way to a VM's memory, and how its devices reach it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ::api::client::Client;
use ::api::runtime;
use ::api::status::MemoryStatus;
use ::api::units::Bytes;
use anyhow::{Context, Result};
use guests::{Vm, VmSettings};
use lab::GuestImages;
use tokio::runtime::{Builder, Runtime};

use crate::trace::{Counts, End, Trace, now};

/// How long anything that a guest is told usually takes.
pub const USUALLY: Duration = Duration::from_secs(60);

/// How ballast's devices reach a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Registers in memory, and an interrupt line for each device.
    Mmio,
    /// PCI functions with MSI-X.
    Pci,
}

impl Transport {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Mmio, Self::Pci];

    /// Its name, and the value of `--transport`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mmio => "mmio",
            Self::Pci => "pci",
        }
    }
}

/// A guest under ballast that says nothing to anybody but this program.
pub fn guest(
    images: &GuestImages,
    memory: &str,
    cmdline: &str,
    transport: Transport,
    arguments: &[&str],
) -> VmSettings {
    let transport = ["--transport", transport.name()];
    VmSettings::new("bench", images, memory, cmdline).with(&transport).with(arguments).quiet()
}

/// What one step cost.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// From the request to the driver's word that it is done.
    pub time: Duration,
    /// What was counted meanwhile.
    pub counts: Counts,
}

/// The way to a VM's memory.
pub struct Memory {
    pid: u32,
    way: Way,
}

enum Way {
    Ballast(Runtime, Client),
    Qemu(UnixStream),
}

impl Memory {
    /// The way to a VM of ballast's.
    ///
    /// # Errors
    /// There is none.
    pub fn of(vm: &Vm) -> Result<Self> {
        let client = Client::new(runtime::socket(vm.name())?).with_timeout(USUALLY);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Self { pid: vm.pid(), way: Way::Ballast(runtime, client) })
    }

    /// The way to one of QEMU's.
    ///
    /// # Errors
    /// It does not answer.
    pub fn of_qemu(vm: &Vm, socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("QEMU can't be connected to")?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut next = || lines.next().transpose();
        next()?;
        (&stream).write_all(b"{\"execute\": \"qmp_capabilities\"}\n")?;
        next()?;
        Ok(Self { pid: vm.pid(), way: Way::Qemu(stream) })
    }

    /// Asks the guest to have `target`, and measures until `end`.
    ///
    /// # Errors
    /// The VMM refuses, or the guest does not get there.
    pub fn reach(&mut self, target: Bytes, end: End) -> Result<Step> {
        let trace = Trace::start(end)?;
        let before = Counts::read(self.pid)?;
        let asked = now();
        match &mut self.way {
            Way::Ballast(runtime, client) => runtime.block_on(client.set_target(target))?,
            Way::Qemu(stream) => {
                let value = target.0;
                writeln!(stream, "{{\"execute\": \"balloon\", \"arguments\": {{\"value\": {value}}}}}")?;
            }
        }
        let done = trace.wait()?;
        Ok(Step { time: done.saturating_sub(asked), counts: Counts::read(self.pid)?.since(before) })
    }

    /// How the guest's memory is, as ballast says.
    ///
    /// # Errors
    /// It does not answer, or is QEMU.
    pub fn status(&mut self) -> Result<MemoryStatus> {
        match &mut self.way {
            Way::Ballast(runtime, client) => Ok(runtime.block_on(client.memory())?),
            Way::Qemu(_) => anyhow::bail!("QEMU tells no such thing"),
        }
    }
}
