//! Guests that boot with less than they may have and plug the rest (virtio-mem).

use std::fs;
use std::time::Duration;

use api::status::{DriverState, MemoryStatus};
use api::units::Bytes;
use guests::checks::plug::{MOVING, STARTUP, guest, guest_on, plug, plugs_uses_and_unplugs, settled};
use guests::{Daemon, Host, Vm, VmSettings, images};
use lab::Kernel;

const MAX: Bytes = Bytes::gib(1);

#[test]
fn a_guest_plugs_uses_and_unplugs() {
    Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12).usually(Duration::from_secs(90)).run(|| {
        for kernel in [Kernel::V6_1, Kernel::V6_12] {
            plugs_uses_and_unplugs(kernel);
        }
    });
}

/// Plugs up to 768 MiB, uses it, and unplugs down to what the guest booted with.
fn follows_the_host(name: &str, kernel: Kernel, startup: Bytes, arguments: &[&str]) {
    let memory = format!("{}M,min=128M,max=768M", startup.0 >> 20);
    let mut vm = guest_on(name, kernel, &memory, arguments);
    vm.set_target(Bytes::mib(768));
    let grown = plug(&settled(&vm));
    assert!(grown.plugged >= Bytes::mib(510) && grown.boot == startup, "{grown:#?}");
    vm.step("grow:560M", MOVING);
    vm.wait_for_memory("its use to show", MOVING, |memory| memory.host_rss.unwrap() > Bytes::mib(560));
    vm.step("release", MOVING);
    vm.set_target(startup);
    settled(&vm);
    let memory = vm.wait_for_memory("the host's memory", MOVING, |memory| {
        memory.host_rss.unwrap() <= startup + plug(memory).plugged + Bytes::mib(8)
    });
    let plug = plug(&memory);
    // How much Linux finds movable differs; the balloon took the rest.
    assert!(plug.plugged <= Bytes(grown.plugged.0 / 2), "{memory:#?}");
    assert_eq!((plug.counters.refused, plug.counters.discard_failures), (0, 0), "{memory:#?}");
    vm.type_in("end\n");
    vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
}

/// A memfd whose guest boots with no whole number of huge pages, and private memory.
#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn shadow_paging_follows_what_is_plugged_and_unplugged() {
    let host = Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12).nested_paging(false);
    host.usually(Duration::from_secs(90)).run(|| {
        follows_the_host("memfd", Kernel::V6_12, Bytes::mib(255), &["--memory-backing", "memfd"]);
        follows_the_host("private", Kernel::V6_1, STARTUP, &[]);
    });
}

#[test]
fn huge_pages_are_taken_when_they_are_plugged_and_go_back_when_they_are_not() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(60)).run(|| {
        fs::write("/proc/sys/vm/nr_hugepages", "400").expect("the host reserves huge pages");
        follows_the_host("huge", Kernel::V6_1, STARTUP, &["--hugepages", "2M"]);
    });
}

/// Huge pages that the host has not got are no reason for a guest to end: it plugs what there is.
#[test]
fn a_host_without_enough_huge_pages_gives_what_it_has() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(60)).run(|| {
        fs::write("/proc/sys/vm/nr_hugepages", "200").expect("the host reserves huge pages");
        let mut vm = guest_on("poor", Kernel::V6_1, "256M,min=128M,max=768M", &["--hugepages", "2M"]);
        vm.set_target(Bytes::mib(768));
        let memory = vm.wait_for_memory("all there is", MOVING, |memory| {
            plug(memory).counters.refused > 0 && plug(memory).plugged > Bytes::ZERO
        });
        assert!(plug(&memory).plugged <= Bytes::mib(400) - STARTUP, "{memory:#?}");
        assert!(
            memory.host_rss.unwrap() <= STARTUP + plug(&memory).plugged,
            "pages are held for nobody: {memory:#?}"
        );
        vm.step("grow:200M", MOVING);
        vm.set_target(STARTUP);
        vm.step("release", MOVING);
        vm.type_in("end\n");
        vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
    });
}

/// What the balancer has for two guests, of which only one at a time can have its most.
const BUDGET: Bytes = Bytes::mib(1500);
/// What is left for the other then.
const REST: Bytes = Bytes::mib(1500 - 1024);
/// As good as its most: a wish for less than a block more is rounded away.
const NEARLY_MAX: Bytes = Bytes::mib(1024 - 4);

/// Has a guest use more and more, each time once the balancer has seen to the last.
fn grow_to_the_most(vm: &mut Vm, other: &Vm) {
    while vm.memory().actual < NEARLY_MAX {
        vm.step("grow:80M:1s", MOVING);
        vm.wait_for_memory("room for the next step", MOVING, |memory| {
            let held = memory.host_rss.unwrap() + other.memory().host_rss.unwrap();
            assert!(held <= BUDGET, "{held} is over the budget");
            let spare = memory.report.as_ref().and_then(|report| report.statistics.spare());
            // The balancer leaves small wishes alone: less than the buffer, and enough for a step.
            memory.actual >= NEARLY_MAX || spare.is_some_and(|spare| spare >= Bytes::mib(92))
        });
    }
}

