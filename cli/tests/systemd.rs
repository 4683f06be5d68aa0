//! The units in `resources/`, and what a service manager hears of the daemon.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for a message that begins with `what`.
fn until_told(manager: &UnixDatagram, what: &str) -> String {
    let begun = Instant::now();
    let mut buffer = [0; 1024];
    while begun.elapsed() < PATIENCE {
        if let Ok(length) = manager.recv(&mut buffer) {
            let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if message.starts_with(what) {
                return message;
            }
        }
    }
    panic!("gave up waiting for {what}");
}

fn send(daemon: &Child, signal: Signal) {
    kill_process(Pid::from_raw(daemon.id().try_into().unwrap()).unwrap(), signal).unwrap();
}

#[test]
fn a_service_manager_hears_of_the_daemons_whole_life() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let settings = directory.path().join("balancer.toml");
    fs::write(&settings, "budget = \"64M\"\nbeside_others = true\n").unwrap();
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_ballast"))
        .args(["balancer", "--config", settings.to_str().unwrap()])
        .env("BALLAST_RUNTIME_DIR", directory.path())
        .env("NOTIFY_SOCKET", &socket)
        .env("WATCHDOG_USEC", "1000000")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let ready = until_told(&manager, "READY=1");
    assert!(ready.contains("\nWATCHDOG=1\nSTATUS=0 VMs may hold "), "{ready}");
    until_told(&manager, "WATCHDOG=1");
    send(&daemon, Signal::HUP);
    let reloading = until_told(&manager, "RELOADING=1");
    assert!(reloading.contains("\nMONOTONIC_USEC="), "{reloading}");
    until_told(&manager, "READY=1");
    send(&daemon, Signal::TERM);
    until_told(&manager, "STOPPING=1");
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
}

/// Whose unit it is.
fn scope(unit: &Path) -> &'static str {
    if unit.parent().is_some_and(|directory| directory.ends_with("user")) { "--user" } else { "--system" }
}

/// What systemd itself says of a unit whose program is there; `None` where there is no systemd here.
fn verdict(unit: &Path, program: &str) -> Option<(bool, String)> {
    let text = fs::read_to_string(unit).unwrap();
    assert!(text.contains(program), "{} starts {program}", unit.display());
    let directory = tempfile::tempdir().unwrap();
    // An instance, where it is a template.
    let name = unit.file_name().unwrap().to_str().unwrap().replace("@.", "@web.");
    let copy = directory.path().join(name);
    fs::write(&copy, text.replace(program, env!("CARGO_BIN_EXE_ballast"))).unwrap();
    match Command::new("systemd-analyze")
        .args(["verify", "--man=no", scope(unit)])
        .arg(&copy)
        .env("XDG_RUNTIME_DIR", directory.path())
        .output()
    {
        Ok(output) => {
            // It may have something to say of other units of this machine.
            let name = copy.file_name().unwrap().to_str().unwrap();
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            let of_it: Vec<&str> = error.lines().filter(|line| line.contains(name)).collect();
            Some((output.status.success(), of_it.join("\n")))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => panic!("systemd-analyze: {error}"),
    }
}

#[test]
fn a_balancer_that_fails_for_a_while_is_started_again_for_ever() {
    let resources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources");
    for unit in ["systemd/ballast-balancer.service", "systemd/user/ballast-balancer.service"] {
        let text = fs::read_to_string(resources.join(unit)).unwrap();
        let (of_unit, of_service) = text.split_once("[Service]").unwrap();
        assert!(of_service.lines().any(|line| line == "Restart=always"), "{unit}");
        // Else five starts within 10 s are all there are: systemd.unit(5).
        assert!(of_unit.lines().any(|line| line == "StartLimitIntervalSec=0"), "{unit}");
    }
}

#[test]
fn systemd_takes_the_units_as_they_are() {
    let resources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources");
    for (unit, program) in [
        ("systemd/ballast-balancer.service", "/usr/local/bin/ballast"),
        ("systemd/user/ballast-balancer.service", "/usr/local/bin/ballast"),
        ("systemd/ballast@.service", "/usr/local/bin/ballast"),
        ("systemd/user/ballast@.service", "/usr/local/bin/ballast"),
        ("ballast-agent.service", "/usr/local/sbin/ballast-agent"),
    ] {
        match verdict(&resources.join(unit), program) {
            Some(verdict) => assert_eq!(verdict, (true, String::new()), "{unit}"),
            None => eprintln!("{unit} was not verified: systemd-analyze is not installed"),
        }
    }
}

#[test]
fn units_of_root_are_shut_in_as_systemd_counts_it() {
    let resources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/systemd");
    for unit in ["ballast@.service", "ballast-balancer.service"] {
        let directory = tempfile::tempdir().unwrap();
        let copy = directory.path().join(unit);
        let text = fs::read_to_string(resources.join(unit)).unwrap();
        fs::write(&copy, text.replace("/usr/local/bin/ballast", env!("CARGO_BIN_EXE_ballast"))).unwrap();
        // The threshold is in tenths.
        let judged = Command::new("systemd-analyze")
            .args(["security", "--offline=yes", "--no-pager", "--threshold=30"])
            .arg(&copy)
            .output();
        match judged {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                eprintln!("{unit} was not judged: systemd-analyze is not installed");
            }
            Err(error) => panic!("systemd-analyze: {error}"),
        }
    }
}

/// What a cluster takes for stopped it starts on another host, with the same disks.
#[test]
fn a_cluster_is_told_of_a_stopped_vm_only_where_systemd_says_so() {
    const FUNCTIONS: &str =
        "OCF_SUCCESS=0 OCF_ERR_GENERIC=1 OCF_ERR_ARGS=2 OCF_ERR_CONFIGURED=6 OCF_NOT_RUNNING=7
        ocf_exit_reason() { echo \"$1\"; }
        check_binary() { :; }";
    let directory = tempfile::tempdir().unwrap();
    let program = |name: &str, does: &str| {
        let path = directory.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{does}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    };
    program("ballast", "exit 0");
    fs::write(directory.path().join("ocf-shellfuncs"), FUNCTIONS).unwrap();
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap());
    for (systemctl, code) in [
        ("echo active", 0),
        ("echo activating", 0),
        ("echo inactive", 7),
        ("echo failed", 7),
        ("echo deactivating", 1),
        ("echo 'Failed to connect to bus' >&2; exit 1", 1),
        ("echo", 1),
    ] {
        program("systemctl", systemctl);
        let mut agent = Command::new("sh");
        agent.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/pacemaker/vm")).arg("monitor");
        agent.env("PATH", &path).env("OCF_FUNCTIONS_DIR", directory.path()).env("OCF_RESKEY_name", "web");
        let output = agent.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{systemctl}: {output:?}");
    }
}
