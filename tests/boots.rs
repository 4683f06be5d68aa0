//! Stock Debian kernels boot, and each end of a guest has its exit code.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use api::units::Bytes;
use guests::checks::boot::{END, boot_all};
use guests::{BOOT, Host, VmSettings, images};
use lab::Kernel;

const TRANSPORTS: [&str; 2] = ["pci", "mmio"];

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

#[test]
fn a_vm_of_a_file_tells_its_service_manager_when_it_runs() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(60)).run(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let [file, socket] = ["web.toml", "notify"].map(|name| directory.path().join(name));
        let manager = UnixDatagram::bind(&socket).expect("a socket");
        manager.set_read_timeout(Some(BOOT * 10)).expect("a limit");
        let settings = VmSettings::new("file", &images(Kernel::V6_1), "256M", "ballast.console");
        let mut vm = settings.with(&["--cpus=2", "--memory=192M"]).start_as_service(&file, &socket);
        let mut said = [0; 256];
        let length = manager.recv(&mut said).expect("word of the VM");
        assert!(said[..length].starts_with(b"READY=1\n"), "{:?}", String::from_utf8_lossy(&said[..length]));
        // Not waited for: the API answers by then. The command line goes before the file.
        assert_eq!(vm.status().cpus, 2);
        assert_eq!(vm.memory().limits.startup(), Bytes::mib(192));
        vm.wait_until_ready();
        vm.type_in("end\n");
        assert_eq!(vm.wait_for_end(END), 0);
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
