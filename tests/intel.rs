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
use lab::{Emulator, Execution, INIT, INSIDE, Init, Kernel, Terminal, Vendor};
use serde_json::Value;
use slat::lab::walks::{Miss, misses};
use slat::run::Run;
use slat::walk::PageSize;

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
        // A guest that does nothing but loop is never left for the host's clock under Bochs 2.7.
        unit_tests("slat", &["payload::", "counters::", "--skip", "the_watchdog_ends_a_payload_that_hangs"]);
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

/// What an emulated host's processor read in loads that missed its TLB, by its emulator's record.
fn misses_of(nested_paging: bool) -> Vec<Miss> {
    let init = Init { program: ballast(), arguments: "slat inside".into() };
    let host = Emulator {
        vendor: Vendor::Intel,
        execution: Execution::Counted,
        nested_paging,
        init: Some(init),
        shell: false,
        ballast: false,
        references: true,
        terminal: Terminal::Kept,
        limit: Duration::from_secs(1200),
        ..Emulator::default()
    };
    let arguments = ["slat", "inside", "--set", "walks", "--instructions"];
    let attempt = host.attempt(INIT.as_ref(), &arguments, || false).expect("a host");
    let result = attempt.results.get("result.json").unwrap_or_else(|| panic!("{attempt:?}"));
    let run: Run = serde_json::from_slice(result).expect("a run");
    assert_eq!(run.failed(), None);
    misses(&run, &attempt.references).unwrap_or_else(|why| panic!("{why}"))
}

#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn a_miss_of_the_tlb_costs_what_the_model_says() {
    let found = misses_of(true);
    assert_eq!(found.len(), 6, "each page size of the guest over each of the host: {found:?}");
    for miss in &found {
        assert!(miss.is_as_modelled(), "the model has {:?}, and there was {miss:?}", miss.model().steps());
    }
    use PageSize::{Size1G, Size2M, Size4K};
    for (guest, host, references) in [
        (Size4K, Size4K, 24),
        (Size4K, Size2M, 19),
        (Size2M, Size4K, 19),
        (Size2M, Size2M, 15),
        (Size1G, Size4K, 14),
        (Size1G, Size2M, 11),
    ] {
        let miss = found.iter().find(|miss| (miss.guest_page, miss.host_page) == (guest, host));
        assert_eq!(miss.map(Miss::references), Some(references), "{guest} over {host}");
    }
}

#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn a_miss_of_the_tlb_costs_one_walk_without_ept() {
    let found = misses_of(false);
    let usual = |miss: &&Miss| (miss.guest_page, miss.host_page) == (PageSize::Size4K, PageSize::Size4K);
    assert_eq!(found.iter().find(usual).map(Miss::references), Some(4), "{found:?}");
    assert!(found.iter().all(|miss| miss.references() <= 4), "{found:?}");
}

#[test]
#[ignore = "takes minutes in the lab: make test-long"]
fn the_intel_module_is_reloaded_and_put_back() {
    host(120).run(|| the_module_is_reloaded_and_put_back("kvm_intel", "ept"));
}
