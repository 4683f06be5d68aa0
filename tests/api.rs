//! What can be asked of a VM that runs.

use std::fs;
use std::time::{Duration, Instant};

use api::runtime;
use api::status::{MemoryStatus, Pauser, VmState};
use api::units::Bytes;
use guests::{BOOT, Host, Vm, VmSettings, images, wait_for};
use lab::Kernel;
use rustix::process::{Pid, Signal, kill_process};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_vm_is_paused_resumed_and_switched_off() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(45)).run(|| {
        let images = images(Kernel::V6_1);
        let mut vm = VmSettings::new("steered", &images, "256M,min=128M", "ballast.console").start();

        wait_for("the socket", BOOT, || vm.ask(async |client| client.status().await).ok());
        let early = vm.ask(async |client| client.set_target(Bytes::mib(200)).await);
        assert!(early.is_err(), "no driver is there yet, so no target can be reached");

        vm.wait_until_ready();
        let status = vm.status();
        assert_eq!((status.name.as_str(), status.state, status.pid), ("steered", VmState::Running, vm.pid()));

        vm.ask(async |client| client.pause().await).expect("a running VM pauses");
        assert_eq!(paused_by(&vm), Some(Pauser::Operator));
        assert!(vm.ask(async |client| client.pause().await).is_err(), "it is paused already");
        assert!(
            vm.ask(async |client| client.resume_as(Pauser::Balancer).await).is_err(),
            "not the balancer's"
        );
        vm.ask(async |client| client.resume().await).expect("a paused VM resumes");
        vm.step("rest:1ms", SOON);

        for _ in 0..2 {
            vm.ask(async |client| client.pause_as(Pauser::Balancer).await).expect("it may ask twice");
        }
        assert_eq!(paused_by(&vm), Some(Pauser::Balancer));
        vm.ask(async |client| client.resume_as(Pauser::Balancer).await).expect("that ends its own pause");
        assert_eq!(paused_by(&vm), None);
        vm.step("rest:1ms", SOON);

        vm.ask(async |client| client.pause_as(Pauser::Balancer).await).expect("a running VM pauses");
        vm.ask(async |client| client.pause().await).expect("an operator takes the pause over");
        assert_eq!(paused_by(&vm), Some(Pauser::Operator));
        assert!(
            vm.ask(async |client| client.resume_as(Pauser::Balancer).await).is_err(),
            "no longer its own"
        );
        vm.ask(async |client| client.resume().await).expect("an operator resumes");
        vm.step("rest:1ms", SOON);

        let beyond = vm.ask(async |client| client.set_target(Bytes::gib(1)).await);
        assert!(beyond.is_err(), "1 GiB is outside the limits");

        vm.ask(async |client| client.power_button().await).expect("the button is pressed");
        vm.wait_for_line("POWER BUTTON", SOON);
        assert_eq!(vm.wait_for_end(SOON), 0);
    });
}

#[test]
fn a_paused_guest_shuts_down_when_its_vm_is_told_to_end() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(30)).run(|| {
        let images = images(Kernel::V6_1);
        let mut vm = VmSettings::new("paused", &images, "256M", "ballast.console").start();
        vm.wait_until_ready();
        vm.ask(async |client| client.pause_as(Pauser::Balancer).await).expect("a running VM pauses");
        kill_process(Pid::from_raw(vm.pid().cast_signed()).expect("it runs"), Signal::TERM).expect("it runs");
        vm.wait_for_line("POWER BUTTON", SOON);
        assert_eq!(vm.wait_for_end(SOON), 0);
    });
}

/// Longer than from one look at the socket to the next.
const LOOKED_AT: Duration = Duration::from_secs(20);

#[test]
fn a_vm_whose_socket_somebody_removes_is_found_again() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(75)).run(|| {
        let images = images(Kernel::V6_1);
        let mut vm = VmSettings::new("removed", &images, "256M", "ballast.console").start();
        vm.wait_until_ready();
        let directory = runtime::directory().expect("there is a runtime directory");
        fs::remove_file(runtime::socket("removed").expect("it has one")).expect("it is there");
        wait_for("the socket", LOOKED_AT, || vm.ask(async |client| client.status().await).ok());
        // With its directory, which somebody makes again.
        fs::remove_dir_all(&directory).expect("it is there");
        runtime::create_directory().expect("it can be made");
        wait_for("the socket", LOOKED_AT, || vm.ask(async |client| client.status().await).ok());
        vm.ask(async |client| client.power_button().await).expect("the button is pressed");
        assert_eq!(vm.wait_for_end(SOON), 0);
    });
}

/// Who paused it, as both documents say that tell.
fn paused_by(vm: &Vm) -> Option<Pauser> {
    let by = vm.status().state.paused_by();
    assert_eq!(vm.memory().paused_by, by);
    by
}

/// How old a report may be that was just asked for. It takes the guest well under a millisecond; a busy
/// emulated host has one processor for all.
const YOUNG: u64 = 20;

/// Counted in instructions, as milliseconds are what it is about.
#[test]
fn a_guest_is_asked_for_its_figures_when_its_vm_is() {
    Host::new().guest(Kernel::V6_1).deterministic().usually(Duration::from_secs(60)).run(|| {
        let images = images(Kernel::V6_1);
        let mut vm = VmSettings::new("asked", &images, "256M,min=128M", "ballast.console").start();
        vm.wait_until_ready();
        let before = vm
            .wait_for_memory("a report", SOON, |memory| memory.report.is_some())
            .counters
            .statistics_requests;
        let wait = Duration::from_secs(1);
        let mut seen = Vec::new();
        for _ in 0..10 {
            let begun = Instant::now();
            let memory = fresh_memory(&vm, wait);
            seen.push((begun.elapsed(), memory.report.map(|report| report.age_ms)));
        }
        println!("time to the answer, and the report's age in it: {seen:?}");
        assert!(
            seen.iter().all(|(took, age)| *took < wait && age.is_some_and(|age| age <= YOUNG)),
            "{seen:?}"
        );
        let asked = vm.memory().counters.statistics_requests - before;
        assert!((10..=12).contains(&asked), "the guest was asked {asked} times");

        // Who does not wait finds what the guest says at the next look.
        let at_once = fresh_memory(&vm, Duration::ZERO).counters;
        vm.wait_for_memory("the report", SOON, |memory| memory.counters.reports > at_once.reports);

        vm.ask(async |client| client.pause().await).expect("a running VM pauses");
        let (begun, before) = (Instant::now(), vm.memory().counters.statistics_requests);
        let paused = fresh_memory(&vm, wait);
        assert!(begun.elapsed() < wait, "it waited for a guest that stands still");
        assert_eq!(paused.paused_by, Some(Pauser::Operator));
        assert!(paused.counters.statistics_requests <= before + 1, "only the VM's own timer asks");
        vm.kill();
    });
}

/// `GET /memory` with a report made for it, where the guest sends one in time.
fn fresh_memory(vm: &Vm, wait: Duration) -> MemoryStatus {
    let answer = vm.ask(async |client| client.fresh_memory(Duration::ZERO, wait).await);
    answer.expect("the VM tells its memory")
}

#[test]
fn a_shutdown_needs_no_guest() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(30)).run(|| {
        let images = images(Kernel::V6_1);
        let mut vm = VmSettings::new("stopped", &images, "256M", "ballast.end=hang").start();
        vm.wait_until_ready();
        vm.ask(async |client| client.shutdown().await).expect("a VM stops on request");
        assert_eq!(vm.wait_for_end(SOON), 0);
    });
}
