//! Drivers for other VMMs: against what those publish of their APIs, and against what none should say.
//! QEMU itself is tested with the real program, in the package `tests`.

mod recorded;

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use api::limits::Wanted;
use api::status::DriverState;
use api::units::Bytes;
use balancer::driver::cloud_hypervisor::CloudHypervisor;
use balancer::driver::firecracker::Firecracker;
use balancer::driver::qemu::Qemu;
use balancer::driver::{Driver, Error, Status};
use recorded::Recorded;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Far above what any exchange here needs, far below a test's patience.
const LIMIT: Duration = Duration::from_millis(500);

fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vm.socket");
    (directory, socket)
}

fn limits() -> Option<Wanted> {
    Some("512M,min=256M".parse().unwrap())
}

async fn report(driver: &mut impl Driver) -> Status {
    *driver.report(Duration::ZERO).await.unwrap()
}

// Firecracker.

const FIRECRACKER: &[(&str, u16, &str)] = &[
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

fn firecracker(vm: &Recorded) -> Firecracker {
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

// Cloud Hypervisor.

const CLOUD_HYPERVISOR: &[(&str, u16, &str)] = &[
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

fn cloud_hypervisor(vm: &Recorded) -> CloudHypervisor {
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

// QEMU, where the real one can't be made to say it.

const BALLOON: &str = "/machine/peripheral/balloon0";

fn qemu_answers() -> Vec<(&'static str, &'static str)> {
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

fn qemu(vm: &Recorded) -> Qemu {
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

// Nonsense.

/// Bodies that are JSON and not what they should be.
fn wrong_bodies() -> Vec<String> {
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    [
        "null",
        "[]",
        "{}",
        "\"\"",
        "{\"state\": 5}",
        "{\"actual\": \"all\"}",
        "{\"mem_size_mib\": -1}",
        "{\"mem_size_mib\": 1.5}",
        "{\"running\": \"yes\"}",
        "not json",
        "\u{0}",
        &deep,
    ]
    .map(str::to_owned)
    .to_vec()
}

#[tokio::test]
async fn a_wrong_answer_to_any_question_is_named_and_the_next_one_counts() {
    for (request, ..) in FIRECRACKER.iter().filter(|(request, ..)| request.starts_with("GET")) {
        let (_directory, socket) = place();
        let vm = Recorded::http(socket, FIRECRACKER);
        let mut driver = firecracker(&vm);
        for body in wrong_bodies() {
            let (status, right) = vm.script().answers[*request].clone();
            vm.answer(request, 200, &body);
            let error = driver.report(Duration::ZERO).await.unwrap_err();
            assert!(matches!(error, Error::Nonsense { .. }), "{request} {body:.40}: {error:?}");
            vm.answer(request, status, &right);
            report(&mut driver).await;
        }
    }
    let (_directory, socket) = place();
    let vm = Recorded::http(socket, CLOUD_HYPERVISOR);
    let mut driver = cloud_hypervisor(&vm);
    for body in wrong_bodies() {
        vm.answer("GET /api/v1/vm.info", 200, &body);
        let error = driver.report(Duration::ZERO).await.unwrap_err();
        assert!(matches!(error, Error::Nonsense { .. }), "{body:.40}: {error:?}");
    }
}

#[tokio::test]
async fn a_wrong_line_of_qemus_is_named_and_the_next_connection_counts() {
    let questions: Vec<_> = qemu_answers().into_iter().map(|(command, _)| command).collect();
    for command in
        questions.iter().filter(|command| **command != "balloon" && !command.starts_with("qom-set"))
    {
        let (_directory, socket) = place();
        let vm = Recorded::qmp(socket, &qemu_answers());
        for body in wrong_bodies() {
            let (_, right) = vm.script().answers[*command].clone();
            vm.answer(command, 0, &format!("\"return\": {body}"));
            // What is asked once for each connection is asked on a new one.
            let mut driver = qemu(&vm);
            let outcome = driver.report(Duration::ZERO).await;
            // An empty list of devices is an answer, too.
            if !(command.starts_with("qom-list") && body == "[]") {
                let error = outcome.unwrap_err();
                assert!(matches!(error, Error::Nonsense { .. }), "{command} {body:.40}: {error:?}");
            }
            vm.answer(command, 0, &right);
            report(&mut driver).await;
        }
    }
}

#[tokio::test]
async fn bytes_that_are_no_protocol_are_bounded_in_time_and_size() {
    let flood = |piece: &str, size: usize| piece.repeat(size / piece.len() + 1).into_bytes();
    let event =
        "{\"event\": \"RTC_CHANGE\", \"data\": {}, \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\r\n";
    for bytes in [
        b"\x00\xff\xfe\r\n\r\n".to_vec(),
        b"(qemu) unknown command\r\n".to_vec(),
        flood("x", 1 << 20),
        flood("{", 1 << 20),
        flood(event, 1 << 20),
        flood("{\"return\": {}, \"id\": 123456}\r\n", 1 << 20),
    ] {
        let (directory, socket) = place();
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(30)]).into_owned();
        let vm = Recorded::qmp(socket, &qemu_answers());
        vm.script().bytes = Some(bytes.clone());
        let error = qemu(&vm).report(Duration::ZERO).await.unwrap_err();
        assert!(matches!(error, Error::Nonsense { .. }), "{shown:?}: {error:?}");
        vm.script().bytes = None;
        report(&mut qemu(&vm)).await;

        let vm = Recorded::http(directory.path().join("http"), FIRECRACKER);
        vm.script().bytes = Some(bytes);
        let error = firecracker(&vm).report(Duration::ZERO).await.unwrap_err();
        assert!(matches!(error, Error::Nonsense { .. } | Error::HungUp { .. }), "{shown:?}: {error:?}");
        vm.script().bytes = None;
        report(&mut firecracker(&vm)).await;
    }
}

#[tokio::test]
async fn slow_ones_are_given_up_on() {
    let (directory, socket) = place();
    let qmp = Recorded::qmp(socket, &qemu_answers());
    let http = Recorded::http(directory.path().join("http"), FIRECRACKER);
    for vm in [&qmp, &http] {
        vm.script().delay = Duration::from_secs(60);
    }
    let begun = Instant::now();
    for error in [
        qemu(&qmp).report(Duration::ZERO).await.unwrap_err(),
        firecracker(&http).report(Duration::ZERO).await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::NotAnswering { .. }), "{error:?}");
    }
    assert!(begun.elapsed() >= LIMIT * 2);
}

#[tokio::test]
async fn a_socket_without_a_process_is_no_vm() {
    let (_directory, socket) = place();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    for error in [
        Qemu::new("vm", &socket, None).report(Duration::ZERO).await.unwrap_err(),
        Firecracker::new(&socket, None).report(Duration::ZERO).await.unwrap_err(),
        CloudHypervisor::new(&socket, None).report(Duration::ZERO).await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::NoSuchVm { .. }), "{error:?}");
        assert!(!error.to_string().contains("ballast ps"), "{error}");
    }
}

