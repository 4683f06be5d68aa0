//! How fast memory is taken from a guest and given back: by balloon, for ballast and for QEMU, and
//! by ballast's other means, virtio-mem and free page reporting.
//!
//! A guest of 1 GiB has touched and freed 700 MiB; then 512 MiB are taken, given back, and taken
//! again. All devices are on the mmio transport, as QEMU's microvm has no other. By balloon, a step begins when the VMM is asked and ends when the driver writes into its
//! configuration space how much the balloon holds. A virtio-mem or reporting driver says nothing of
//! the kind: there a step ends with its last write to the device. The host's kernel traces those
//! writes, so that nobody has to ask the VMM meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use ::api::units::Bytes;
use anyhow::{Result, ensure};
use guests::{Of, Printed, QemuSettings, Vm, sum};
use lab::{GuestImages, Kernel};

use crate::trace::{Counts, End, Trace, now};
use crate::vm::{Memory, Step, Transport, USUALLY, guest};

const GUEST: Bytes = Bytes::gib(1);
/// What is taken.
const TAKEN: Bytes = Bytes::mib(512);
/// What the guest touches and frees first, one step a line.
const LOAD: [&str; 2] = ["grow:700M", "release"];
/// A virtio-mem driver that writes nothing for so long has done what it will do.
const UNPLUGGED: Duration = Duration::from_millis(500);
/// Linux reports free pages 2 s after they came to be free (`PAGE_REPORTING_DELAY`).
const REPORTED: Duration = Duration::from_secs(5);
/// Where a run's measured speeds lie afterwards, as `ballast sim --speeds` reads them. They are virtual:
/// 1e9 instructions a second, which a processor of today beats two or three times over.
pub const SPEEDS: &str = "/tmp/speeds.json";

/// Measures ballast's balloon with a guest that fills pages with zeros when it takes them, as
/// Debian's do, and leaves the speeds behind.
///
/// # Errors
/// Where the VM can't be started or does not do as it is asked; so all here.
pub fn zeroing() -> Result<()> {
    let [inflate, deflate, _] = by_ballast(true)?;
    leave_speeds([("inflate", inflate), ("deflate", deflate)])
}

/// Leaves behind how fast what was taken moved, in bytes a second.
fn leave_speeds(steps: [(&str, Step); 2]) -> Result<()> {
    let speed = |step: Step| (TAKEN.0 as f64 / step.time.as_secs_f64()) as u64;
    let speeds = BTreeMap::from(steps.map(|(name, step)| (name, speed(step))));
    Ok(fs::write(SPEEDS, serde_json::to_vec(&speeds)?)?)
}

/// The same with `init_on_alloc=0`.
///
/// # Errors
/// As [`zeroing`].
pub fn plain() -> Result<()> {
    by_ballast(false).map(drop)
}

/// QEMU's balloon with a guest that fills pages with zeros.
///
/// # Errors
/// As [`zeroing`].
pub fn qemu_zeroing() -> Result<()> {
    by_qemu(true)
}

/// The same with `init_on_alloc=0`.
///
/// # Errors
/// As [`zeroing`].
pub fn qemu_plain() -> Result<()> {
    by_qemu(false)
}

fn by_ballast(init_on_alloc: bool) -> Result<[Step; 3]> {
    // Without reporting: nothing but the balloon moves memory.
    let arguments = ["--no-free-page-reporting"];
    let cmdline = cmdline(init_on_alloc);
    let mut vm = guest(&images()?, "1G,min=128M", &cmdline, Transport::Mmio, &arguments).start();
    by_balloon("balloon", init_on_alloc, &mut vm, Memory::of)
}

fn by_qemu(init_on_alloc: bool) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let settings = QemuSettings::new("bench", &images()?, GUEST, &cmdline(init_on_alloc), directory.path());
    let mut qemu = QemuSettings { printed: Printed::No, ..settings }.start();
    let socket = qemu.socket().to_owned();
    by_balloon("QEMU's balloon", init_on_alloc, &mut qemu, |vm| Memory::of_qemu(vm, &socket)).map(drop)
}

/// Takes, gives back and takes again.
fn by_balloon(
    name: &str,
    init_on_alloc: bool,
    vm: &mut Vm,
    way: impl FnOnce(&Vm) -> Result<Memory>,
) -> Result<[Step; 3]> {
    let guest = loaded(name, init_on_alloc, vm);
    let mut memory = way(vm)?;
    let mut hold = |what, amount| -> Result<Step> {
        let step = memory.reach(GUEST - amount, End::Says(amount))?;
        print(name, guest, what, step);
        Ok(step)
    };
    Ok([hold("take", TAKEN)?, hold("give back", Bytes::ZERO)?, hold("take again", TAKEN)?])
}

