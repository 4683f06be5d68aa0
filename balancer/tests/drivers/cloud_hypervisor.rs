//! Cloud Hypervisor, as it publishes its API.

use std::time::SystemTime;

use api::status::DriverState;
use api::units::Bytes;
use balancer::driver::Driver;
use balancer::driver::cloud_hypervisor::CloudHypervisor;
use serde_json::json;

use crate::recorded::Recorded;
use crate::{LIMIT, limits, place, report};

pub const CLOUD_HYPERVISOR: &[(&str, u16, &str)] = &[
    (
        "GET /api/v1/vm.info",
        200,
        r#"{"config": {"cpus": {"boot_vcpus": 1, "max_vcpus": 1},
                       "memory": {"size": 1073741824, "hotplug_method": "Acpi", "hotplug_size": null,
                                  "hotplugged_size": null, "shared": false, "zones": null},
                       "payload": {"kernel": "/boot/vmlinux"},
                       "balloon": {"size": 268435456, "deflate_on_oom": true, "free_page_reporting": true}},
            "state": "Running", "memory_actual_size": 805306368, "device_tree": {}}"#,
    ),
    ("PUT /api/v1/vm.resize", 204, ""),
];

pub fn cloud_hypervisor(vm: &Recorded) -> CloudHypervisor {
    CloudHypervisor::new(vm.socket(), limits()).with_timeout(LIMIT)
}

#[tokio::test]
async fn cloud_hypervisor_is_read_and_told() {
    let (_directory, socket) = place();
    let vm = Recorded::http(socket, CLOUD_HYPERVISOR);
    let mut driver = cloud_hypervisor(&vm);
    let status = report(&mut driver).await;
    assert_eq!(status.pid, Some(std::process::id()));
    let memory = status.memory;
    assert_eq!((memory.target, memory.actual), (Bytes::mib(768), Bytes::mib(768)));
    assert_eq!((memory.limits.max(), memory.driver), (Bytes::gib(1), DriverState::Active));
    assert_eq!(memory.report, None, "this version tells no statistics");
    driver.set_target(Bytes::mib(600)).await.unwrap();
    assert_eq!(vm.orders("PUT /api/v1/vm.resize"), [json!({"desired_balloon": Bytes::mib(424).0})]);
}

#[tokio::test]
async fn cloud_hypervisors_statistics_are_read_where_it_has_them() {
    let (_directory, socket) = place();
    let vm = Recorded::http(socket, CLOUD_HYPERVISOR);
    let statistics = "GET /api/v1/vm.balloon-stats";
    let answer = |last_update: u128, available: u64| {
        json!({"balloon_actual": 268435456, "last_update": last_update as u64,
               "stats": {"free_memory": 1, "available_memory": available, "alloc_stalls": 7}})
        .to_string()
    };
    vm.answer(statistics, 500, r#"["Error from API", "The guest offers no statistics"]"#);
    let mut driver = cloud_hypervisor(&vm);
    assert_eq!(report(&mut driver).await.memory.report, None);
    // The guest's driver has come.
    vm.answer(statistics, 200, &answer(0, 0));
    assert_eq!(report(&mut driver).await.memory.report, None);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
    vm.answer(statistics, 200, &answer(now - 20_000, Bytes::mib(500).0));
    let memory = report(&mut driver).await.memory;
    assert_eq!(memory.used(), Some(Bytes::mib(268)));
    let aged = memory.report.unwrap();
    assert!(aged.age_ms >= 20_000, "{}", aged.age_ms);
    assert_eq!(aged.statistics.allocation_stalls, Some(7));
    vm.answer(statistics, 200, &answer(now, Bytes::mib(400).0));
    assert!(report(&mut driver).await.memory.report.unwrap().age_ms < 20_000);
}

#[tokio::test]
async fn cloud_hypervisor_without_a_balloon_is_plugged() {
    let (_directory, socket) = place();
    let vm = Recorded::http(socket, CLOUD_HYPERVISOR);
    vm.answer(
        "GET /api/v1/vm.info",
        200,
        r#"{"config": {"memory": {"size": 536870912, "hotplug_method": "VirtioMem", "hotplug_size": 536870912,
                                  "hotplugged_size": 134217728}},
            "state": "Running", "memory_actual_size": 671088640}"#,
    );
    let mut driver = cloud_hypervisor(&vm);
    let memory = report(&mut driver).await.memory;
    assert_eq!(
        (memory.actual, memory.target, memory.limits.max()),
        (Bytes::mib(640), Bytes::mib(640), Bytes::gib(1))
    );
    driver.set_target(Bytes::mib(768)).await.unwrap();
    driver.set_target(Bytes::mib(100)).await.unwrap();
    let orders = [json!({"desired_ram": Bytes::mib(768).0}), json!({"desired_ram": Bytes::mib(512).0})];
    assert_eq!(vm.orders("PUT /api/v1/vm.resize"), orders);

    vm.answer(
        "GET /api/v1/vm.info",
        200,
        r#"{"config": {"memory": {"size": 536870912}}, "state": "Running"}"#,
    );
    let memory = report(&mut driver).await.memory;
    assert_eq!((memory.actual, memory.driver), (Bytes::mib(512), DriverState::Absent));
}