// All of them under one daemon.

#[tokio::test]
async fn one_daemon_looks_after_vms_of_every_kind() {
    use balancer::daemon::{self, Config};

    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| elsewhere.path().join(name);
    let needy = Recorded::http(path("needy.fc"), FIRECRACKER);
    // It uses 724 MiB of the 824 that it has.
    let tight = FIRECRACKER[3].2.replace("419430400", "104857600").replace("314572800", "104857600");
    needy.answer("GET /balloon/statistics", 200, &tight);
    let _mute = Recorded::http(path("mute.ch"), CLOUD_HYPERVISOR);
    let _clash = Recorded::qmp(path("needy.qmp"), &qemu_answers());
    let file = directory.path().join("balancer.toml");
    let dir = elsewhere.path().display();
    let text = format!(
        "budget = \"4G\"\ninterval = \"100ms\"\n\
         [[vms]]\ndriver = \"firecracker\"\nsockets = \"{dir}/*.fc\"\nmemory = \"512M,min=256M\"\n\
         [[vms]]\ndriver = \"cloud-hypervisor\"\nsockets = \"{dir}/*.ch\"\nmemory = \"512M,min=256M\"\n\
         [[vms]]\ndriver = \"qemu\"\nsockets = \"{dir}/*.qmp\"\n"
    );
    std::fs::write(&file, text).unwrap();
    let config = Config { directory: Some(directory.path().to_owned()), ..Config::read(&file).unwrap() };
    let daemon = tokio::spawn(daemon::run(config, std::future::pending()));
    let mut client = daemon::client::Client::new(directory.path(), Duration::from_secs(10));
    let state = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let Ok(state) = client.state().await else { continue };
            if state.vms.len() == 2 && !needy.orders("PATCH /balloon").is_empty() && state.rounds > 10 {
                return serde_json::to_value(state).unwrap();
            }
        }
    });
    let state: Value = state.await.expect("the needy one is given memory");
    daemon.abort();
    let granted = needy.orders("PATCH /balloon")[0]["amount_mib"].as_u64().unwrap();
    assert!(granted < 256, "its balloon is made smaller: {granted}");
    // The one whose name was taken is not there; the one that can't report is held and charged.
    let names: Vec<_> = state["vms"].as_array().unwrap().iter().map(|vm| vm["name"].clone()).collect();
    assert_eq!(names, ["mute", "needy"]);
    let mute = &state["vms"][0];
    assert_eq!((&mute["vmm"], &mute["standing"]), (&json!("cloud-hypervisor"), &json!("stale")));
    assert!(mute["memory"]["charge"].as_u64().unwrap() >= Bytes::mib(768).0, "{mute}");
}

#[tokio::test]
async fn two_sockets_of_one_process_are_one_vm() {
    use balancer::daemon::{self, Config};

    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let _sockets = ["web.qmp", "web-operator.qmp"]
        .map(|name| Recorded::qmp(elsewhere.path().join(name), &qemu_answers()));
    let file = directory.path().join("balancer.toml");
    let sockets = elsewhere.path().join("*.qmp");
    let text = format!(
        "budget = \"8G\"\ninterval = \"50ms\"\n[[vms]]\ndriver = \"qemu\"\nsockets = \"{}\"\n",
        sockets.display()
    );
    std::fs::write(&file, text).unwrap();
    let config = Config { directory: Some(directory.path().to_owned()), ..Config::read(&file).unwrap() };
    let daemon = tokio::spawn(daemon::run(config, std::future::pending()));
    let mut client = daemon::client::Client::new(directory.path(), Duration::from_secs(10));
    let state = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            match client.state().await {
                Ok(state) if state.vms.iter().any(|vm| vm.memory.is_some()) && state.rounds > 5 => {
                    return state;
                }
                _ => {}
            }
        }
    });
    let state = state.await.expect("the VM is known");
    daemon.abort();
    let [vm] = state.vms.as_slice() else { panic!("{:?}", state.vms) };
    assert_eq!(state.host.charged, vm.memory.as_ref().unwrap().charge);
}
