//! What the emulated host's kernel says of a VM: when its driver spoke to a device, and what KVM and
//! the processor did meanwhile. Nobody asks the VMM itself, which would cost it time.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ::api::units::Bytes;
use anyhow::{Context, Result, ensure};
use rustix::time::{ClockId, clock_gettime};

const TRACING: &str = "/sys/kernel/tracing";
const KVM: &str = "/sys/kernel/debug/kvm";
/// Where interrupt controllers lie in guest memory, which are no devices.
pub const INTERRUPT_CONTROLLERS: Range<u64> = 0xfec0_0000..0xfef0_0000;
/// Registers of two devices never lie in the same page.
pub const PAGE: u64 = 0x1000;
/// Between two looks at the trace, which take a processor that the VM could have had.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Virtual time after which a step counts as stuck.
const STUCK: Duration = Duration::from_secs(60);

/// A driver's write to a device that ends a step.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// The first write of the number of pages in so much memory to a device.
    Says(Bytes),
    /// The last write to the device that was written to most, once so much time
    /// has gone by without another.
    Quiet(Duration),
}

/// CLOCK_MONOTONIC, which stamps the trace as well.
pub fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Sets a file of the tracer to a value.
///
/// # Errors
/// Where this host can't trace.
pub fn set(file: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACING).join(file);
    fs::write(&path, value).with_context(|| format!("{} can't be set to {value}", path.display()))
}

/// What was traced.
///
/// # Errors
/// Where it can't be read.
pub fn read() -> Result<String> {
    fs::read_to_string(Path::new(TRACING).join("trace")).context("the trace can't be read")
}

/// Waits for a driver's word.
pub struct Trace {
    end: End,
    started: Duration,
}

impl Trace {
    /// Begins to look for `end`.
    ///
    /// # Errors
    /// Where this host can't trace.
    pub fn start(end: End) -> Result<Self> {
        let event = "events/kvm/kvm_mmio";
        set(&format!("{event}/enable"), "0")?;
        set("trace_clock", "mono")?;
        set("trace", "")?;
        // Writes (2) alone: of this value, or of any.
        let Range { start, end: behind } = INTERRUPT_CONTROLLERS;
        let filter = match end {
            End::Says(amount) => format!("type == 2 && val == {}", amount.pages().0),
            End::Quiet(_) => format!("type == 2 && (gpa < {start} || gpa >= {behind})"),
        };
        set(&format!("{event}/filter"), &filter)?;
        set(&format!("{event}/enable"), "1")?;
        set("tracing_on", "1")?;
        Ok(Self { end, started: now() })
    }

    /// When it came.
    ///
    /// # Errors
    /// It does not come.
    pub fn wait(self) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let trace = read()?;
            let writes: Vec<(Duration, u64)> = trace.lines().filter_map(write).collect();
            let at = match self.end {
                End::Says(_) => writes.first().map(|(at, _)| *at),
                End::Quiet(_) => last_to_the_busiest(&writes),
            };
            match (self.end, at) {
                (End::Says(_), Some(at)) => return Ok(at),
                (End::Quiet(time), at) if now().saturating_sub(at.unwrap_or(self.started)) > time => {
                    return at.context("the driver did nothing at all");
                }
                _ => {}
            }
            ensure!(start.elapsed() < STUCK, "the driver did not get there in {STUCK:?}");
            thread::sleep(LOOK_AGAIN);
        }
    }
}

/// Time and address in `vcpu0-99 [000] ..... 12.345678: kvm_mmio: mmio write len 4 gpa 0x104 val 0x2`.
fn write(line: &str) -> Option<(Duration, u64)> {
    let (_, back) = line.split_once(": kvm_mmio: ")?;
    let at = moment(line, ": kvm_mmio: ")?;
    let (_, address) = back.split_once("gpa 0x")?;
    Some((at, u64::from_str_radix(address.split_whitespace().next()?, 16).ok()?))
}

/// When an event was: the last word in front of its name.
fn moment(line: &str, name: &str) -> Option<Duration> {
    let (front, _) = line.split_once(name)?;
    front.split_whitespace().next_back()?.parse().ok().map(Duration::from_secs_f64)
}