/// Has the guest touch and free memory, and says which kind of guest it is.
fn loaded(name: &str, init_on_alloc: bool, vm: &mut Vm) -> &'static str {
    vm.wait_until_ready();
    for step in LOAD {
        vm.step(step, USUALLY);
    }
    let guest = if init_on_alloc { "zeroing" } else { "plain" };
    println!("{name:<14} {guest:<7} has {} in huge pages", sum(&vm.smaps(), Of::Guest, &["AnonHugePages"]));
    guest
}

/// The same 512 MiB as memory that is plugged and unplugged.
///
/// # Errors
/// As [`zeroing`].
pub fn plug() -> Result<()> {
    for init_on_alloc in [true, false] {
        // Without reporting and statistics: nothing else writes to a device.
        let arguments =
            ["--grow", "plug", "--no-free-page-reporting", "--statistics-interval", "0", "--no-agent"];
        let limits = "512M,min=128M,max=1G";
        let mut vm = guest(&images()?, limits, &cmdline(init_on_alloc), Transport::Mmio, &arguments).start();
        vm.wait_until_ready();
        let mut memory = Memory::of(&vm)?;
        memory.reach(GUEST, End::Quiet(UNPLUGGED))?;
        let guest = loaded("virtio-mem", init_on_alloc, &mut vm);
        let mut reach = |what: &str, taken: Bytes| -> Result<Step> {
            let step = memory.reach(GUEST - taken, End::Quiet(UNPLUGGED))?;
            let status = memory.status()?;
            ensure!(status.actual == GUEST - taken, "the guest has {}: {status:#?}", status.actual);
            print("virtio-mem", guest, what, step);
            Ok(step)
        };
        let [unplug, plug] = [reach("take", TAKEN)?, reach("give back", Bytes::ZERO)?];
        reach("take again", TAKEN)?;
        // As with the balloon: a guest that zeroes, as Debian's do.
        if init_on_alloc {
            leave_speeds([("unplug", unplug), ("plug", plug)])?;
        }
    }
    Ok(())
}

/// The same 512 MiB as free pages that the guest reports. They are the guest's to use again at any
/// time: nobody gives them back.
///
/// # Errors
/// As [`zeroing`].
pub fn reporting() -> Result<()> {
    for init_on_alloc in [true, false] {
        let arguments = ["--statistics-interval", "0", "--no-agent"];
        let mut vm =
            guest(&images()?, "1G,min=128M", &cmdline(init_on_alloc), Transport::Mmio, &arguments).start();
        vm.wait_until_ready();
        let mut memory = Memory::of(&vm)?;
        // What is free from the start is reported first.
        Trace::start(End::Quiet(REPORTED))?.wait()?;
        let guest = if init_on_alloc { "zeroing" } else { "plain" };
        for what in ["take", "take again"] {
            vm.step("grow:512M", USUALLY);
            let reported = memory.status()?.counters.reported;
            vm.step("release", USUALLY);
            let trace = Trace::start(End::Quiet(REPORTED))?;
            let (before, asked) = (Counts::read(vm.pid())?, now());
            let time = trace.wait()?.saturating_sub(asked);
            let counts = Counts::read(vm.pid())?.since(before);
            let reported = memory.status()?.counters.reported.saturating_sub(reported);
            // The guest keeps some of it in lists of its own, and reports whole blocks alone.
            ensure!(reported >= TAKEN.percent(75), "only {reported} of {TAKEN} were reported");
            print("reporting", guest, what, Step { time, counts });
            println!("reporting      {guest:<7} {what:<10} reported {reported}");
        }
    }
    Ok(())
}

fn cmdline(init_on_alloc: bool) -> String {
    format!("ballast.console init_on_alloc={}", u8::from(init_on_alloc))
}

fn images() -> Result<GuestImages> {
    // Each VM finds the host's memory in large pieces, whatever the one before left.
    fs::write("/proc/sys/vm/compact_memory", "1")?;
    Ok(Kernel::V6_1.guest_images()?)
}

/// What the columns are.
pub const HEADING: &str = "\
512 MiB of a 1 GiB guest that has touched and freed 700 MiB. zeroing: init_on_alloc=1, plain: =0
time: virtual seconds from the request to the driver's last word; busy: what the VM's threads had of
the processor until all was quiet; faults: fixed by KVM; flushes: TLB flush requests of KVM";

fn print(means: &str, guest: &str, what: &str, Step { time, counts }: Step) {
    println!(
        "{means:<14} {guest:<7} {what:<10} {:>8.4} V s {:>8.4} busy {:>7} faults {:>7} flushes {:>7} exits",
        time.as_secs_f64(),
        counts.busy.as_secs_f64(),
        counts.faults,
        counts.flushes,
        counts.exits
    );
}
