//! `ballast` finds the kernel on a disk in a confined process, whatever the disk's format, and hears that process
//! whatever it says.

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use image::disk::source::Source;
use image::disk::{Finder, SearchError};
use image::helper::Helper;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const BALLAST: &str = env!("CARGO_BIN_EXE_ballast");
const MIB: u64 = 1 << 20;

fn run(program: &str, arguments: &[&str]) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let Output { status, stderr, .. } = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&stderr));
}

/// A directory with an ext4 file system in `root.img` that has these kernels.
struct Scene(tempfile::TempDir);

impl Scene {
    fn new(versions: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let boot = directory.path().join("root/boot");
        fs::create_dir_all(&boot).expect("made");
        fs::create_dir(directory.path().join("root/etc")).expect("made");
        fs::write(directory.path().join("root/etc/os-release"), "ID=debian\n").expect("written");
        for version in versions {
            // Longer than one message, and no whole number of blocks.
            let contents = format!("{version} ").repeat(300_000);
            fs::write(boot.join(format!("vmlinuz-{version}")), &contents).expect("written");
            fs::write(boot.join(format!("initrd.img-{version}")), contents).expect("written");
        }
        let scene = Self(directory);
        run("mke2fs", &["-q", "-t", "ext4", "-d", &scene.path("root"), &scene.path("root.img"), "32M"]);
        scene
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn path(&self, name: &str) -> String {
        self.file(name).to_str().expect("its name is text").to_owned()
    }

    /// What `ballast check` says of a disk.
    fn check(&self, spec: &str) -> String {
        let output = Command::new(BALLAST)
            .args(["check", "--json", "--disk", spec])
            .current_dir(self.0.path())
            .output()
            .expect("it runs");
        let report: Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
        let findings = report["findings"].as_array().expect("a list");
        let found =
            findings.iter().find(|finding| finding["about"] == "disk").expect("it speaks of the disk");
        found["found"].as_str().expect("text").to_owned()
    }
}

#[test]
fn a_disk_of_each_format_is_read() {
    let scene = Scene::new(&["6.1.0-9-amd64"]);
    let convert = |options: &[&str], name: &str| {
        let fixed = ["convert", "-f", "raw", "-O", "qcow2"];
        run("qemu-img", &[&fixed[..], options, &[&scene.path("root.img"), &scene.path(name)]].concat());
    };
    convert(&[], "plain.qcow2");
    convert(&["-c"], "compressed.qcow2");
    convert(&["-o", "compat=0.10"], "old.qcow2");
    let overlay = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "compressed.qcow2"];
    run("qemu-img", &[&overlay[..], &[&scene.path("overlay.qcow2")]].concat());
    let words = "boots /boot/vmlinuz-6.1.0-9-amd64 with /boot/initrd.img-6.1.0-9-amd64 of the disk (ext4)";
    for spec in [
        "root.img",
        "root.img,cache=buffered",
        "plain.qcow2",
        "compressed.qcow2",
        "old.qcow2",
        "overlay.qcow2,backing=allow",
    ] {
        let before = fs::read(scene.file(spec.split(',').next().expect("a name"))).expect("there");
        let said = scene.check(spec);
        assert!(said.contains(words) && said.contains("root=UUID="), "{spec}: {said}");
        let after = fs::read(scene.file(spec.split(',').next().expect("a name"))).expect("there");
        assert!(before == after, "{spec} has changed");
    }
    let said = scene.check("overlay.qcow2");
    assert!(said.contains("backing=allow"), "{said}");
}

/// As a guest's package manager leaves it.
#[test]
fn a_kernel_that_was_installed_since_is_booted_next() {
    let scene = Scene::new(&["6.1.0-9-amd64"]);
    assert!(scene.check("root.img").contains("/boot/vmlinuz-6.1.0-9-amd64"));
    let new = scene.path("root/boot/vmlinuz-6.1.0-9-amd64");
    for name in ["vmlinuz", "initrd.img"] {
        // Until its initramfs is there, the one before is booted.
        assert!(scene.check("root.img").contains("/boot/vmlinuz-6.1.0-9-amd64"));
        let write = format!("write {new} /boot/{name}-6.1.0-10-amd64");
        run("debugfs", &["-w", "-R", &write, &scene.path("root.img")]);
    }
    assert!(scene.check("root.img").contains("/boot/vmlinuz-6.1.0-10-amd64"));
}

#[test]
fn a_disk_that_boots_nothing_is_told_with_what_to_do() {
    let scene = Scene::new(&[]);
    fs::write(scene.file("empty.img"), vec![0; MIB as usize]).expect("written");
    for (spec, words) in [
        ("root.img", "no kernel is on it"),
        ("empty.img", "neither a partition table nor a file system"),
        ("missing.img", "can't be opened"),
        ("root", "directory"),
    ] {
        let said = scene.check(spec);
        assert!(said.contains(words), "{spec}: {said}");
    }
    let output = Command::new(BALLAST).args(["run", "--memory", "64M"]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(2), "neither a kernel nor a disk");
}

/// A disk of zeros.
struct Zeros;

impl Source for Zeros {
    fn size(&self) -> u64 {
        MIB
    }

    fn read_at(&self, _: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0);
        Ok(())
    }
}

/// A disk that can't be read.
struct Broken;

impl Source for Broken {
    fn size(&self) -> u64 {
        MIB
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(5))
    }
}

fn ballast() -> Finder {
    Finder { helper: Helper { program: BALLAST.into(), arguments: vec!["read-disk".to_owned()] } }
}

