//! A stock Debian on a disk.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use api::units::Bytes;
use guests::{Host, Printed, VmSettings, ballast};
use lab::DebianImage;

/// How long such a guest takes in an emulated host until something is reached.
const BOOTING: Duration = Duration::from_secs(180);
const ENDING: Duration = Duration::from_secs(60);
const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFq0Tt9Y2k8X3mVn1o0y1mH4cD0r6Zt8bqk0mH4o6S1x me@here\n";

/// Its disk is an overlay over a compressed image; the user, the key and the host's name come of the seed.
#[test]
#[ignore = "an image is built, and a stock system takes minutes to boot in an emulated host"]
fn a_debian_image_boots_and_its_cloud_init_makes_a_user() {
    let image = DebianImage::bookworm().expect("an image can be built");
    Host::new().memory(Bytes::gib(4)).files(image.placed()).usually(Duration::from_secs(240)).run(|| {
        let image = DebianImage::bookworm().expect("it is here");
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        fs::write(at("key.pub"), KEY).expect("written");
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
        let mut vm = settings.with(&seed).start();
        vm.wait_for_line("Debian GNU/Linux 12 web-1 ttyS0", BOOTING);
        vm.wait_for_line("/home/me/.ssh/authorized_keys for user me", BOOTING);
        // cloud-init's last part begins once multi-user.target is reached, of which a console with a login prompt is
        // told no more.
        vm.wait_for_line("running 'modules:final'", BOOTING);
        vm.wait_for_line("Datasource DataSourceNoCloud", BOOTING);
        // The prompt has no end of a line; what it asks has one when it is answered.
        vm.type_in("\n");
        vm.wait_for_line("web-1 login:", ENDING);
        vm.ask(async |client| client.power_button().await).expect("a press is taken");
        assert_eq!(vm.wait_for_end(ENDING), 0);
    });
}
