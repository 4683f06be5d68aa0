//! Guests whose kernels do not manage all the memory that they were given.

use std::fs;
use std::path::Path;
use std::time::Duration;

use api::status::{AgedReport, MemoryStatus};
use api::units::Bytes;
use guests::{Daemon, Host, Vm, VmSettings, images};
use lab::Kernel;

/// How long a guest takes to follow a target.
const MOVING: Duration = Duration::from_secs(15);
/// How long memory takes to move from one guest to another.
const BALANCING: Duration = Duration::from_secs(30);

/// All that the guest may have is in its map from the start, and its kernel leaves some of it alone.
const BALLOON: &[&str] = &["--grow", "balloon"];

fn start(name: &str, memory: &str, cmdline: &str, arguments: &[&str]) -> Vm {
    let cmdline = format!("ballast.console {cmdline}");
    let mut vm =
        VmSettings::new(name, &images(Kernel::V6_1), memory, &cmdline).with(arguments).quiet().start();
    vm.wait_until_ready();
    vm
}

/// What the guest said when its target was reached, and since.
fn reached(vm: &Vm) -> (MemoryStatus, AgedReport) {
    // One that was made before the last pages moved says nothing of what is left.
    let reports = vm.memory().counters.reports;
    let memory = vm.wait_for_memory("its target and a report of that", MOVING, |memory| {
        memory.actual <= memory.target && memory.counters.reports > reports + 1
    });
    let report = memory.report.clone().expect("it reports");
    let total = report.statistics.total.expect("Linux tells its total");
    assert!(memory.used().expect("it reports") <= total, "{memory:#?}");
    (memory, report)
}

fn end(mut vm: Vm) {
    vm.type_in("end\n");
    vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
    assert_eq!(vm.wait_for_end(MOVING), 0);
}

fn available(report: &AgedReport) -> Bytes {
    report.statistics.available.expect("Linux tells what is available")
}

fn limited_by_its_command_line() {
    let mut vm = start("limited", "256M,min=96M,max=512M", "mem=256M", BALLOON);
    let (memory, report) = reached(&vm);
    assert!(available(&report) > Bytes::mib(90), "it is not squeezed: {memory:#?}");
    assert!(memory.used().unwrap() < Bytes::mib(150), "{memory:#?}");
    assert!(memory.unmanaged() > Bytes::mib(200), "{memory:#?}");

    vm.set_target(Bytes::mib(160));
    let (memory, report) = reached(&vm);
    assert!(memory.actual == memory.target && !memory.settled, "{memory:#?}");
    let had = (report.had.unwrap(), report.managed.unwrap());
    assert!(had.0.0.abs_diff(memory.actual.0) < Bytes::mib(4).0 && had.1 < had.0, "{memory:#?}");
    assert!(available(&report) > Bytes::mib(20), "{memory:#?}");

    vm.step("unbind:virtio_balloon", MOVING);
    let memory = vm.memory();
    assert_eq!((memory.report.as_ref(), memory.used()), (None, None), "a report dies with its driver");
    assert_eq!(memory.given, Some(Bytes::mib(512)));
    vm.step("bind:virtio_balloon", MOVING);
    let (memory, _) = reached(&vm);
    assert!(memory.actual == Bytes::mib(160) && memory.used().unwrap() < Bytes::mib(150), "{memory:#?}");
    end(vm);
}

fn with_memory_for_a_crash_kernel() {
    let vm = start("crash", "512M,min=96M", "crashkernel=160M", BALLOON);
    vm.set_target(Bytes::mib(256));
    let (memory, report) = reached(&vm);
    assert!(memory.unmanaged() > Bytes::mib(130), "{memory:#?}");
    assert!(available(&report) > Bytes::mib(90), "{memory:#?}");
    end(vm);
}

