//! Guests with disks.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use guests::{Host, Vm, VmSettings, ballast, images};
use lab::Kernel;

/// How long a step with a disk takes.
const WORKING: Duration = Duration::from_secs(30);
const SIZE: u64 = 64 << 20;

fn guest(kernel: Kernel, transport: &str, disks: &[&str]) -> Vm {
    let images = images(kernel);
    let mut settings = VmSettings::new("disks", &images, "256M", "ballast.console");
    settings.initrd = images.agent_initrd;
    let disks = disks.iter().flat_map(|&disk| ["--disk", disk]);
    // A test that kills the process kills the VM at once.
    let settings = settings.with(&["--cpus", "2", "--transport", transport, "--on-reboot", "exit"]);
    let mut vm = settings.with(&disks.collect::<Vec<_>>()).start();
    vm.wait_until_ready();
    vm
}

/// An empty disk in memory of the host: its file system has no O_DIRECT.
fn disk(directory: &Path, name: &str) -> String {
    let path = directory.join(name);
    File::create(&path).and_then(|file| file.set_len(SIZE)).expect("a file");
    path.to_string_lossy().into_owned()
}

fn blocks(path: &str) -> u64 {
    fs::metadata(path).expect("it is there").blocks()
}

#[test]
fn what_a_guest_writes_is_there_for_the_next_one() {
    Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12).usually(Duration::from_secs(90)).run(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let (first, second) = (disk(directory.path(), "first.img"), disk(directory.path(), "second.img"));
        let mut vm = guest(Kernel::V6_1, "pci", &[&first, &second]);
        vm.step("write-disk:vda:8M:1", WORKING);
        vm.step("write-disk:vdb:4M:2", WORKING);
        // Flushed: it is there whatever becomes of the VM.
        drop(vm);
        assert_eq!((blocks(&first), blocks(&second)), (8 << 11, 4 << 11));

        let readonly = format!("{second},readonly");
        let mut vm = guest(Kernel::V6_12, "mmio", &[&first, &readonly]);
        vm.step("read-disk:vda:8M:1", WORKING);
        vm.step("read-disk:vdb:4M:2", WORKING);
        vm.step("discard-disk:vda:4M", WORKING);
        assert_eq!(blocks(&first), 4 << 11);
    });
}

#[test]
fn an_image_keeps_what_a_guest_writes_over_another() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(90)).run(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        let make = |arguments: &[&str]| {
            let made = Command::new(ballast()).args(["disk", "create"]).args(arguments).output();
            let made = made.expect("ballast runs");
            assert!(made.status.success(), "{made:?}");
        };
        let (base, overlay) = (at("base.qcow2"), at("web.qcow2"));
        make(&[&base, "--size", "64M"]);
        let mut vm = guest(Kernel::V6_1, "pci", &[&base]);
        vm.step("write-disk:vda:4M:1", WORKING);
        drop(vm);
        make(&[&overlay, "--backing", &base]);
        let before = fs::read(&base).expect("read");
        let over = format!("{overlay},backing=allow");
        let mut vm = guest(Kernel::V6_1, "pci", &[&over]);
        vm.step("read-disk:vda:4M:1", WORKING);
        vm.step("write-disk:vda:4M:2", WORKING);
        drop(vm);
        let mut vm = guest(Kernel::V6_1, "pci", &[&over]);
        vm.step("read-disk:vda:4M:2", WORKING);
        drop(vm);
        assert!(fs::read(&base).expect("read") == before, "the file behind it has changed");
    });
}
