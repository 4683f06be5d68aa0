//! How fast a balloon takes memory and gives it back, for ballast and QEMU in the same run.
//!
//! A guest of 1 GiB has touched and freed 700 MiB; then 512 MiB are taken, given back, and taken
//! again. A step begins when the VMM is asked and ends when the driver writes into its
//! configuration space how much the balloon holds. The host's kernel traces that write, so that
//! nobody has to ask the VMM meanwhile.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ::balloon::units::Bytes;
use anyhow::{Context, Result, bail, ensure};
use lab::GuestImages;
use rustix::time::{ClockId, clock_gettime};

const TRACING: &str = "/sys/kernel/tracing";
const KVM: &str = "/sys/kernel/debug/kvm";
const GUEST: Bytes = Bytes::gib(1);
/// What the balloon takes.
const TAKEN: Bytes = Bytes::mib(512);
/// What the guest touches and frees first, one step a line.
const LOAD: [&str; 2] = ["grow:700M", "release"];
/// Between two looks for the end of a step; the looks are not what is measured.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Virtual time after which a step counts as stuck.
const STUCK: Duration = Duration::from_secs(60);
/// Where VMs' sockets lie in the emulated host.
const SOCKETS: &str = "/run/ballast";
const QMP: &str = "/run/qmp";
/// Where the measured speeds lie afterwards, as `ballast sim --speeds` reads them. They are virtual:
/// 1e9 instructions a second, which a processor of today beats two or three times over.
pub const SPEEDS: &str = "/tmp/speeds.json";

/// Who holds the balloon.
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
    pub time: Duration,
    /// Page faults that KVM has resolved.
    pub faults: u64,
    /// Times that KVM asked vCPUs to flush their TLBs.
    pub flushes: u64,
    /// VM exits.
    pub exits: u64,
}

/// The three steps.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// Guest memory that huge pages of the host back before the first step.
    pub huge: Bytes,
    /// 512 MiB taken for the first time.
    pub inflate: Step,
    /// Given back.
    pub deflate: Step,
    /// Taken again.
    pub again: Step,
}

impl Steps {
    /// Bytes a second, as JSON.
    fn speeds(&self) -> String {
        let speed = |step: Step| (TAKEN.0 as f64 / step.time.as_secs_f64()) as u64;
        format!("{{\"inflate\": {}, \"deflate\": {}}}\n", speed(self.inflate), speed(self.deflate))
    }
}

/// Measures one VMM with a guest that does, or does not, fill pages with zeros when it takes them.
///
/// # Errors
/// Where the VM can't be started or does not do as it is asked.
pub fn measure(vmm: Vmm, images: &GuestImages, init_on_alloc: bool) -> Result<Steps> {
    // Each VM finds the host's memory in large pieces, whatever the one before left.
    fs::write("/proc/sys/vm/compact_memory", "1")?;
    let mut vm = Vm::start(vmm, images, init_on_alloc)?;
    for step in LOAD {
        vm.type_in(step)?;
        vm.wait_for(&format!("DONE {step}"))?;
    }
    let mut balloon = Balloon::connect(vmm)?;
    let huge = huge_pages(vm.child.id())?;
    Ok(Steps {
        huge,
        inflate: balloon.hold(TAKEN)?,
        deflate: balloon.hold(Bytes::ZERO)?,
        again: balloon.hold(TAKEN)?,
    })
}

/// What of a process's memory is in huge pages.
fn huge_pages(pid: u32) -> Result<Bytes> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = smaps.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("no AnonHugePages")?;
    Ok(Bytes::kib(kib.parse()?))
}

/// A VM and its console.
struct Vm {
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
    fn start(vmm: Vmm, images: &GuestImages, init_on_alloc: bool) -> Result<Self> {
        let cmdline = format!(
            "console=ttyS0 reboot=t panic=-1 quiet ballast.console init_on_alloc={}",
            u8::from(init_on_alloc)
        );
        let mut command = match vmm {
            Vmm::Ballast => ballast(images, &cmdline),
            Vmm::Qemu => microvm(images, &cmdline),
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{vmm:?} can't be started"))?;
        let console = BufReader::new(child.stdout.take().context("its output is piped")?);
        let input = child.stdin.take().context("its input is piped")?;
        let mut vm = Self { child, console, input };
        vm.wait_for("READY")?;
        Ok(vm)
    }

    fn type_in(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}")?;
        Ok(self.input.flush()?)
    }

