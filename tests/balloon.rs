//! Memory that a guest gives up reaches the host, and comes back on first touch.

use std::fs;
use std::time::Duration;

use api::status::{DriverState, MemoryStatus};
use api::units::Bytes;
use guests::checks::balloon::{MOVE, MOVING, TOUCHING, freed_memory_comes_back, inflates_and_deflates, rss};
use guests::{Host, Vm, VmSettings, images};
use lab::Kernel;

#[test]
fn rss_follows_the_balloon_on_private_memory() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(60)).run(|| {
        inflates_and_deflates("anonymous", Kernel::V6_1, &[]);
        inflates_and_deflates("thp", Kernel::V6_1, &["--thp"]);
    });
}

#[test]
fn rss_follows_the_balloon_on_shared_memory() {
    Host::new().guest(Kernel::V6_12).nested_paging(false).usually(Duration::from_secs(60)).run(|| {
        inflates_and_deflates("memfd", Kernel::V6_12, &["--memory-backing", "memfd"]);
    });
}

/// A huge page goes only where all of it is given up: free page reporting hands over whole ones.
#[test]
fn huge_pages_go_back_whole() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(60)).run(|| {
        fs::write("/proc/sys/vm/nr_hugepages", "330").expect("the host reserves huge pages");
        let mut vm = VmSettings::new("huge", &images(Kernel::V6_1), "640M", "ballast.console")
            .with(&["--hugepages", "2M"])
            .start();
        vm.wait_until_ready();
        vm.step("grow:440M", TOUCHING);
        let before = rss(&vm);
        vm.step("release", MOVING);
        vm.wait_for_memory("reported huge pages to be given back", MOVING, |memory| {
            memory.host_rss.unwrap() < before.saturating_sub(MOVE)
        });
        rss(&vm);
    });
}

#[test]
fn a_guest_tells_all_its_statistics() {
    Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12).usually(Duration::from_secs(60)).run(|| {
        for kernel in [Kernel::V6_1, Kernel::V6_12] {
            let name = kernel.series().replace('.', "-");
            let mut vm = VmSettings::new(&name, &images(kernel), "256M", "ballast.console").start();
            vm.wait_until_ready();
            let memory = vm.wait_for_memory("a report", MOVING, |memory| memory.report.is_some());
            assert_eq!(memory.driver, DriverState::Active);
            assert_eq!(statistics(&memory), kernel.statistics(), "{memory:#?}");
            assert_report_is_plausible(&memory);
            let count = memory.counters.reports;
            vm.wait_for_memory("another report", MOVING, |memory| memory.counters.reports > count);
        }
    });
}

/// How many statistics the last report holds.
fn statistics(memory: &MemoryStatus) -> usize {
    let report = &memory.report.as_ref().expect("there is a report").statistics;
    let json = serde_json::to_value(report).expect("a report is JSON");
    let fields = json.as_object().expect("a report is an object");
    let known = fields.iter().filter(|(name, value)| *name != "unknown" && !value.is_null()).count();
    known + report.unknown.len()
}

fn assert_report_is_plausible(memory: &MemoryStatus) {
    let report = memory.report.as_ref().expect("there is a report");
    assert!(report.age_ms < 60_000, "{report:?}");
    let (total, free, available) = (
        report.statistics.total.unwrap(),
        report.statistics.free.unwrap(),
        report.statistics.available.unwrap(),
    );
    assert!(total > Bytes::mib(180) && total < Bytes::mib(256), "{total}");
    assert!(free < total && available < total, "{report:?}");
}

#[test]
fn freed_memory_comes_back_with_no_request() {
    Host::new()
        .guest(Kernel::V6_1)
        .usually(Duration::from_secs(60))
        .run(|| freed_memory_comes_back(Kernel::V6_1));
}

/// A guest whose balloon holds what it needs takes pages back and lives; one that can't give what
/// is wanted is left in peace. Neither is asked again and again (Firecracker's issue 4324).
#[test]
fn a_guest_out_of_memory_lives_and_is_left_in_peace() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(60)).run(|| {
        let images = images(Kernel::V6_1);
        let mut vm = VmSettings::new("short", &images, "320M,min=64M", "ballast.console")
            .with(&["--no-free-page-reporting", "--grow", "balloon"])
            .start();
        vm.wait_until_ready();
        let target = Bytes::mib(160);
        vm.set_target(target);
        vm.wait_for_memory("the balloon to inflate", MOVING, |memory| memory.actual == target);

        // More than is left: without the balloon's pages a process would have to die.
        vm.step("grow:140M", MOVING);
        let memory = vm.memory();
        assert!(memory.actual > target && memory.settled, "{memory:#?}");
        assert_in_peace(&mut vm);

        // The guest holds what it would have to give.
        vm.set_target(Bytes::mib(64));
        let memory = vm.wait_for_memory("the guest to give up", MOVING, |memory| memory.settled);
        assert!(memory.actual > memory.target, "{memory:#?}");
        assert_in_peace(&mut vm);

        vm.step("release", MOVING);
        vm.set_target(target);
        let there = vm.wait_for_memory("the balloon", MOVING, |memory| memory.actual == target);
        assert!(!there.settled);
        vm.type_in("end\n");
        vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
    });
}

/// The driver does nothing while the guest rests for as long as it would take to try several times.
fn assert_in_peace(vm: &mut Vm) {
    let before = vm.memory();
    vm.step("rest:2s", MOVING);
    let after = vm.memory();
    assert_eq!(after.actual, before.actual);
    assert_eq!(after.counters.inflated, before.counters.inflated);
    assert_eq!(after.counters.deflated, before.counters.deflated);
}
