//! Stock Debian kernels boot, and each end of a guest has its exit code.

use std::path::PathBuf;
use std::time::Duration;

use api::status::DriverState;
use api::units::Bytes;
use guests::{BOOT, Host, VmSettings, images};
use lab::Kernel;

/// How long a guest takes from its last word to the end of its process.
const END: Duration = Duration::from_secs(3);
const TRANSPORTS: [&str; 2] = ["pci", "mmio"];

/// Each kernel in each form that it can be booted in.
fn kernels() -> Vec<(&'static str, Kernel, PathBuf)> {
    let (old, new) = (images(Kernel::V6_1), images(Kernel::V6_12));
    vec![
        ("bzimage-6-1", Kernel::V6_1, old.bzimage),
        ("elf-6-1", Kernel::V6_1, old.elf.expect("6.1 has an ELF")),
        ("bzimage-6-12", Kernel::V6_12, new.bzimage),
    ]
}

/// Boots each kernel; its balloon's driver has found the device before it powers off.
fn boot_all(transport: &str, cpus: &str, memory: &str) {
    for (name, kernel, image) in kernels() {
        let what = format!("{name} with {cpus} CPUs and {memory} by {transport}");
        println!("booting {what}");
        let mut vm = VmSettings::new(name, &images(kernel), memory, "ballast.console")
            .kernel(&image)
            .with(&["--cpus", cpus, "--transport", transport])
            .start();
        let ready = vm.wait_for_line("READY", BOOT * cpus.parse().expect("a number"));
        assert!(ready.contains(&format!("linux={}.", kernel.series())), "{what}: {ready}");
        assert!(ready.contains(&format!("cpus={cpus} ")), "{what}: {ready}");
        vm.wait_for_memory("the balloon's driver", BOOT, |memory| memory.driver == DriverState::Active);
        vm.type_in("end\n");
        assert_eq!(vm.wait_for_end(END), 0, "{what} powers off");
    }
}

#[test]
fn a_guest_knows_what_it_runs_on() {
    Host::new().guest(Kernel::V6_1).usually(BOOT * 3).run(|| {
        let told = |name: &str| {
            let mut vm = VmSettings::new(name, &images(Kernel::V6_1), "128M", "ballast.console").start();
            vm.wait_until_ready();
            let mut get = |what: &str| {
                let file = format!("/sys/class/dmi/id/{what}");
                vm.type_in(&format!("get:{file}\n"));
                let line = vm.wait_for_line(&format!("GOT {file}="), BOOT);
                line.split_once('=').map(|(_, value)| value.to_owned()).expect("a value")
            };
            let all =
                ["sys_vendor", "product_name", "product_uuid", "product_serial", "bios_vendor"].map(&mut get);
            vm.type_in("end\n");
            assert_eq!(vm.wait_for_end(END), 0);
            all
        };
        let [vendor, product, uuid, serial, bios] = told("web");
        assert_eq!([&*vendor, &*product, &*bios], ["ballast", "ballast virtual machine", "ballast"]);
        // Version 8 and its variant, where their digits are.
        assert!(
            uuid.len() == 36 && uuid[14..].starts_with('8') && uuid[19..].starts_with(['8', '9', 'a', 'b']),
            "{uuid}"
        );
        let [_, _, same, ..] = told("web");
        let [_, _, other, other_serial, _] = told("db");
        assert_eq!(uuid, same);
        assert!(uuid != other && serial != other_serial, "{uuid} {other}");
    });
}

/// A host for guests of both kernels.
fn host(nested_paging: bool) -> Host {
    Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12).nested_paging(nested_paging)
}

fn boot_on_each_transport(sizes: &[(&str, &str)]) {
    for transport in TRANSPORTS {
        for (cpus, memory) in sizes {
            boot_all(transport, cpus, memory);
        }
    }
}

const USUAL_SIZES: &[(&str, &str)] = &[("1", "256M"), ("2", "256M")];
/// From about the smallest guest that a stock bzImage unpacks in to one with memory on both sides of the hole
/// below 4 GiB.
const ALL_SIZES: &[(&str, &str)] = &[("1", "96M"), ("4", "256M"), ("16", "512M"), ("1", "3200M")];

#[test]
fn kernels_boot_with_nested_paging() {
    host(true).usually(Duration::from_secs(240)).run(|| boot_on_each_transport(USUAL_SIZES));
}

#[test]
fn kernels_boot_with_shadow_paging() {
    host(false).usually(Duration::from_secs(320)).run(|| boot_on_each_transport(USUAL_SIZES));
}

#[test]
#[ignore = "24 boots, of up to 16 vCPUs on one processor: make test-long"]
fn kernels_boot_at_all_sizes_with_nested_paging() {
    host(true)
        .memory(Bytes::gib(4))
        .usually(Duration::from_secs(900))
        .run(|| boot_on_each_transport(ALL_SIZES));
}

#[test]
#[ignore = "24 boots, of up to 16 vCPUs on one processor: make test-long"]
fn kernels_boot_at_all_sizes_with_shadow_paging() {
    host(false)
        .memory(Bytes::gib(4))
        .usually(Duration::from_secs(1200))
        .run(|| boot_on_each_transport(ALL_SIZES));
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

/// The default command line is quiet, and yet tells why there is no first program.
#[test]
fn a_start_that_fails_says_why_by_default() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(60)).run(|| {
        let images = images(Kernel::V6_1);
        for (words, reasons) in [
            ("rdinit=/missing", &["Kernel panic - not syncing: VFS: Unable to mount root fs"][..]),
            (
                "rdinit=/dev",
                &["Failed to execute /dev (error -13)", "panic - not syncing: No working init found"],
            ),
        ] {
            let mut vm = VmSettings::new("fails", &images, "256M", words).by_default().start();
            for reason in reasons {
                vm.wait_for_line(reason, BOOT);
            }
            assert_eq!(vm.wait_for_end(END), 10, "{words}: nothing in it could tell of the panic");
        }
        let mut vm = VmSettings::new("defaults", &images, "256M", "").by_default().start();
        vm.wait_until_ready();
        assert_eq!(vm.wait_for_end(END), 0);
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
