//! What can be asked of a VM that runs.

use std::time::Duration;

use balloon::status::{Pauser, VmState};
use balloon::units::Bytes;
use lab::{BOOT, Host, Kernel, Vm, VmSettings, wait_for};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_vm_is_paused_resumed_and_switched_off() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(45)).run(|| {
        let images = Kernel::V6_1.guest_images();
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

/// Who paused it, as both documents say that tell.
fn paused_by(vm: &Vm) -> Option<Pauser> {
    let by = vm.status().state.paused_by();
    assert_eq!(vm.memory().paused_by, by);
    by
}

#[test]
fn a_shutdown_needs_no_guest() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(30)).run(|| {
        let images = Kernel::V6_1.guest_images();
        let mut vm = VmSettings::new("stopped", &images, "256M", "ballast.end=hang").start();
        vm.wait_until_ready();
        vm.ask(async |client| client.shutdown().await).expect("a VM stops on request");
        assert_eq!(vm.wait_for_end(SOON), 0);
    });
}