/// When the device that was written to most was written to last: a driver of random numbers may
/// ask for some at any time.
fn last_to_the_busiest(writes: &[(Duration, u64)]) -> Option<Duration> {
    let device = |address: u64| address / PAGE;
    let count = |of: u64| writes.iter().filter(|(_, address)| device(*address) == of).count();
    let devices: BTreeSet<u64> = writes.iter().map(|(_, address)| device(*address)).collect();
    let busiest = devices.into_iter().max_by_key(|of| count(*of))?;
    writes.iter().rev().find(|(_, address)| device(*address) == busiest).map(|(at, _)| *at)
}

/// Waits for the moment when the next VM enters its guest for the first time.
pub struct FirstEntry(());

impl FirstEntry {
    const EVENT: &str = "events/kvm/kvm_entry";

    /// Begins to look.
    ///
    /// # Errors
    /// Where this host can't trace.
    pub fn watch() -> Result<Self> {
        set("trace_clock", "mono")?;
        set("trace", "")?;
        set(&format!("{}/enable", Self::EVENT), "1")?;
        // The rest would only fill the buffer, and push the first out of it.
        set(&format!("{}/trigger", Self::EVENT), "traceoff")?;
        set("tracing_on", "1")?;
        Ok(Self(()))
    }

    /// When it was.
    ///
    /// # Errors
    /// No VM has entered a guest, or this host can't trace.
    pub fn time(self) -> Result<Duration> {
        set(&format!("{}/trigger", Self::EVENT), "!traceoff")?;
        set(&format!("{}/enable", Self::EVENT), "0")?;
        let line = read()?;
        line.lines().find_map(|line| moment(line, ": kvm_entry: ")).context("no guest was entered")
    }
}

/// What has been counted of the one VM of this host.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// Time that the VM's threads had a processor.
    pub busy: Duration,
    /// Page faults that KVM has resolved.
    pub faults: u64,
    /// Times that KVM asked vCPUs to flush their TLBs.
    pub flushes: u64,
    /// VM exits.
    pub exits: u64,
    /// Those of them that are accesses to ports.
    pub ports: u64,
}

impl Counts {
    /// The counts by now, of the VM that is the process `pid`.
    ///
    /// # Errors
    /// Where the kernel does not count.
    pub fn read(pid: u32) -> Result<Self> {
        let count = |name: &str| -> Result<u64> {
            let path = Path::new(KVM).join(name);
            let text =
                fs::read_to_string(&path).with_context(|| format!("{} can't be read", path.display()))?;
            Ok(text.trim().parse()?)
        };
        Ok(Self {
            busy: busy(pid)?,
            faults: count("pf_fixed")?,
            flushes: count("remote_tlb_flush_requests")?,
            exits: count("exits")?,
            ports: count("io_exits")?,
        })
    }

    /// What has come since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            busy: self.busy.saturating_sub(before.busy),
            faults: self.faults - before.faults,
            flushes: self.flushes - before.flushes,
            exits: self.exits - before.exits,
            ports: self.ports - before.ports,
        }
    }
}

/// The first number in each thread's `schedstat`: nanoseconds on a processor.
fn busy(pid: u32) -> Result<Duration> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        let time = text.split_whitespace().next().context("an empty schedstat")?;
        sum += time.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_tells_when_the_device_that_matters_was_written_to() {
        let line = |at: &str, gpa: &str| {
            format!("      vcpu0-99      [000] .....    {at}: kvm_mmio: mmio write len 4 gpa 0x{gpa} val 0x2")
        };
        let lines = [
            line("12.000001", "d0001050"),
            line("12.345678", "d0001064"),
            line("12.5", "d0000050"),
            "# tracer: nop".to_owned(),
        ];
        let writes: Vec<_> = lines.iter().filter_map(|line| write(line)).collect();
        assert_eq!(writes[0], (Duration::from_micros(12_000_001), 0xd000_1050));
        assert_eq!(writes.len(), 3);
        assert_eq!(last_to_the_busiest(&writes), Some(Duration::from_micros(12_345_678)));
        assert_eq!(last_to_the_busiest(&[]), None);
    }
}
