//! Stock Debian kernels boot, and each end of a guest has its exit code.

use std::path::PathBuf;
use std::time::Duration;

use guests::{BOOT, Host, VmSettings, images};
use lab::Kernel;

/// How long a guest takes from its last word to the end of its process.
const END: Duration = Duration::from_secs(3);

/// Each kernel in each form that it can be booted in.
fn kernels() -> Vec<(&'static str, Kernel, PathBuf)> {
    let (old, new) = (images(Kernel::V6_1), images(Kernel::V6_12));
    vec![
        ("bzimage-6-1", Kernel::V6_1, old.bzimage),
        ("elf-6-1", Kernel::V6_1, old.elf.expect("6.1 has an ELF")),
        ("bzimage-6-12", Kernel::V6_12, new.bzimage),
    ]
}

fn boot_all(cpu_counts: &[&str]) {
    for (name, kernel, image) in kernels() {
        for &cpus in cpu_counts {
            let mut vm = VmSettings::new(name, &images(kernel), "256M", "")
                .kernel(&image)
                .with(&["--cpus", cpus])
                .start();
            let ready = vm.wait_until_ready();
            assert!(ready.contains(&format!("linux={}.", kernel.series())), "{ready}");
            assert!(ready.contains(&format!("cpus={cpus} ")), "{ready}");
            assert_eq!(vm.wait_for_end(END), 0, "{name} with {cpus} CPUs powers off");
        }
    }
}

#[test]
fn kernels_boot_with_nested_paging() {
    Host::new()
        .guest(Kernel::V6_1)
        .guest(Kernel::V6_12)
        .usually(Duration::from_secs(120))
        .run(|| boot_all(&["1", "2"]));
}

#[test]
fn kernels_boot_with_shadow_paging() {
    Host::new()
        .guest(Kernel::V6_1)
        .guest(Kernel::V6_12)
        .nested_paging(false)
        .usually(Duration::from_secs(160))
        .run(|| boot_all(&["1", "2"]));
}

#[test]
fn each_end_has_its_exit_code() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(90)).run(|| {
        let images = images(Kernel::V6_1);
        for (cmdline, code) in [
            ("ballast.end=poweroff", 0),
            ("ballast.end=reboot", 10),
            ("ballast.end=panic", 11),
            ("ballast.end=reboot reboot=t", 12),
        ] {
            let mut vm = VmSettings::new("end", &images, "256M", cmdline).start();
            vm.wait_until_ready();
            assert_eq!(vm.wait_for_end(END), code, "{cmdline}");
        }
    });
}

#[test]
fn the_console_works_both_ways() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(40)).run(|| {
        let images = images(Kernel::V6_1);
        let mut vm = VmSettings::new("console", &images, "256M", "ballast.console").start();
        vm.wait_until_ready();
        vm.step("rest:1ms", BOOT);
        // Longer than a UART's FIFO of 16 bytes.
        let long = "x".repeat(200);
        vm.type_in(&format!("{long}\n"));
        vm.wait_for_line(&format!("ERROR `{long}` is no step"), BOOT);
        vm.type_in("\x01x");
        assert_eq!(vm.wait_for_end(END), 14, "Ctrl-A x ends the VM");
    });
}
