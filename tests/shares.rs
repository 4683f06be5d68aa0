//! Guests that share directories with their host.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use guests::{Host, Vm, VmSettings, ballast, images, leave_the_first_root, wait_for};
use lab::Kernel;

/// How long a step with files takes.
const WORKING: Duration = Duration::from_secs(30);
/// Bytes that go each way.
const BYTES: usize = 3 << 20;

const PROGRAM: &str = "/usr/lib/qemu/virtiofsd";

fn settings(arguments: &[&str]) -> VmSettings {
    let images = images(Kernel::V6_1);
    let mut settings = VmSettings::new("shares", &images, "256M", "ballast.console");
    settings.initrd = Kernel::V6_1.net_initrd().expect("it was made");
    settings.with(arguments)
}

fn guest(arguments: &[&str]) -> Vm {
    let mut vm = settings(arguments).start();
    vm.wait_until_ready();
    vm
}

/// The processes that share a directory; each shuts itself in with a second one.
fn sharers() -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("it is mounted").flatten();
    let numbers = processes.filter_map(|process| process.file_name().to_string_lossy().parse().ok());
    let is_one = |number: &u32| {
        let name = fs::read_to_string(format!("/proc/{number}/comm")).unwrap_or_default();
        let state = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
        name.starts_with("virtiofsd") && !state.contains(") Z ")
    };
    numbers.filter(is_one).collect()
}

fn bytes() -> Vec<u8> {
    (0..BYTES as u64 / 8).flat_map(|place| place.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

#[test]
fn a_directory_is_written_on_both_sides() {
    let host = Host::new().net_guest(Kernel::V6_1).program(PROGRAM, "qemu-system-common");
    host.usually(Duration::from_secs(120)).run(|| {
        leave_the_first_root();
        for directory in ["/srv/both", "/srv/kept/below"] {
            fs::create_dir_all(directory).expect("a directory");
        }
        // Its program has more than root's usual rights taken away, but not those of an owner.
        fs::set_permissions("/srv/both", fs::Permissions::from_mode(0o755)).expect("it is ours");
        fs::write("/srv/both/from-host", bytes()).expect("it fits");
        fs::write("/srv/kept/below/file", "kept").expect("it fits");
        for transport in ["pci", "mmio"] {
            shares(transport);
        }
        refuses_what_does_not_go_together();
    });
}

fn shares(transport: &str) {
    let both = "/srv/both,tag=home";
    let mut vm = guest(&["--transport", transport, "--share", both, "--share", "/srv/kept,readonly"]);
    vm.step("run:mkdir -p /home /kept && mount -t virtiofs home /home", WORKING);
    vm.step("run:mount -t virtiofs share1 /kept", WORKING);

    // Both ways, with a pause in the middle.
    vm.type_in("run:cp /home/from-host /home/from-guest && sync\n");
    for _ in 0..5 {
        vm.ask(async |client| client.pause().await).expect("it is paused");
        vm.ask(async |client| client.resume().await).expect("it goes on");
    }
    vm.wait_for_line("DONE run:cp", WORKING);
    assert!(fs::read("/srv/both/from-guest").expect("it is there") == bytes());
    fs::remove_file("/srv/both/from-guest").expect("it is there");
    fs::write("/srv/both/later", "said later").expect("it fits");
    vm.step("run:grep -q later /home/later && mkdir /home/made && rmdir /home/made", WORKING);

    // What can't be written stays as it is, whoever asks.
    vm.step("run:grep -q kept /kept/below/file", WORKING);
    for write in
        ["touch /kept/new", "echo x >/kept/below/file", "rm /kept/below/file", "chmod 777 /kept/below"]
    {
        vm.step(&format!("run:! {write}"), WORKING);
    }
    assert_eq!(fs::read_to_string("/srv/kept/below/file").expect("it stays"), "kept");

    // The driver goes and comes back.
    vm.step("run:umount /home && umount /kept", WORKING);
    vm.step("unbind:virtiofs", WORKING);
    vm.step("bind:virtiofs", WORKING);
    vm.step("run:mount -t virtiofs home /home && cmp /home/from-host /home/from-host", WORKING);

    // All end with their VM, whichever way that goes.
    if transport == "mmio" {
        vm.type_in("end\n");
        assert_eq!(vm.wait_for_end(WORKING), 0);
        return wait_for("the end of all of them", WORKING, || sharers().is_empty().then_some(()));
    }

    // One dies. The guest waits for it in vain; the rest of the VM goes on, and so does the other.
    let shown = |vm: &Vm| vm.status().shares.iter().map(|share| share.serves).collect::<Vec<_>>();
    assert_eq!(shown(&vm), [true, true]);
    let first = sharers()[0];
    // SAFETY: a signal to a process that this test's VM started.
    assert_eq!(unsafe { libc::kill(first as i32, libc::SIGKILL) }, 0);
    vm.wait_for_line("has lost the shared directory /srv/both", WORKING);
    wait_for("the end of its process", WORKING, || (sharers().len() == 2).then_some(()));
    assert_eq!(shown(&vm), [false, true]);
    vm.step("run:mount -t virtiofs share1 /kept && grep -q kept /kept/below/file", WORKING);

    // It could not even sync.
    vm.kill();
    wait_for("the end of all of them", WORKING, || sharers().is_empty().then_some(()));
}

fn refuses_what_does_not_go_together() {
    let images = images(Kernel::V6_1);
    let refused = |more: &[&str]| {
        let mut command = Command::new(ballast());
        command.args(["run", "--no-api", "--console", "none", "--kernel"]).arg(&images.bzimage);
        let output = command.args(more).output().expect("ballast");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let plugs = ["--memory", "128M,max=256M", "--grow", "plug", "--share", "/srv/both"];
    let said = refused(&plugs);
    assert!(said.contains("use --grow balloon"), "{said}");
    let private = ["--memory", "128M", "--memory-backing", "anonymous", "--share", "/srv/both"];
    let said = refused(&private);
    assert!(said.contains("--memory-backing memfd"), "{said}");
    let said = refused(&["--memory", "128M", "--share", "/srv/nowhere"]);
    assert!(said.contains("/srv/nowhere"), "{said}");
    assert!(sharers().is_empty());
}
