//! What can be asked of a VM that runs.

use std::time::Duration;

use balloon::status::VmState;
use balloon::units::Bytes;
use lab::{BOOT, Host, Kernel, VmSettings, wait_for};

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
        assert_eq!(vm.status().state, VmState::Paused);
        assert!(vm.ask(async |client| client.pause().await).is_err(), "it is paused already");
        vm.ask(async |client| client.resume().await).expect("a paused VM resumes");
        vm.step("rest:1ms", SOON);

        let beyond = vm.ask(async |client| client.set_target(Bytes::gib(1)).await);
        assert!(beyond.is_err(), "1 GiB is outside the limits");

        vm.ask(async |client| client.power_button().await).expect("the button is pressed");
        vm.wait_for_line("POWER BUTTON", SOON);
        assert_eq!(vm.wait_for_end(SOON), 0);
    });
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
