//! Guests that boot their disk's own kernel.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use guests::{BOOT, Host, VmSettings, images, kvm_boots_stock_kernels};
use lab::{Kernel, inside};
use tempfile::TempDir;

/// Where the disks lie in an emulated host.
const INSIDE: &str = "/disk-boot";
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
    let script =
        format!("printf 'label: gpt\\nstart=1MiB, size=60MiB, uuid={PARTITION}\\n' | sfdisk -q \"$1\"");
    run("sh", &["-c", &script, "sh", &text(path)]);
    let mut ext4 = fs::File::open(ext4).expect("it was made");
    let mut disk = disk;
    std::io::Seek::seek(&mut disk, std::io::SeekFrom::Start(MIB)).expect("a file");
    std::io::copy(&mut ext4, &mut disk).expect("copied");
}

/// A disk of a test, which `make` makes on this machine. Gives the host that has it, where, and
/// what keeps it on this machine.
fn with_disk(host: Host, name: &str, make: impl FnOnce(&Path)) -> (Host, PathBuf, Option<TempDir>) {
    let path_inside = Path::new(INSIDE).join(name);
    if inside() {
        return (host, path_inside, None);
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join(name);
    make(&path);
    let used = if kvm_boots_stock_kernels() { path.clone() } else { path_inside.clone() };
    (host.file(&path, &path_inside), used, Some(directory))
}

/// As the cloud has it: qcow2, compressed.
fn make_compressed(path: &Path) {
    let raw = path.with_extension("raw");
    make(&raw, &[Kernel::V6_1]);
    let paths = [&raw, path].map(|path| path.to_str().expect("its name is text"));
    run("qemu-img", &[&["convert", "-c", "-f", "raw", "-O", "qcow2"][..], &paths].concat());
}

/// The superblock of the file system says that its journal has to be replayed.
fn is_unclean(disk: &Path) -> bool {
    let mut features = [0; 4];
    let read = fs::File::open(disk).and_then(|file| file.read_exact_at(&mut features, MIB + 1024 + 0x60));
    read.expect("it is there");
    features[0] & 4 != 0
}

#[test]
fn a_kernel_that_a_guest_installed_is_booted_next_even_where_its_vm_was_killed() {
    let (host, raw, _made) = with_disk(Host::new(), "killed.raw", |path| make(path, &[Kernel::V6_1]));
    host.usually(Duration::from_secs(120)).run(|| {
        let settings = VmSettings::new("killed", &images(Kernel::V6_1), "256M", "ballast.end=poweroff")
            .disk(raw.to_str().expect("text"))
            .with(&["-v", "--on-reboot", "exit"]);
        let mut vm = settings.start();
        vm.wait_for_line("boots /boot/vmlinuz-6.1.0-1-cloud-amd64", BOOT);
        vm.wait_until_ready();
        vm.step("install:vda1:6.1.0-1-cloud-amd64:6.1.0-2-cloud-amd64", WORKING);
        vm.kill();
        assert!(is_unclean(&raw));
        let mut vm = settings.start();
        vm.wait_for_line("boots /boot/vmlinuz-6.1.0-2-cloud-amd64", BOOT);
        vm.wait_until_ready();
    });
}

#[test]
fn a_guest_that_reboots_starts_again() {
    let (host, qcow2, _made) = with_disk(Host::new(), "again.qcow2", make_compressed);
    host.usually(Duration::from_secs(120)).run(|| {
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
    let two = |path: &Path| make(path, &[Kernel::V6_1, Kernel::V6_12]);
    let (host, raw, _raw) = with_disk(Host::new(), "two.raw", two);
    let (host, qcow2, _qcow2) = with_disk(host, "one.qcow2", make_compressed);
    host.usually(Duration::from_secs(120)).run(|| {
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