    fn wait_for(&mut self, word: &str) -> Result<()> {
        let (mut line, mut said) = (Vec::new(), String::new());
        while self.console.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            if text.contains(word) {
                return Ok(());
            }
            said.push_str(&text);
            line.clear();
        }
        bail!("it ended before its guest said {word}; it said:\n{said}")
    }
}

fn ballast(images: &GuestImages, cmdline: &str) -> Command {
    let mut command = Command::new(lab::ballast());
    // Without reporting: nothing but the balloon moves memory.
    command.args(["run", "--name", "bench", "--memory", "1G,min=128M", "--no-free-page-reporting"]);
    command.args(["--cmdline", cmdline]).arg("--kernel").arg(&images.bzimage);
    command.arg("--initrd").arg(&images.initrd);
    command
}

fn microvm(images: &GuestImages, cmdline: &str) -> Command {
    let mut command = Command::new(crate::QEMU);
    command.args([
        "-M",
        "microvm,accel=kvm",
        "-global",
        "virtio-mmio.force-legacy=off",
        "-cpu",
        "host",
        "-m",
        "1024",
        "-nodefaults",
        "-no-user-config",
    ]);
    command.args(["-display", "none", "-serial", "stdio", "-no-reboot", "-append", cmdline]);
    command.args(["-device", "virtio-balloon-device", "-qmp", &format!("unix:{QMP},server=on,wait=off")]);
    command.arg("-kernel").arg(&images.bzimage).arg("-initrd").arg(&images.initrd);
    command
}

/// The way to a VM's balloon.
struct Balloon {
    vmm: Vmm,
    socket: BufReader<UnixStream>,
}

impl Balloon {
    fn connect(vmm: Vmm) -> Result<Self> {
        let path = match vmm {
            Vmm::Ballast => format!("{SOCKETS}/bench.sock"),
            Vmm::Qemu => QMP.to_owned(),
        };
        let stream = UnixStream::connect(&path).with_context(|| format!("{path} can't be connected to"))?;
        let mut balloon = Self { vmm, socket: BufReader::new(stream) };
        if vmm == Vmm::Qemu {
            balloon.line()?;
            balloon.say("{\"execute\": \"qmp_capabilities\"}\n")?;
            balloon.line()?;
        }
        Ok(balloon)
    }

    /// Has the balloon hold `amount` and measures that.
    fn hold(&mut self, amount: Bytes) -> Result<Step> {
        let trace = Trace::start(amount)?;
        let before = Counts::read()?;
        let asked = now();
        let target = (GUEST - amount).0;
        match self.vmm {
            Vmm::Ballast => {
                let body = format!("{{\"target\":{target}}}");
                let length = body.len();
                self.say(&format!(
                    "PUT /memory/target HTTP/1.1\r\nHost: vm\r\nContent-Type: application/json\r\n\
                     Content-Length: {length}\r\n\r\n{body}"
                ))?;
                let status = self.line()?;
                ensure!(status.contains(" 20"), "the target was refused: {status}");
                // The next answer is read from its start.
                let head = status;
                self.rest_of_answer(head)?;
            }
            Vmm::Qemu => {
                self.say(&format!("{{\"execute\": \"balloon\", \"arguments\": {{\"value\": {target}}}}}\n"))?;
            }
        }
        let done = trace.wait()?;
        let after = Counts::read()?;
        Ok(Step {
            time: done.saturating_sub(asked),
            faults: after.faults - before.faults,
            flushes: after.flushes - before.flushes,
            exits: after.exits - before.exits,
        })
    }

