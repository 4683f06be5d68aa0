//! Unit tests that need KVM, on a host that has it for certain: elsewhere they pass without it.

use std::time::Duration;

use lab::{Emulator, unit_tests};

/// Several times what they take.
const LIMIT: Duration = Duration::from_secs(600);

fn pass(package: &str, tests: &[&str]) {
    let program = unit_tests(package).expect("they build");
    let host = Emulator { shell: false, ballast: false, limit: LIMIT, ..Emulator::default() };
    let outcome = host.run(&program, &[&["--test-threads=1", "--nocapture"], tests].concat());
    assert_eq!(outcome.expect("the host comes to its end").code, 0, "see the output above");
}

#[test]
fn payloads_and_counters_of_slat() {
    pass("slat", &["payload::", "counters::"]);
}

#[test]
fn vcpus_and_devices_of_a_vm() {
    pass("vmm", &["vcpu::", "builder::", "kvm::"]);
}