#[test]
fn guests_grow_to_their_most_and_shrink_back_under_the_balancer() {
    let host = Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12).memory(Bytes::gib(3));
    host.usually(Duration::from_secs(240)).run(|| {
        let memory = "256M,min=160M,max=1G,buffer=80%";
        let mut a = guest("a", Kernel::V6_1, memory);
        let mut b = guest("b", Kernel::V6_12, memory);
        let daemon = Daemon::start(BUDGET);
        grow_to_the_most(&mut a, &b);
        a.step("release", MOVING);
        grow_to_the_most(&mut b, &a);
        // It gave up what the other got. What of that is not its cushion it unplugs when it is left alone.
        let shrunk = a.memory();
        assert!(shrunk.actual <= REST, "{shrunk:#?}");
        a.wait_for_memory("its unplugging", MOVING, |memory| {
            let plug = plug(memory);
            plug.plugged == plug.requested && plug.counters.unplugged >= Bytes::mib(128)
        });
        b.step("release", MOVING);
        grow_to_the_most(&mut a, &b);
        assert!(b.memory().actual <= REST, "{:#?}", b.memory());
        drop(daemon);
        for vm in [&mut a, &mut b] {
            vm.type_in("end\n");
            vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
            assert_eq!(vm.wait_for_end(MOVING), 0);
        }
    });
}

/// Without the driver it works with what it has, and says so.
#[test]
fn a_guest_without_the_driver_keeps_what_it_booted_with() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(40)).run(|| {
        let images = images(Kernel::V6_1);
        let cmdline = "ballast.console ballast.without=virtio_mem";
        let mut vm = VmSettings::new("old", &images, "256M,min=128M,max=1G", cmdline)
            .with(&["--grow", "plug"])
            .start();
        vm.wait_until_ready();
        let memory = vm.wait_for_memory("a report", MOVING, |memory| memory.report.is_some());
        assert_eq!((plug(&memory).driver, memory.ceiling()), (DriverState::Absent, STARTUP));
        let refused = vm.ask(async |client| client.set_target(MAX).await).expect_err("nobody could plug");
        assert!(refused.to_string().contains("virtio_mem"), "{refused}");
        vm.set_target(Bytes::mib(192));
        assert_eq!(settled(&vm).actual, Bytes::mib(192));
    });
}

/// Its memory is that of a small service, which fills it in bursts.
const SMALL: &str = "112M,min=88M,max=384M";

/// Waits until the balloon holds all of the cushion and nothing else moves.
fn cushioned(vm: &Vm) -> MemoryStatus {
    vm.wait_for_memory("the cushion", MOVING, |memory| {
        let cushion = memory.cushion.expect("it plugs");
        cushion.size > Bytes::ZERO && cushion.held >= cushion.size && memory.actual == memory.target
    })
}

#[test]
fn a_guest_that_runs_out_of_memory_takes_its_cushion_and_gives_it_back() {
    Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12).usually(Duration::from_secs(120)).run(|| {
        for kernel in [Kernel::V6_1, Kernel::V6_12] {
            let name = kernel.series().replace('.', "-");
            let mut vm = guest(&name, kernel, SMALL);
            let before = cushioned(&vm);
            assert_eq!((plug(&before).plugged, before.oom_deflate), (Bytes::mib(112), None), "{before:#?}");
            vm.step("grow:64M", MOVING);
            let memory = vm.memory();
            let taken = memory.oom_deflate.expect("it took some").taken;
            println!("{name}: took {taken}: {memory:#?}");
            assert!(memory.actual == memory.target + taken && taken > Bytes::ZERO, "{memory:#?}");
            // Nobody takes it while it is in use, and it is not asked for either.
            vm.step("rest:4s", MOVING);
            assert!(vm.memory().oom_deflate.unwrap().taken >= taken, "{:#?}", vm.memory());
            vm.step("release", MOVING);
            let after = cushioned(&vm);
            assert_eq!(plug(&after).plugged, Bytes::mib(112), "{after:#?}");
            // It moves with the target.
            for target in [200, 112, 88] {
                vm.set_target(Bytes::mib(target));
                let memory = cushioned(&vm);
                println!("{name}: at {target}M: {memory:#?}");
                assert_eq!(plug(&memory).counters.discard_failures, 0, "{memory:#?}");
            }
            vm.step("rest:10s", MOVING);
            println!("{name}: at rest: {:#?}", vm.memory());
            vm.type_in("end\n");
            vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
        }
    });
}
