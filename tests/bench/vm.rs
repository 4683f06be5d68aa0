//! A VM to measure: its console, and the way to its memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use ::api::status::MemoryStatus;
use ::api::units::Bytes;
use anyhow::{Context, Result, bail, ensure};
use lab::GuestImages;

use crate::trace::{Counts, End, Trace, now};

/// Where ballast's sockets lie in the emulated host.
const API: &str = "/run/ballast/bench.sock";
/// Where QEMU's does.
const QMP: &str = "/run/qmp";

/// Which program runs a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// `ballast run`.
    Ballast,
    /// QEMU's microvm machine.
    Qemu,
}

/// What one step cost.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// From the request to the driver's word that it is done.
    pub time: std::time::Duration,
    /// What was counted meanwhile.
    pub counts: Counts,
}

/// A guest that takes steps from its console.
pub struct Vm {
    child: Child,
    console: BufReader<ChildStdout>,
    input: ChildStdin,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    /// Starts `ballast run` with these further arguments.
    ///
    /// # Errors
    /// It does not start.
    pub fn ballast(images: &GuestImages, memory: &str, cmdline: &str, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(lab::ballast());
        command.args(["run", "--name", "bench", "--memory", memory]).args(arguments);
        command.args(["--cmdline", &whole(cmdline)]).arg("--kernel").arg(&images.bzimage);
        command.arg("--initrd").arg(&images.initrd);
        Self::spawn(command)
    }

    /// Starts QEMU's microvm machine with so many MiB.
    ///
    /// # Errors
    /// It does not start.
    pub fn microvm(images: &GuestImages, mib: &str, cmdline: &str) -> Result<Self> {
        let mut command = Command::new(crate::QEMU);
        command.args(["-M", "microvm,accel=kvm", "-global", "virtio-mmio.force-legacy=off", "-cpu", "host"]);
        command.args(["-m", mib, "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
        command.args(["-no-reboot", "-append", &whole(cmdline), "-device", "virtio-balloon-device"]);
        command.args(["-qmp", &format!("unix:{QMP},server=on,wait=off")]);
        command.arg("-kernel").arg(&images.bzimage).arg("-initrd").arg(&images.initrd);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Result<Self> {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("{:?} can't be started", command.get_program()))?;
        let console = BufReader::new(child.stdout.take().context("its output is piped")?);
        let input = child.stdin.take().context("its input is piped")?;
        let mut vm = Self { child, console, input };
        vm.wait_for("READY")?;
        Ok(vm)
    }

    /// The process that is it.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has the guest do a step of its load, and waits until it has.
    ///
    /// # Errors
    /// It ends first.
    pub fn step(&mut self, step: &str) -> Result<()> {
        writeln!(self.input, "{step}")?;
        self.input.flush()?;
        self.wait_for(&format!("DONE {step}"))
    }

    fn wait_for(&mut self, word: &str) -> Result<()> {
        let (mut line, mut said) = (Vec::new(), String::new());
        while self.console.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            if text.contains(word) {
                return Ok(());
            }
            ensure!(!text.starts_with("ERROR"), "the guest says: {text}");
            said.push_str(&text);
            line.clear();
        }
        bail!("it ended before its guest said {word}; it said:\n{said}")
    }
}

fn whole(cmdline: &str) -> String {
    format!("console=ttyS0 reboot=t panic=-1 quiet ballast.console {cmdline}")
}

/// The way to a VM's memory.
pub struct Memory {
    vmm: Vmm,
    pid: u32,
    socket: BufReader<UnixStream>,
}

impl Memory {
    /// Connects to the VM.
    ///
    /// # Errors
    /// It does not answer.
    pub fn connect(vmm: Vmm, vm: &Vm) -> Result<Self> {
        let path = match vmm {
            Vmm::Ballast => API,
            Vmm::Qemu => QMP,
        };
        let stream = UnixStream::connect(path).with_context(|| format!("{path} can't be connected to"))?;
        let mut memory = Self { vmm, pid: vm.pid(), socket: BufReader::new(stream) };
        if vmm == Vmm::Qemu {
            memory.line()?;
            memory.say("{\"execute\": \"qmp_capabilities\"}\n")?;
            memory.line()?;
        }
        Ok(memory)
    }

    /// Asks the guest to have `target`, and measures until `end`.
    ///
    /// # Errors
    /// The VMM refuses, or the guest does not get there.
    pub fn reach(&mut self, target: Bytes, end: End) -> Result<Step> {
        let trace = Trace::start(end)?;
        let before = Counts::read(self.pid)?;
        let asked = now();
        let target = target.0;
        match self.vmm {
            Vmm::Ballast => {
                let body = format!("{{\"target\":{target}}}");
                self.request("PUT /memory/target", &body)?;
            }
            Vmm::Qemu => {
                self.say(&format!("{{\"execute\": \"balloon\", \"arguments\": {{\"value\": {target}}}}}\n"))?;
            }
        }
        let done = trace.wait()?;
        Ok(Step { time: done.saturating_sub(asked), counts: Counts::read(self.pid)?.since(before) })
    }

    /// How the guest's memory is, as ballast says.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&mut self) -> Result<MemoryStatus> {
        let body = self.request("GET /memory", "")?;
        serde_json::from_slice(&body).context("the answer is no memory status")
    }

    fn say(&mut self, text: &str) -> Result<()> {
        Ok(self.socket.get_mut().write_all(text.as_bytes())?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.socket.read_line(&mut line)?;
        Ok(line)
    }

    /// One request of HTTP, and the body of the answer.
    fn request(&mut self, what: &str, body: &str) -> Result<Vec<u8>> {
        let length = body.len();
        self.say(&format!(
            "{what} HTTP/1.1\r\nHost: vm\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        ))?;
        let status = self.line()?;
        ensure!(status.contains(" 20"), "{what} was refused: {status}");
        let (mut length, mut line) = (0, status);
        while !line.trim().is_empty() {
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse()?;
            }
            line = self.line()?;
        }
        let mut body = vec![0; length];
        self.socket.read_exact(&mut body)?;
        Ok(body)
    }
}
