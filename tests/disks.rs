//! Guests with disks.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use api::status::{Pauser, VmState};
use guests::{Host, Vm, VmSettings, ballast, images, wait_for};
use lab::Kernel;
use rustix::mount::{MountFlags, mount, mount_remount};

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

/// What `ballast` says, which succeeds.
fn told(arguments: &[&str]) -> String {
    let output = Command::new(ballast()).args(arguments).output().expect("ballast runs");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// The first disk becomes larger while its guest runs.
fn grows(vm: &mut Vm) {
    let size = "get:/sys/class/block/vda/size";
    vm.type_in(&format!("{size}\n"));
    vm.wait_for_line("131072", WORKING);
    told(&["disk", "resize", "--vm", "disks", "disk0", "+32M"]);
    wait_for("the guest to see its larger disk", WORKING, || {
        vm.type_in(&format!("{size}\n"));
        vm.line("196608")
    });
    let no_such = Command::new(ballast()).args(["disk", "resize", "--vm", "disks", "vda", "1G"]).output();
    let said = String::from_utf8_lossy(&no_such.expect("ballast runs").stderr).into_owned();
    assert!(said.contains("it has disk0, disk1"), "{said}");
}

/// The second disk's host has room for a part of what is written; `more` makes room.
fn goes_on_when_there_is_room(vm: &mut Vm, more: impl FnOnce()) {
    vm.type_in("write-disk:vdb:8M:3\n");
    wait_for("the VM to pause", WORKING, || {
        (vm.status().state == VmState::Paused { by: Pauser::Disk }).then_some(())
    });
    let listed = told(&["ps"]);
    assert!(
        listed.contains("paused by disk") && listed.contains("make room where its file lies"),
        "{listed}"
    );
    more();
    told(&["resume", "disks"]);
    vm.wait_for_line("DONE write-disk:vdb:8M:3", WORKING);
    vm.step("read-disk:vdb:8M:3", WORKING);
    let full = vm.status().disks.pop().expect("the second disk");
    assert!(full.errors > 0 && full.limited > 0 && full.failure.is_none(), "{full:?}");
    assert!(full.writes.bytes.0 >= 8 << 20 && full.flushes > 0, "{full:?}");
    assert!(told(&["disk", "list", "disks"]).contains("disk1"));
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
        let small = directory.path().join("small");
        fs::create_dir(&small).expect("a directory");
        let allowed = "a host's first user may mount";
        mount("tmpfs", &small, "tmpfs", MountFlags::empty(), c"size=2M").expect(allowed);
        let full = format!("{},bytes-per-second=32M,bytes-burst=64K", disk(&small, "full.img"));
        let mut vm = guest(Kernel::V6_1, "pci", &[&over, &full]);
        vm.step("read-disk:vda:4M:1", WORKING);
        vm.step("write-disk:vda:4M:2", WORKING);
        grows(&mut vm);
        goes_on_when_there_is_room(&mut vm, || {
            mount_remount(&small, MountFlags::empty(), c"size=16M").expect(allowed);
        });
        drop(vm);
        let mut vm = guest(Kernel::V6_1, "pci", &[&over]);
        vm.step("read-disk:vda:4M:2", WORKING);
        drop(vm);
        assert!(fs::read(&base).expect("read") == before, "the file behind it has changed");
    });
}
