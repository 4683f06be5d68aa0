//! Firecracker, as it publishes its API.

use api::status::DriverState;
use api::units::Bytes;
use balancer::driver::firecracker::Firecracker;
use balancer::driver::{Driver, Error};
use serde_json::json;

use crate::recorded::Recorded;
use crate::{LIMIT, limits, place, report};

pub const FIRECRACKER: &[(&str, u16, &str)] = &[
    (
        "GET /",
        200,
        r#"{"id": "web-1", "state": "Running", "vmm_version": "1.12.0", "app_name": "Firecracker"}"#,
    ),
    (
        "GET /machine-config",
        200,
        r#"{"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false, "huge_pages": "None"}"#,
    ),
    ("GET /balloon", 200, r#"{"amount_mib": 256, "deflate_on_oom": true, "stats_polling_interval_s": 1}"#),
    (
        "GET /balloon/statistics",
        200,
        r#"{"target_pages": 65536, "actual_pages": 51200, "target_mib": 256, "actual_mib": 200,
            "swap_in": 0, "swap_out": 0, "major_faults": 210, "minor_faults": 98112,
            "free_memory": 314572800, "total_memory": 1040187392, "available_memory": 419430400,
            "disk_caches": 52428800, "hugetlb_allocations": 0, "hugetlb_failures": 0}"#,
    ),
    ("PATCH /balloon", 204, ""),
    ("PATCH /balloon/statistics", 204, ""),
];

pub fn firecracker(vm: &Recorded) -> Firecracker {
    Firecracker::new(vm.socket(), limits()).with_timeout(LIMIT)
}

#[tokio::test]
async fn firecracker_is_read_and_told() {
    let (_directory, socket) = place();
    let vm = Recorded::http(socket, FIRECRACKER);
    let mut driver = firecracker(&vm);
    let status = report(&mut driver).await;
    assert_eq!(status.pid, Some(std::process::id()), "the socket is this test's own");
    let memory = &status.memory;
    assert_eq!((memory.limits.min(), memory.limits.max()), (Bytes::mib(256), Bytes::gib(1)));
    assert_eq!((memory.target, memory.actual), (Bytes::mib(768), Bytes::mib(824)));
    assert_eq!(memory.driver, DriverState::Active);
    assert_eq!(memory.used(), Some(Bytes::mib(424)));
    let aged = memory.report.as_ref().unwrap();
    assert_eq!(aged.age_ms, 0);
    assert_eq!(aged.statistics.major_faults, Some(210));
    assert_eq!(aged.statistics.oom_kills, None);

    // In whole MiB, and never more memory than was granted.
    driver.set_target(Bytes(Bytes::mib(700).0 + 4096)).await.unwrap();
    driver.set_target(Bytes::gib(1)).await.unwrap();
    assert_eq!(vm.orders("PATCH /balloon"), [json!({"amount_mib": 324}), json!({"amount_mib": 0})]);
    assert!(vm.orders("PATCH /balloon/statistics").is_empty());
}

#[tokio::test]
async fn firecracker_is_asked_for_statistics_often_enough_and_once() {
    let (_directory, socket) = place();
    let vm = Recorded::http(socket, FIRECRACKER);
    vm.answer(
        "GET /balloon",
        200,
        r#"{"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 30}"#,
    );
    let mut driver = firecracker(&vm);
    report(&mut driver).await;
    report(&mut driver).await;
    assert_eq!(vm.orders("PATCH /balloon/statistics"), [json!({"stats_polling_interval_s": 1})]);
}

#[tokio::test]
async fn a_firecracker_without_balloon_or_statistics_is_charged_in_full() {
    let (_directory, socket) = place();
    let vm = Recorded::http(socket, FIRECRACKER);
    vm.answer("GET /balloon", 400, r#"{"fault_message": "No balloon device found."}"#);
    vm.answer("PATCH /balloon", 400, "{\"fault_message\": \"No balloon\\u001b[2J device found.\"}");
    let mut driver = firecracker(&vm);
    let memory = report(&mut driver).await.memory;
    assert_eq!(
        (memory.actual, memory.target, memory.driver),
        (Bytes::gib(1), Bytes::gib(1), DriverState::Absent)
    );
    let error = driver.set_target(Bytes::mib(512)).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    assert!(error.to_string().contains("No balloon") && !error.to_string().contains('\x1b'), "{error}");

    vm.answer(
        "GET /balloon",
        200,
        r#"{"amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 0}"#,
    );
    let memory = report(&mut driver).await.memory;
    assert_eq!((memory.actual, memory.report), (Bytes::gib(1), None));

    vm.answer("GET /balloon", FIRECRACKER[2].1, FIRECRACKER[2].2);
    vm.answer(
        "GET /",
        200,
        r#"{"id": "web-1", "state": "Paused", "vmm_version": "1.12.0", "app_name": "Firecracker"}"#,
    );
    assert_eq!(report(&mut driver).await.memory.driver, DriverState::Silent);
}