fn shell(script: &str) -> Finder {
    let arguments = ["-c", script, "sh"].map(str::to_owned).to_vec();
    Finder { helper: Helper { program: "/bin/sh".into(), arguments } }
}

fn find(finder: &Finder, disk: &dyn Source) -> SearchError {
    let start = Instant::now();
    let error = finder.find_within(disk, Duration::from_secs(20)).expect_err("there is no kernel");
    assert!(start.elapsed() < Duration::from_secs(15), "{error}");
    error
}

#[test]
fn what_the_process_says_of_a_disk_is_heard() {
    let error = find(&ballast(), &Zeros);
    assert!(matches!(&error, SearchError::Refused(said) if said.contains("neither")), "{error}");
    let error = find(&ballast(), &Broken);
    assert!(matches!(&error, SearchError::Read(why) if why.raw_os_error() == Some(5)), "{error}");
}

#[test]
fn a_process_that_says_what_makes_no_sense_finds_nothing() {
    let octal = |bytes: &[u8]| bytes.iter().map(|byte| format!("\\{byte:03o}")).collect::<String>();
    let head = |kind: u8, len: u32, offset: u64| {
        octal(&[&[kind][..], &len.to_le_bytes(), &offset.to_le_bytes()].concat())
    };
    let plan = |cmdline: &str| {
        let json = format!(r#"{{"place":"p","by":"b","kernel":"/k","initrd":[],"cmdline":"{cmdline}"}}"#);
        format!("{}{}", head(2, json.len() as u32, 0), octal(json.as_bytes()))
    };
    let done = head(5, 0, 0);
    for (says, words) in [
        (head(9, 0, 0), "nobody understands"),
        (head(1, 2 << 20, 0), "too much at once"),
        (head(1, 512, MIB), "not on the disk"),
        (head(1, 512, u64::MAX), "not on the disk"),
        (format!("{}{{}}", head(2, 2, 0)), "its plan is none"),
        (format!("{}{done}", plan("quiet")), "sends no kernel"),
        (format!("{}k{done}", head(3, 1, 0)), "has no plan"),
        (plan("a\\nb"), "can't be used"),
        (plan(&"x".repeat(3000)), "can't be used"),
    ] {
        let error = find(&shell(&format!("printf '{says}'; exec sleep 60")), &Zeros);
        assert!(matches!(&error, SearchError::BadEnd(why) if why.contains(words)), "{says}: {error}");
    }
    // More than any kernel has.
    let flood = format!("while printf '{}'; do head -c 1048576 /dev/zero; done", head(3, 1 << 20, 0));
    let error = find(&shell(&flood), &Zeros);
    assert!(matches!(&error, SearchError::BadEnd(why) if why.contains("more than it may")), "{error}");
}

#[test]
fn a_process_that_ends_otherwise_or_never_finds_nothing() {
    for (script, words) in [
        ("exit 0", "exit status: 0"),
        ("echo 'no \u{1b}kernel' >&2; exit 7", "no  kernel"),
        ("kill -9 $$", "signal: 9"),
    ] {
        let error = find(&shell(script), &Zeros);
        assert!(matches!(&error, SearchError::BadEnd(why) if why.contains(words)), "{script}: {error}");
    }
    let missing = Finder { helper: Helper { program: "/nowhere/helper".into(), arguments: Vec::new() } };
    assert!(matches!(find(&missing, &Zeros), SearchError::Helper(_)));
    for script in ["exec sleep 60", "exec cat /dev/zero >&2"] {
        let error =
            shell(script).find_within(&Zeros, Duration::from_millis(300)).expect_err("it says nothing");
        assert!(matches!(error, SearchError::TooSlow(_)), "{script}: {error}");
    }
}

/// Nothing is left of a process that was given up.
#[test]
fn a_process_that_is_given_up_ends() {
    let directory = tempfile::tempdir().expect("a directory");
    let pid = directory.path().join("pid");
    let script = format!("echo $$ > {}; exec sleep 60", pid.display());
    shell(&script).find_within(&Zeros, Duration::from_millis(500)).expect_err("it says nothing");
    let pid = fs::read_to_string(pid).expect("it has started");
    assert!(!Path::new("/proc").join(pid.trim()).exists());
}

/// A balancer that hears a VM that starts, and never answers.
fn start_and_wait(directory: &Path) -> (Child, UnixStream) {
    let socket = directory.join("balancer/balancer.sock");
    fs::create_dir(directory.join("balancer")).expect("made");
    let listener = UnixListener::bind(socket).expect("bound");
    let vm = Command::new(BALLAST)
        .args(["run", "--memory", "64M", "--console", "none", "--disk", "disk.img"])
        .env("BALLAST_RUNTIME_DIR", directory)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it runs");
    let (connection, _) = listener.accept().expect("it asks for room");
    let process = socket_peercred(&connection).expect("it has one").pid;
    assert_ne!(process, Pid::from_child(&vm), "a VM with a disk has a process of its own");
    (vm, connection)
}

/// Waits until the VM's process has ended, which closes what it has open.
fn wait_for_end(mut connection: UnixStream) {
    io::copy(&mut connection, &mut io::sink()).expect("it hangs up");
}

#[test]
fn a_vm_ends_with_the_process_that_would_start_it_again() {
    for (signal, code) in [(Signal::TERM, Some(128 + 15)), (Signal::KILL, None)] {
        let directory = tempfile::tempdir().expect("a directory");
        let (mut vm, connection) = start_and_wait(directory.path());
        kill_process(Pid::from_child(&vm), signal).expect("sent");
        wait_for_end(connection);
        assert_eq!(vm.wait().expect("it ends").code(), code);
    }
}
