//! A stock Debian on a disk.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use api::status::VmState;
use api::units::Bytes;
use guests::{Host, Printed, VmSettings, ballast, leave_the_first_root, wait_for};
use lab::DebianImage;

/// How long such a guest takes in an emulated host until something is reached.
const BOOTING: Duration = Duration::from_secs(180);
const ENDING: Duration = Duration::from_secs(60);

/// A command of the host's shell; what it says.
fn host(command: &str) -> String {
    println!("{command}");
    let output = Command::new("sh").env("PATH", "/usr/bin:/bin:/sbin").args(["-c", command]).output();
    let output = output.expect("the host has a shell");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

/// Its disk is an overlay over a compressed image; the user, the key and the host's name come of the seed.
#[test]
#[ignore = "an image is built, and a stock system takes minutes to boot in an emulated host"]
fn a_debian_image_boots_and_its_user_logs_in() {
    let image = DebianImage::bookworm().expect("an image can be built");
    let host_with_ssh = Host::new()
        .memory(Bytes::gib(4))
        .files(image.placed())
        .modules(&["dummy"])
        .passt()
        .program("/usr/bin/ssh", "openssh-client")
        .program("/usr/bin/ssh-keygen", "openssh-client");
    host_with_ssh.usually(Duration::from_secs(300)).run(|| {
        leave_the_first_root();
        // The host's own network, as passt asks for one.
        host("ip link set lo up && ip link add net0 type dummy && ip addr add 198.51.100.1/24 dev net0");
        host("ip link set net0 up && ip route add default via 198.51.100.2");
        host("mkdir -p /etc /root && echo root:x:0:0:root:/root:/bin/sh >/etc/passwd");
        let image = DebianImage::bookworm().expect("it is here");
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        host(&format!("ssh-keygen -q -t ed25519 -N '' -C me@here -f {}", at("key")));
        let disk = image.disk();
        let made = Command::new(ballast())
            .args(["disk", "create", &at("web.qcow2"), "--backing"])
            .arg(disk)
            .status()
            .expect("ballast runs");
        assert!(made.success());
        let settings = VmSettings {
            name: "web".to_owned(),
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            disk: Some(format!("{},backing=allow", at("web.qcow2"))),
            memory: "1G".to_owned(),
            cmdline: "systemd.show_status=1".to_owned(),
            defaults: true,
            arguments: Vec::new(),
            printed: Printed::Yes,
        };
        let seed = ["--user", "me", "--ssh-key", &at("key.pub"), "--hostname", "web-1"];
        let net = ["--net", "user,forward=tcp:127.0.0.1:2222:22", "--vsock"];
        let mut vm = settings.with(&seed).with(&net).start();
        vm.wait_for_line("Debian GNU/Linux 12 web-1 ttyS0", BOOTING);
        vm.wait_for_line("/home/me/.ssh/authorized_keys for user me", BOOTING);
        // It says so at its end, once multi-user.target is reached.
        vm.wait_for_line("Datasource DataSourceNoCloud", BOOTING);
        let options = format!(
            "-i {} -v -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
            at("key")
        );
        let said = host(&format!(
            "timeout 120 ssh {options} -p 2222 me@127.0.0.1 'echo by TCP at $(hostname); sudo id -u'"
        ));
        assert_eq!(said, "by TCP at web-1\n0\n");
        let own = ballast();
        let own = own.display();
        let said = host(&format!("timeout 120 {own} ssh me@web {options} 'echo by vsock at $(hostname)'"));
        assert_eq!(said, "by vsock at web-1\n");

        // It sleeps, and its power button wakes it.
        host(&format!(
            "timeout 120 {own} ssh me@web {options} 'sudo systemd-run --on-active=2 sh -c \"echo freeze >/sys/power/state\"'"
        ));
        wait_for("sleep", ENDING, || (vm.status().state == VmState::Sleeping).then_some(()));
        vm.ask(async |client| client.power_button().await).expect("a press is taken");
        wait_for("its end of sleep", ENDING, || (vm.status().state == VmState::Running).then_some(()));
        let said = host(&format!("timeout 120 {own} ssh me@web {options} 'echo awake'"));
        assert_eq!(said, "awake\n");
        vm.ask(async |client| client.power_button().await).expect("a press is taken");
        assert_eq!(vm.wait_for_end(ENDING), 0);
    });
}