fn with_plugged_memory_that_is_not_on_line() {
    let vm = start("off-line", "256M,min=96M,max=1G", "memhp_default_state=offline", &["--grow", "plug"]);
    vm.set_target(Bytes::mib(700));
    let memory =
        vm.wait_for_memory("what stays off line", MOVING, |memory| memory.unmanaged() > Bytes::mib(300));
    assert!(memory.actual <= Bytes::mib(330) && memory.ceiling() <= Bytes::mib(330), "{memory:#?}");
    assert!(memory.used().unwrap() < Bytes::mib(200), "{memory:#?}");
    vm.set_target(Bytes::mib(160));
    let (memory, report) = reached(&vm);
    assert_eq!(memory.plug.unwrap().plugged, Bytes::ZERO);
    assert_eq!((memory.actual, memory.unmanaged()), (Bytes::mib(160), Bytes::ZERO));
    assert!(available(&report) > Bytes::mib(20), "{memory:#?}");
    end(vm);
}

/// A file as a disk, which ends with a whole block.
fn as_disk(directory: &Path, file: &Path) -> String {
    const BLOCK: usize = 4096;
    let mut content = fs::read(file).expect("it is here");
    content.resize(content.len().next_multiple_of(BLOCK), 0);
    let path = directory.join(file.file_name().expect("a name"));
    fs::write(&path, content).expect("room");
    format!("{},format=raw,readonly", path.display())
}

/// A kernel crashes, and the one that takes over has 160 of the 512 MiB, and a balloon's driver.
#[test]
fn a_kernel_that_looks_at_a_crash_is_not_squeezed() {
    Host::new().guest(Kernel::V6_1).memory(Bytes::gib(3)).usually(Duration::from_secs(120)).run(|| {
        let images = images(Kernel::V6_1);
        let directory = tempfile::tempdir().expect("a directory");
        let (kernel, initrd) =
            (as_disk(directory.path(), &images.bzimage), as_disk(directory.path(), &images.agent_initrd));
        let cmdline = "ballast.console crashkernel=160M";
        let mut settings = VmSettings::new("crashes", &images, "512M,min=96M", cmdline).with(BALLOON);
        settings.initrd = images.agent_initrd.clone();
        let mut vm = settings.with(&["--disk", &kernel, "--disk", &initrd]).start();
        vm.wait_until_ready();
        vm.step("capture:vda:vdb", MOVING);
        vm.set_target(Bytes::mib(128));
        vm.type_in("set:/proc/sysrq-trigger:c\n");
        vm.wait_for_line("sysrq triggered crash", MOVING);
        let ready = vm.wait_until_ready();
        assert!(ready.contains("cpus=1"), "{ready}");

        let (memory, report) = reached(&vm);
        assert!(report.managed.unwrap() < Bytes::mib(160), "{memory:#?}");
        assert!(memory.unmanaged() > Bytes::mib(330), "{memory:#?}");
        // The balloon takes what is beyond the target of the memory that is kept for it, not of all.
        assert!(available(&report) > Bytes::mib(45), "{memory:#?}");
        end(vm);
    });
}

#[test]
fn what_a_kernel_does_not_manage_is_no_use_and_no_balloons() {
    Host::new().guest(Kernel::V6_1).memory(Bytes::gib(3)).usually(Duration::from_secs(120)).run(|| {
        limited_by_its_command_line();
        with_memory_for_a_crash_kernel();
        with_plugged_memory_that_is_not_on_line();
    });
}

#[test]
fn a_guest_that_can_not_use_it_is_given_nothing_that_others_need() {
    Host::new().guest(Kernel::V6_1).memory(Bytes::gib(3)).usually(Duration::from_secs(120)).run(|| {
        let daemon = Daemon::start(Bytes::mib(608));
        let limited = start("limited", "256M,min=96M,max=512M", "mem=256M", BALLOON);
        let mut needy = start("needy", "208M,min=96M,max=512M", "", BALLOON);
        needy.step("grow:250M:10s", BALANCING);
        needy.wait_for_memory("what it needs", BALANCING, |memory| memory.actual >= Bytes::mib(350));
        let memory = limited.memory();
        assert!(memory.target <= Bytes::mib(256), "it is not grown: {memory:#?}");
        assert!(memory.used().unwrap() < Bytes::mib(150), "{memory:#?}");
        let state = daemon.state().expect("it answers");
        let view = state.vms.iter().find(|vm| vm.name == "limited").and_then(|vm| vm.memory.clone());
        let view = view.expect("it is known");
        assert!(view.unmanaged > Bytes::mib(200) && view.charge <= Bytes::mib(270), "{view:#?}");
        end(limited);
        end(needy);
    });
}