    fn say(&mut self, text: &str) -> Result<()> {
        Ok(self.socket.get_mut().write_all(text.as_bytes())?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.socket.read_line(&mut line)?;
        Ok(line)
    }

    /// Reads an HTTP answer to its end.
    fn rest_of_answer(&mut self, status: String) -> Result<()> {
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
        Ok(std::io::Read::read_exact(&mut self.socket, &mut body)?)
    }
}

/// CLOCK_MONOTONIC, which stamps the trace as well.
fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Waits for the driver's word that the balloon holds so much.
struct Trace;

impl Trace {
    fn start(amount: Bytes) -> Result<Self> {
        let set = |file: &str, value: &str| {
            let path = Path::new(TRACING).join(file);
            fs::write(&path, value).with_context(|| format!("{} can't be set to {value}", path.display()))
        };
        let event = "events/kvm/kvm_mmio";
        set(&format!("{event}/enable"), "0")?;
        set("trace_clock", "mono")?;
        set("trace", "")?;
        // A write (2) to a device's configuration space, of this value.
        let filter = format!("type == 2 && gpa & 0x100 && val == {}", amount.pages().0);
        set(&format!("{event}/filter"), &filter)?;
        set(&format!("{event}/enable"), "1")?;
        set("tracing_on", "1")?;
        Ok(Self)
    }

    /// When it came.
    fn wait(self) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let trace = fs::read_to_string(Path::new(TRACING).join("trace"))?;
            if let Some(line) = trace.lines().find(|line| line.contains(": kvm_mmio: ")) {
                return stamp(line).with_context(|| format!("no time in `{line}`"));
            }
            ensure!(start.elapsed() < STUCK, "the balloon did not get there in {STUCK:?}");
            thread::sleep(LOOK_AGAIN);
        }
    }
}

/// The time in a line such as `vcpu0-99 [000] ..... 12.345678: kvm_mmio: ...`.
fn stamp(line: &str) -> Option<Duration> {
    let (front, _) = line.split_once(": kvm_mmio: ")?;
    front.split_whitespace().next_back()?.parse().ok().map(Duration::from_secs_f64)
}

/// KVM's own counters, over all VMs of the host, of which there is one.
struct Counts {
    faults: u64,
    flushes: u64,
    exits: u64,
}

impl Counts {
    fn read() -> Result<Self> {
        let count = |name: &str| -> Result<u64> {
            let path = Path::new(KVM).join(name);
            let text =
                fs::read_to_string(&path).with_context(|| format!("{} can't be read", path.display()))?;
            Ok(text.trim().parse()?)
        };
        Ok(Self {
            faults: count("pf_fixed")?,
            flushes: count("remote_tlb_flush_requests")?,
            exits: count("exits")?,
        })
    }
}

/// Measures both VMMs with both guests, and prints what they took.
///
/// # Errors
/// As [`measure`].
pub fn compare(images: &GuestImages) -> Result<()> {
    println!("Balloon: 1 GiB guest, 700 MiB touched and freed, then 512 MiB taken, given back, taken again");
    println!(
        "                             V s: virtual seconds; faults: fixed by KVM; flushes: TLB flush requests"
    );
    for init_on_alloc in [true, false] {
        for vmm in [Vmm::Ballast, Vmm::Qemu] {
            let steps = measure(vmm, images, init_on_alloc).with_context(|| format!("{vmm:?}"))?;
            let zeroing = if init_on_alloc { "zeroing guest" } else { "init_on_alloc=0" };
            let name = match vmm {
                Vmm::Ballast => "ballast",
                Vmm::Qemu => "QEMU",
            };
            println!("{name:<8} {zeroing:<16} has {} in huge pages", steps.huge);
            if vmm == Vmm::Ballast && init_on_alloc {
                fs::write(SPEEDS, steps.speeds())?;
            }
            for (step, what) in
                [(steps.inflate, "inflate"), (steps.deflate, "deflate"), (steps.again, "again")]
            {
                println!(
                    "{name:<8} {zeroing:<16} {what:<8} {:>8.4} V s {:>8} faults {:>8} flushes {:>8} exits",
                    step.time.as_secs_f64(),
                    step.faults,
                    step.flushes,
                    step.exits
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_tells_its_time() {
        let line = "           vcpu0-99      [000] .....    12.345678: kvm_mmio: mmio write len 4 gpa 0x104 val 0x20000";
        assert_eq!(stamp(line), Some(Duration::from_micros(12_345_678)));
    }
}
