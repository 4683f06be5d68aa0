//! QEMU, where the real one can't be made to say it.

use std::time::Duration;

use api::status::DriverState;
use api::units::Bytes;
use balancer::driver::qemu::Qemu;
use balancer::driver::{Driver, Error};
use serde_json::json;

use crate::firecracker::{FIRECRACKER, firecracker};
use crate::recorded::Recorded;
use crate::{LIMIT, limits, place, report};

const BALLOON: &str = "/machine/peripheral/balloon0";

pub fn qemu_answers() -> Vec<(&'static str, &'static str)> {
    vec![
        ("query-status", r#""return": {"status": "running", "singlestep": false, "running": true}"#),
        ("query-memory-size-summary", r#""return": {"base-memory": 1073741824, "plugged-memory": 0}"#),
        ("query-balloon", r#""return": {"actual": 805306368}"#),
        (
            "qom-list /machine/peripheral",
            r#""return": [{"name": "type", "type": "string"}, {"name": "net0", "type": "child<virtio-net-pci>"},
                          {"name": "balloon0", "type": "child<virtio-balloon-pci>"}]"#,
        ),
        ("qom-get /machine/peripheral/balloon0 guest-stats-polling-interval", r#""return": 10"#),
        ("qom-set /machine/peripheral/balloon0 guest-stats-polling-interval", r#""return": {}"#),
        (
            "qom-get /machine/peripheral/balloon0 guest-stats",
            r#""return": {"stats": {"stat-available-memory": 419430400, "stat-swap-in": 18446744073709551615},
                          "last-update": 1371221540}"#,
        ),
        ("balloon", r#""return": {}"#),
    ]
}

pub fn qemu(vm: &Recorded) -> Qemu {
    Qemu::new("vm", vm.socket(), limits()).with_timeout(LIMIT)
}

#[tokio::test]
async fn qemu_is_asked_for_statistics_and_for_what_it_has() {
    let (_directory, socket) = place();
    let vm = Recorded::qmp(socket, &qemu_answers());
    let mut driver = qemu(&vm);
    let memory = report(&mut driver).await.memory;
    assert_eq!((memory.target, memory.actual), (Bytes::mib(768), Bytes::mib(768)));
    assert_eq!(memory.used(), Some(Bytes::mib(368)));
    let aged = memory.report.unwrap();
    assert!(aged.age_ms > 1_000_000_000, "it is from 2013: {}", aged.age_ms);
    assert_eq!(aged.statistics.swap_in, None);
    let interval = format!("qom-set {BALLOON} guest-stats-polling-interval");
    assert_eq!(vm.orders(&interval)[0]["value"], 1);
    // Nobody knows what it was asked for before: from now on this driver does.
    assert_eq!(vm.orders("balloon"), [json!({"value": Bytes::mib(768).0})]);
    driver.set_target(Bytes::mib(500)).await.unwrap();
    assert_eq!(report(&mut driver).await.memory.target, Bytes::mib(500));
}

#[tokio::test]
async fn a_qemu_without_a_balloon_or_without_limits_is_left_alone() {
    let (_directory, socket) = place();
    let vm = Recorded::qmp(socket, &qemu_answers());
    let mut fixed = Qemu::new("vm", vm.socket(), None).with_timeout(LIMIT);
    let memory = report(&mut fixed).await.memory;
    assert!(!memory.limits.is_dynamic());
    assert!(vm.orders("balloon").is_empty());

    let api_error =
        r#""error": {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}"#;
    vm.answer("query-balloon", 0, api_error);
    vm.answer("balloon", 0, api_error);
    vm.answer("qom-list /machine/peripheral", 0, r#""return": []"#);
    vm.answer("qom-list /machine/peripheral-anon", 0, r#""return": []"#);
    let mut driver = qemu(&vm);
    let memory = report(&mut driver).await.memory;
    assert_eq!((memory.actual, memory.driver, memory.report), (Bytes::gib(1), DriverState::Absent, None));
    let error = driver.set_target(Bytes::mib(512)).await.unwrap_err();
    assert!(error.to_string().contains("No balloon device"), "{error}");
}

#[tokio::test]
async fn a_balloon_of_qemus_may_be_unplugged_and_plugged_again() {
    let (_directory, socket) = place();
    let vm = Recorded::qmp(socket, &qemu_answers());
    let mut driver = qemu(&vm);
    report(&mut driver).await;
    driver.set_target(Bytes::mib(500)).await.unwrap();

    let api_error =
        r#""error": {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}"#;
    let unknown = r#""error": {"class": "DeviceNotFound", "desc": "Device not found"}"#;
    for question in ["query-balloon", "balloon"] {
        vm.answer(question, 0, api_error);
    }
    vm.answer(&format!("qom-get {BALLOON} guest-stats"), 0, unknown);
    for place in ["/machine/peripheral", "/machine/peripheral-anon"] {
        vm.answer(&format!("qom-list {place}"), 0, r#""return": []"#);
    }
    let error = driver.report(Duration::ZERO).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    for _ in 0..2 {
        let memory = report(&mut driver).await.memory;
        assert_eq!((memory.actual, memory.driver, memory.report), (Bytes::gib(1), DriverState::Absent, None));
    }

    for (question, answer) in qemu_answers() {
        let another = |text: &str| text.replace("balloon0", "balloon1");
        vm.answer(&another(question), 0, &another(answer));
    }
    let memory = report(&mut driver).await.memory;
    assert_eq!((memory.target, memory.actual), (Bytes::mib(500), Bytes::mib(768)));
    assert!(memory.report.is_some(), "it is asked for the new one's statistics");
    assert_eq!(vm.orders("balloon").last(), Some(&json!({"value": Bytes::mib(500).0})));

    // So fast that nobody saw it go.
    for (question, answer) in qemu_answers() {
        vm.answer(question, 0, answer);
    }
    vm.answer("qom-get /machine/peripheral/balloon1 guest-stats", 0, unknown);
    assert!(driver.report(Duration::ZERO).await.is_err());
    assert!(report(&mut driver).await.memory.report.is_some());
}

#[tokio::test]
async fn a_guest_that_claims_more_than_there_is_gains_nothing() {
    let (_directory, socket) = place();
    let vm = Recorded::qmp(socket, &qemu_answers());
    for lie in ["-17591112302592", "9223372036854775807"] {
        vm.answer("query-balloon", 0, &format!("\"return\": {{\"actual\": {lie}}}"));
        assert_eq!(report(&mut qemu(&vm)).await.memory.actual, Bytes::gib(1), "{lie}");
    }
    let (_directory, socket) = place();
    let vm = Recorded::http(socket, FIRECRACKER);
    let statistics = FIRECRACKER[3].2.replace("51200", "18446744073709551615");
    vm.answer("GET /balloon/statistics", 200, &statistics);
    assert_eq!(
        report(&mut firecracker(&vm)).await.memory.actual,
        Bytes::ZERO,
        "its charge is what the host holds"
    );
}
