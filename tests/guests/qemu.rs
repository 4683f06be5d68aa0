//! A VM in QEMU, beside ballast's: the program that Debian ships.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use api::units::Bytes;
use lab::{GuestImages, inside};

use crate::lines::Printed;
use crate::vm::Vm;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// What QEMU's microvm machine reads at its start.
const QEMU_FILES: &[&str] = &[
    "/usr/share/seabios/bios-microvm.bin",
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qemu/pvh.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    // And its PC.
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
];

/// QEMU as it is installed here, each file at its own path.
///
/// # Errors
/// Where it is not installed.
pub fn qemu_with_libraries() -> Result<Vec<(PathBuf, String)>> {
    let files = QEMU_FILES.iter().copied().filter(|path| Path::new(path).exists());
    let files = files.map(|path| (PathBuf::from(path), path.to_owned()));
    Ok(with_libraries(QEMU, "qemu-system-x86")?.into_iter().chain(files).collect())
}

/// A program of this machine with its libraries, each file at its own path.
///
/// # Errors
/// Where it is not installed, which `package` would do.
pub fn with_libraries(program: &str, package: &str) -> Result<Vec<(PathBuf, String)>> {
    let output = Command::new("ldd").arg(program).output().context("ldd can't be run")?;
    ensure!(output.status.success(), "{program} is missing: install {package}");
    let libraries = String::from_utf8(output.stdout)?;
    // `name => /path (address)`, or `/path (address)` for the loader.
    let libraries =
        libraries.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    let all = [program].into_iter().chain(libraries);
    Ok(all.map(|path| (PathBuf::from(path), path.to_owned())).collect())
}

/// How a QEMU VM is started.
#[derive(Clone, Debug)]
pub struct QemuSettings {
    /// Its name.
    pub name: String,
    /// What it boots.
    pub images: GuestImages,
    /// Its memory.
    pub memory: Bytes,
    /// What stands on the kernel's command line behind `console=ttyS0 panic=-1 quiet`.
    pub cmdline: String,
    /// Where its sockets go: `NAME.qmp` for the balancer.
    pub directory: PathBuf,
    /// Whether it is a PC with PCI, not a microvm.
    pub is_pc: bool,
    /// Further arguments of QEMU.
    pub arguments: Vec<String>,
    /// Whether what it says is printed.
    pub printed: Printed,
}

impl QemuSettings {
    /// A guest of the lab with a balloon.
    pub fn new(name: &str, images: &GuestImages, memory: Bytes, cmdline: &str, directory: &Path) -> Self {
        Self {
            name: name.to_owned(),
            images: images.clone(),
            memory,
            cmdline: cmdline.to_owned(),
            directory: directory.to_owned(),
            is_pc: false,
            arguments: Vec::new(),
            printed: Printed::Yes,
        }
    }

    /// As a PC (q35), with its devices on PCI.
    pub fn q35(mut self) -> Self {
        self.is_pc = true;
        self
    }

    /// Adds arguments of QEMU.
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Starts it: with KVM on an emulated host, and emulated all the way elsewhere, where
    /// a stock kernel boots on a PC alone (it finds no clock to go by on a microvm).
    ///
    /// # Panics
    /// Where QEMU can't be run.
    pub fn start(&self) -> Qemu {
        let socket = self.directory.join(&self.name).with_extension("qmp");
        let mut command = Command::new(QEMU);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
        ]);
        if inside() && self.is_pc {
            command.args(["-M", "q35,accel=kvm", "-cpu", "host"]);
            command.args(["-device", "virtio-balloon-pci,id=balloon,deflate-on-oom=on"]);
        } else if inside() {
            // Without a clock Linux would look for one by some 40 thousand accesses.
            command.args(["-M", "microvm,accel=kvm,rtc=on", "-cpu", "host"]);
            command.args(["-global", "virtio-mmio.force-legacy=off"]);
            command.args(["-device", "virtio-balloon-device,id=balloon,deflate-on-oom=on"]);
        } else {
            command.args(["-M", "q35,accel=tcg"]);
            command.args(["-device", "virtio-balloon-pci,deflate-on-oom=on"]);
        }
        command.args(["-m", &format!("{}M", self.memory.0 >> 20)]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.arg("-kernel").arg(&self.images.bzimage).arg("-initrd").arg(&self.images.initrd);
        command.args(["-append", &format!("console=ttyS0 panic=-1 quiet {}", self.cmdline)]);
        command.args(&self.arguments);
        Qemu { vm: Vm::spawn(&self.name, command, self.printed), socket }
    }
}

/// A QEMU VM that runs. It is killed where a test drops it.
pub struct Qemu {
    vm: Vm,
    socket: PathBuf,
}

impl Qemu {
    /// The socket of its machine protocol, which serves one client at a time.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Deref for Qemu {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.vm
    }
}

impl DerefMut for Qemu {
    fn deref_mut(&mut self) -> &mut Vm {
        &mut self.vm
    }
}
