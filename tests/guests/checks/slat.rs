//! What `ballast slat` says is what KVM and a guest say themselves.

use std::fs;
use std::process::Command;
use std::time::Duration;

use lab::Kernel;
use serde_json::Value;

use crate::{VmSettings, ballast, images};

const SOON: Duration = Duration::from_secs(5);
/// Where a Linux kernel begins without address space randomisation (Documentation/arch/x86/x86_64/mm.rst).
const KERNEL: u64 = 0xffff_ffff_8100_0000;

/// `ballast slat walk --json`.
fn walk(vm: &str, arguments: &[&str]) -> Value {
    let output =
        Command::new(ballast()).args(["slat", "walk", "--json", "--vm", vm]).args(arguments).output();
    let output = output.expect("ballast can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A number behind `name=0x` in a line.
fn field(line: &str, name: &str) -> u64 {
    let text = line.split(&format!("{name}=0x")).nth(1).and_then(|rest| rest.split_whitespace().next());
    u64::from_str_radix(text.expect("the guest says it"), 16).expect("a number")
}

/// An address of a guest is followed to where the guest says that it is, and where KVM's own translation ends.
pub fn addresses_are_followed() {
    let images = images(Kernel::V6_1);
    // With SMAP, KVM_TRANSLATE, which reads as ring 0, finds no page of a process.
    // A processor that needs its kernel's tables apart from a process's (PTI) shows nothing of the kernel in them.
    let line = "nokaslr nopti clearcpuid=smap ballast.console";
    let mut vm = VmSettings::new("shown", &images, "256M", line).start();
    vm.wait_until_ready();
    vm.type_in("show\n");
    let shown = vm.wait_for_line("SHOWN", SOON);
    let address = field(&shown, "address");

    let way = walk("shown", &["--gva", &format!("{address:#x}")]);
    assert_eq!(way["kvm"], "agrees", "{way:#}");
    assert_eq!(way["seen"]["physical"], field(&shown, "physical"), "{way:#}");
    assert_eq!(way["end"]["guest"], field(&shown, "physical"), "{way:#}");
    assert_eq!(way["word"], field(&shown, "value"), "{way:#}");
    assert_eq!(way["page"], "4K");
    let stages = way["stages"].as_array().expect("stages");
    assert_eq!(stages.len(), 4);
    // Each entry is where the one before points to, and is a present one for ring 3.
    let mut table = way["seen"]["cr3"].as_u64().expect("CR3");
    for stage in stages {
        let entry = &stage["entry"];
        assert_eq!(entry["at"].as_u64().map(|at| at >> 12), Some(table >> 12 & 0xff_ffff_ffff), "{way:#}");
        assert!(stage["flags"].as_str().is_some_and(|f| f.starts_with("P W U")), "{way:#}");
        assert!(stage["place"]["residence"]["system"].as_u64().is_some_and(|s| s > 0), "{way:#}");
        table = entry["value"].as_u64().expect("an entry");
    }
    assert!(way["end"]["residence"]["page"].is_string(), "root learns the host's page size: {way:#}");

    let physical = walk("shown", &["--gpa", &format!("{:#x}", field(&shown, "physical"))]);
    assert_eq!((&physical["end"], &physical["word"]), (&way["end"], &way["word"]));

    // The kernel's own code is mapped in pages of 2 MiB.
    let way = walk("shown", &["--gva", &format!("{KERNEL:#x}")]);
    assert_eq!((&way["kvm"], &way["page"]), (&Value::from("agrees"), &Value::from("2M")), "{way:#}");
    assert_eq!(way["end"]["guest"], field(&shown, "kernel"), "{way:#}");

    // Nothing is mapped in the first page of a process.
    let way = walk("shown", &["--gva", "0"]);
    assert_eq!(way["kvm"], "agrees", "{way:#}");
    assert!(way["end"].is_null() && way["why"].is_string(), "{way:#}");

    let arguments = ["slat", "walk", "--vm", "shown", "--gva", "0", "--cpu", "7"];
    let missing = Command::new(ballast()).args(arguments).output().expect("ballast can be run");
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("no vCPU 7"), "{missing:?}");
}

/// `ballast slat run` of one payload, with SLAT both ways.
fn reload(output: &str, more: &[&str]) -> std::process::Output {
    let payload = ["--payload", "invlpg", "--passes", "1", "--rounds", "1"];
    let mut command = Command::new(ballast());
    command.args(["slat", "run", "--reload-module", "--output", output]).args(payload).args(more);
    command.output().expect("ballast can be run")
}

/// Exits an operation in what such a run wrote.
fn exits(path: &str) -> f64 {
    let run: Value = serde_json::from_slice(&fs::read(path).expect("written")).expect("JSON");
    run["measurements"][0]["exits"]["value"]["median"].as_f64().expect("measured")
}

/// A module is reloaded with its parameter for SLAT the other way round, and put back.
pub fn the_module_is_reloaded_and_put_back(module: &str, parameter: &str) {
    const EVEN_HERE: &[&str] = &["--even-if-emulated"];
    if std::env::var_os("BALLAST_LAB").is_none() {
        return println!("not run: this host is nobody's to reload modules on");
    }
    let path = format!("/sys/module/{module}/parameters/{parameter}");
    let parameter = || fs::read_to_string(&path).expect("the module is loaded");
    let before = parameter();

    let refused = reload("/tmp/run.json", &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("emulated"), "{refused:?}");

    // Whoever holds /dev/kvm keeps the module.
    let user = fs::File::open("/dev/kvm").expect("KVM works here");
    let busy = reload("/tmp/run.json", EVEN_HERE);
    assert!(String::from_utf8_lossy(&busy.stderr).contains("in use"), "{busy:?}");
    drop(user);

    let done = reload("/tmp/run.json", EVEN_HERE);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert!(exits("/tmp/run.slat-on.json") < 0.1);
    assert!((exits("/tmp/run.slat-off.json") - 1.0).abs() < 0.1);
    assert_eq!(parameter(), before);
}
