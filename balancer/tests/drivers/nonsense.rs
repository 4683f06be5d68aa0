//! Answers that none should give, come too late, or not at all.

use std::time::{Duration, Instant};

use balancer::driver::cloud_hypervisor::CloudHypervisor;
use balancer::driver::firecracker::Firecracker;
use balancer::driver::qemu::Qemu;
use balancer::driver::{Driver, Error};

use crate::cloud_hypervisor::{CLOUD_HYPERVISOR, cloud_hypervisor};
use crate::firecracker::{FIRECRACKER, firecracker};
use crate::qemu::{qemu, qemu_answers};
use crate::recorded::Recorded;
use crate::{LIMIT, place, report};

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
