//! Guests on an Intel host: VMX with extended page tables, without them, and with parts of them switched off.
//!
//! An emulated Intel host takes a minute to boot, so that one test does as much as it can in one host.

use std::fs;
use std::process::Command;
use std::time::Duration;

use guests::checks::balloon::{freed_memory_comes_back, inflates_and_deflates};
use guests::checks::boot::boot;
use guests::checks::plug::plugs_uses_and_unplugs;
use guests::checks::slat::{addresses_are_followed, the_module_is_reloaded_and_put_back};
use guests::{Host, ballast, images, unit_tests};
use lab::{INSIDE, Kernel};
use serde_json::Value;

fn host(usually: u64) -> Host {
    Host::new().intel().guest(Kernel::V6_1).without_halt_polling().usually(Duration::from_secs(usually))
}

/// A parameter of kvm_intel; `None` on a host of another kind.
fn parameter(name: &str) -> Option<String> {
    fs::read_to_string(format!("/sys/module/kvm_intel/parameters/{name}"))
        .ok()
        .map(|text| text.trim().to_owned())
}

/// Asserts that kvm_intel has taken a parameter, and that a guest behaves as it says.
fn probe(ept: bool, parameters: &[(&str, &str)]) {
    if std::env::var_os(INSIDE).is_none() {
        return println!("not run: a real host is what it is");
    }
    for (name, value) in parameters.iter().copied().chain([("ept", if ept { "Y" } else { "N" })]) {
        assert_eq!(parameter(name).as_deref(), Some(value), "kvm_intel.{name}");
    }
    let output =
        Command::new(ballast()).args(["slat", "probe", "--json"]).output().expect("ballast can be run");
    let probe: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(probe["verdict"], if ept { "slat" } else { "shadow-paging" }, "{probe:#}");
    assert_eq!((&probe["module"], &probe["says_slat"]), (&"kvm_intel".into(), &ept.into()), "{probe:#}");
    assert!(probe["disagreement"].is_null(), "{probe:#}");
    assert_eq!(probe["emulated_host"], true, "the lab tells what its processor does not: {probe:#}");
}

fn boots(kernel: Kernel) {
    boot("stock", kernel, &images(kernel).bzimage, "pci", "1", "256M");
}

#[test]
fn ept_translates_for_a_stock_guest() {
    host(240).run(|| {
        probe(true, &[("vpid", "Y"), ("eptad", "Y")]);
        boots(Kernel::V6_1);
        addresses_are_followed();
    });
}

#[test]
fn a_stock_guest_boots_without_ept() {
    host(240).nested_paging(false).run(|| {
        probe(false, &[]);
        boots(Kernel::V6_1);
    });
}

#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn vcpus_have_the_registers_that_the_tables_name() {
    host(200).unit_tests("vmm").unit_tests("slat").run(|| {
        unit_tests("vmm", &["arch::", "vcpu::", "builder::", "kvm::"]);
        unit_tests("slat", &["payload::", "counters::"]);
    });
}

#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn memory_moves_on_ept_and_what_is_freed_comes_back() {
    host(400).run(|| {
        inflates_and_deflates("balloon", Kernel::V6_1, &[]);
        freed_memory_comes_back(Kernel::V6_1);
        plugs_uses_and_unplugs(Kernel::V6_1);
    });
}

#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn memory_moves_without_ept() {
    host(600).nested_paging(false).run(|| {
        addresses_are_followed();
        inflates_and_deflates("shadow", Kernel::V6_1, &[]);
        plugs_uses_and_unplugs(Kernel::V6_1);
    });
}

#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn a_newer_guest_boots_on_ept_and_its_memory_moves() {
    host(600).guest(Kernel::V6_12).run(|| {
        boots(Kernel::V6_12);
        inflates_and_deflates("newer", Kernel::V6_12, &["--memory-backing", "memfd"]);
        plugs_uses_and_unplugs(Kernel::V6_12);
    });
}

#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn a_guest_works_without_tags_in_the_tlb() {
    host(240).parameter("vpid", "0").run(|| {
        probe(true, &[("vpid", "N")]);
        boots(Kernel::V6_1);
        inflates_and_deflates("untagged", Kernel::V6_1, &[]);
    });
}

/// Without these bits KVM finds out by protecting pages which of them a guest has used.
#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn a_guest_works_without_accessed_and_dirty_bits_of_ept() {
    host(240).parameter("eptad", "0").run(|| {
        probe(true, &[("eptad", "N")]);
        boots(Kernel::V6_1);
        inflates_and_deflates("plain", Kernel::V6_1, &[]);
    });
}

#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn the_intel_module_is_reloaded_and_put_back() {
    host(120).run(|| the_module_is_reloaded_and_put_back("kvm_intel", "ept"));
}
