//! The API client against servers that no honest VM would be.

mod fakes;

use std::time::{Duration, Instant};

use api::client::{Client, Error};
use api::units::Bytes;
use fakes::{FakeVm, Manner};

const LIMITS: &str = "256M,min=128M,max=1G";

/// Far above what any of these needs, far below a test's patience.
const LIMIT: Duration = Duration::from_millis(500);

async fn outcome(manner: Manner) -> Error {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "vm", LIMITS, Bytes::mib(100));
    vm.state().manner = manner;
    let mut client = Client::new(vm.socket()).with_timeout(LIMIT);
    let error = client.memory().await.expect_err("a hostile answer");
    // Whatever happened, the client is good for another try.
    vm.state().manner = Manner::Sound;
    assert_eq!(client.memory().await.unwrap().actual, Bytes::mib(256));
    error
}

#[tokio::test]
async fn every_request_reaches_the_vm_and_its_questions_share_a_connection() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "vm", LIMITS, Bytes::mib(100));
    let mut client = Client::new(vm.socket());
    assert_eq!(client.status().await.unwrap().name, "vm");
    client.set_target(Bytes::mib(300)).await.unwrap();
    assert_eq!(client.memory().await.unwrap().target, Bytes::mib(300));
    let limits = "256M,min=64M,max=512M".parse().unwrap();
    client.set_limits(limits).await.unwrap();
    assert_eq!(client.memory().await.unwrap().limits, limits);
    assert_eq!(vm.state().connections, 1);
    // What must not be done twice has a connection of its own.
    client.pause().await.unwrap();
    client.resume().await.unwrap();
    client.power_button().await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(vm.state().requests, 9);
    assert_eq!(vm.state().connections, 5);
}

#[tokio::test]
async fn the_power_button_is_pressed_once_though_its_answer_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "vm", LIMITS, Bytes::mib(100));
    let mut client = Client::new(vm.socket());
    client.memory().await.unwrap();
    vm.state().manner = Manner::ActsMutely;
    let error = client.power_button().await.unwrap_err();
    assert!(matches!(error, Error::HungUp { .. }), "{error}");
    assert_eq!(vm.state().presses, 1);
}

#[tokio::test]
async fn a_connection_closed_between_requests_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "vm", LIMITS, Bytes::mib(100));
    vm.state().manner = Manner::OneAnswerAConnection;
    let mut client = Client::new(vm.socket());
    for _ in 0..5 {
        client.memory().await.unwrap();
    }
    assert_eq!(vm.state().connections, 5);
}

#[tokio::test]
async fn a_missing_vm_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let mut client = Client::new(directory.path().join("web.sock"));
    let error = client.status().await.unwrap_err();
    assert!(matches!(error, Error::NoSuchVm { .. }), "{error:?}");
    assert!(error.to_string().contains("web.sock"), "{error}");
    // A socket left behind by a process that was killed.
    drop(std::os::unix::net::UnixListener::bind(directory.path().join("dead.sock")).unwrap());
    let error = Client::new(directory.path().join("dead.sock")).status().await.unwrap_err();
    assert!(matches!(error, Error::NoSuchVm { .. }), "{error:?}");
}

#[tokio::test]
async fn nonsense_is_told_apart() {
    for manner in [
        Manner::Garbage,
        Manner::NotJson,
        Manner::WrongJson,
        Manner::WrongLimits,
        Manner::EndlessBody,
        Manner::EndlessHead,
    ] {
        let error = outcome(manner).await;
        assert!(matches!(error, Error::Nonsense { .. }), "{manner:?}: {error:?}");
    }
}

#[tokio::test]
async fn a_vm_that_dies_in_the_middle_hung_up() {
    let error = outcome(Manner::DiesMidAnswer).await;
    assert!(matches!(error, Error::HungUp { .. }), "{error:?}");
}

#[tokio::test]
async fn silence_ends_at_the_time_limit() {
    let begun = Instant::now();
    let error = outcome(Manner::Silent).await;
    assert!(matches!(error, Error::NotAnswering { .. }), "{error:?}");
    assert!(begun.elapsed() >= LIMIT);
    let error = outcome(Manner::Slow(60_000)).await;
    assert!(matches!(error, Error::NotAnswering { .. }), "{error:?}");
}

#[tokio::test]
async fn a_refusal_carries_the_vms_reason_but_not_its_escapes() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "vm", LIMITS, Bytes::mib(100));
    vm.state().manner = Manner::RefusesTargets;
    let mut client = Client::new(vm.socket());
    let error = client.set_target(Bytes::mib(300)).await.unwrap_err();
    assert!(matches!(&error, Error::Refused { status, .. } if status == "409"), "{error:?}");
    assert!(error.to_string().contains("no balloon driver"), "{error}");
    assert!(!error.to_string().contains('\x1b'), "{error:?}");
}
