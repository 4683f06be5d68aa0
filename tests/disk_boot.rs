//! Guests that boot their disk's own kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use guests::{BOOT, Host, VmSettings, images};
use lab::{Kernel, inside};

/// Where the disks lie, on this machine and in an emulated host.
const DIRECTORY: &str = "/tmp/ballast-disk-boot";
const MIB: u64 = 1 << 20;
/// A partition of the table below.
const PARTITION: &str = "0a1b2c3d-1111-2222-3333-444455556666";
const WORKING: Duration = Duration::from_secs(30);

fn run(program: &str, arguments: &[&str]) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}: `make setup` installs it"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A disk as distributions make them: a GPT, and an ext4 that has kernels with their initramfs in `/boot`.
fn make(path: &Path, kernels: &[Kernel]) {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path().join("root");
    for made in ["boot", "etc/default"] {
        fs::create_dir_all(root.join(made)).expect("made");
    }
    for kernel in kernels {
        let (images, version) = (images(*kernel), format!("{}.0-1-cloud-amd64", kernel.series()));
        fs::copy(images.bzimage, root.join(format!("boot/vmlinuz-{version}"))).expect("copied");
        fs::copy(images.agent_initrd, root.join(format!("boot/initrd.img-{version}"))).expect("copied");
    }
    fs::write(root.join("etc/os-release"), "ID=debian\n").expect("written");
    fs::write(root.join("etc/default/grub"), "GRUB_CMDLINE_LINUX=\"ballast.console\"\n").expect("written");
    let text = |path: &Path| path.to_str().expect("its name is text").to_owned();
    let ext4 = directory.path().join("ext4");
    run("mke2fs", &["-q", "-t", "ext4", "-d", &text(&root), &text(&ext4), "60M"]);
    let disk = fs::File::create(path).and_then(|disk| disk.set_len(62 * MIB).map(|()| disk)).expect("made");
    let script = format!("printf 'label: gpt\\nstart=1MiB, size=60MiB, uuid={PARTITION}\\n' | sfdisk -q \"$1\"");
    run("sh", &["-c", &script, "sh", &text(path)]);
    let mut ext4 = fs::File::open(ext4).expect("it was made");
    let mut disk = disk;
    std::io::Seek::seek(&mut disk, std::io::SeekFrom::Start(MIB)).expect("a file");
    std::io::copy(&mut ext4, &mut disk).expect("copied");
}

/// The disks of the test: raw with two kernels, and qcow2 with one, compressed.
fn disks() -> [PathBuf; 2] {
    let directory = Path::new(DIRECTORY);
    let [raw, qcow2] = ["two.raw", "one.qcow2"].map(|name| directory.join(name));
    if !inside() {
        fs::create_dir_all(directory).expect("made");
        make(&raw, &[Kernel::V6_1]);
        let arguments = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
        let paths = [&raw, &qcow2].map(|path| path.to_str().expect("text"));
        run("qemu-img", &[&arguments[..], &paths].concat());
        make(&raw, &[Kernel::V6_1, Kernel::V6_12]);
    }
    [raw, qcow2]
}

#[test]
fn a_guest_that_reboots_starts_again() {
    let [_, qcow2] = disks();
    Host::new().file(&qcow2).usually(Duration::from_secs(120)).run(|| {
        let disk = qcow2.to_str().expect("text");
        let settings = VmSettings::new("again", &images(Kernel::V6_1), "256M", "ballast.end=reboot");
        let mut vm = settings.clone().disk(disk).start();
        vm.wait_until_ready();
        vm.type_in("end\n");
        vm.wait_for_line("The VM starts again.", WORKING);
        vm.wait_until_ready();
        // The signal reaches the VM, whose guest hears its power button; then it does not start again.
        vm.terminate();
        vm.wait_for_line("Pressed the guest's power button", WORKING);
        assert_eq!(vm.wait_for_end(WORKING), 0);

        let mut vm = settings.disk(disk).with(&["--on-reboot", "exit"]).start();
        vm.wait_until_ready();
        vm.type_in("end\n");
        assert_eq!(vm.wait_for_end(WORKING), 10);
    });
}

#[test]
fn a_guest_boots_from_its_disk_alone() {
    let [raw, qcow2] = disks();
    Host::new().file(&raw).file(&qcow2).usually(Duration::from_secs(120)).run(|| {
        for (disk, version) in [(raw, "6.12"), (qcow2, "6.1")] {
            let disk = disk.to_str().expect("text");
            let settings = VmSettings::new("disk", &images(Kernel::V6_1), "256M", "ballast.end=poweroff");
            let mut vm = settings.disk(disk).with(&["-v"]).start();
            vm.wait_for_line(&format!("boots /boot/vmlinuz-{version}.0-1-cloud-amd64"), BOOT);
            let ready = vm.wait_until_ready();
            assert!(ready.contains(&format!("linux={version}.")), "{ready}");
            // The distribution's own word has it take steps; its disk is there.
            vm.step("read-disk:vda:0M:1", WORKING);
            vm.type_in("end\n");
            assert_eq!(vm.wait_for_end(WORKING), 0);
        }
    });
}
