//! The daemon among VMs that misbehave in ways in which a real one can't be made to.

mod fakes;

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use api::status::DriverState;
use api::units::Bytes;
use balancer::daemon::{self, Config, DaemonError};
use fakes::{FakeVm, Manner};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const LIMITS: &str = "256M,min=128M,max=1G";

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(directory: &TempDir, budget: Bytes) -> Config {
    Config {
        directory: Some(directory.path().to_owned()),
        budget: Some(budget),
        interval: Duration::from_millis(100),
        ..Config::default()
    }
}

/// A daemon that runs beside the test.
struct Daemon {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), DaemonError>>,
}

impl Daemon {
    fn start(config: Config) -> Self {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(daemon::run(config, async move { drop(stopped.await) }));
        Self { stop: Some(stop), task }
    }

    async fn stop(mut self) -> Result<(), DaemonError> {
        drop(self.stop.take());
        self.task.await.unwrap()
    }

    /// As `kill -9`: no word to anyone.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "gave up waiting until {what}");
}

async fn until_async<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(waited.await.is_ok(), "gave up waiting until {what}");
}

async fn get(directory: &Path, path: &'static str) -> Option<String> {
    let stream = UnixStream::connect(daemon::socket_in(directory)).await.ok()?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.ok()?;
    tokio::spawn(connection);
    let mut request = hyper::Request::new(Empty::<hyper::body::Bytes>::new());
    *request.uri_mut() = hyper::Uri::from_static(path);
    let response = sender.send_request(request).await.ok()?;
    let body = response.into_body().collect().await.ok()?.to_bytes();
    String::from_utf8(body.to_vec()).ok()
}

async fn state(directory: &Path) -> Value {
    let text = get(directory, "/state").await.unwrap_or_default();
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

fn vm<'a>(state: &'a Value, name: &str) -> Option<&'a Value> {
    state["vms"].as_array()?.iter().find(|vm| vm["name"] == name)
}

async fn until_standing(directory: &Path, name: &str, standing: &str) {
    until_async(&format!("{name} is {standing}"), || async {
        vm(&state(directory).await, name).is_some_and(|vm| vm["standing"] == standing)
    })
    .await;
}

/// Waits until two whole rounds have begun and ended from now on.
async fn two_rounds(directory: &Path) {
    let rounds = async || state(directory).await["rounds"].as_u64().unwrap_or(0);
    // One may be under way.
    let last = rounds().await + 3;
    until_async("two rounds are over", || async { rounds().await >= last }).await;
}

fn target(vm: &FakeVm) -> Bytes {
    vm.state().memory.target
}

/// A demand in MiB counts as met within the policy's deadband.
fn enough(mebibytes: u64) -> Bytes {
    Bytes::mib(mebibytes).saturating_sub(balancer::policy::DEADBAND)
}

#[tokio::test]
async fn memory_moves_between_vms_within_the_budget() {
    let directory = tempfile::tempdir().unwrap();
    let a = FakeVm::start(directory.path(), "a", LIMITS, Bytes::mib(100));
    let b = FakeVm::start(directory.path(), "b", LIMITS, Bytes::mib(100));
    a.state().place(Bytes::mib(700), Bytes::mib(700));
    let daemon = Daemon::start(config(&directory, Bytes::gib(1)));
    b.state().used = Bytes::mib(240);
    until("b has what it needs", || target(&b) >= Bytes::mib(288)).await;
    b.state().used = Bytes::mib(400);
    until("b has more of what a does not need", || target(&b) >= enough(480)).await;
    assert!(target(&a) + target(&b) <= Bytes::gib(1));
    assert!(target(&a) < Bytes::mib(600));

    let state = state(directory.path()).await;
    assert_eq!(state["host"]["budget"], Bytes::gib(1).0);
    let b_view = vm(&state, "b").unwrap();
    assert_eq!(b_view["last_reason"]["rule"], "grow", "{b_view}");
    assert!(b_view["grows"].as_u64().unwrap() >= 1);
    let metrics = get(directory.path(), "/metrics").await.unwrap();
    assert!(metrics.contains("ballast_balancer_vm_target_bytes{vm=\"b\"}"), "{metrics}");
    assert!(metrics.contains("ballast_balancer_budget_bytes 1073741824"), "{metrics}");
    daemon.stop().await.unwrap();
    assert!(!daemon::socket_in(directory.path()).exists());
}

#[tokio::test]
async fn each_that_misbehaves_is_contained_and_the_others_are_served() {
    for manner in [
        Manner::Silent,
        Manner::Garbage,
        Manner::NotJson,
        Manner::WrongJson,
        Manner::WrongLimits,
        Manner::DiesMidAnswer,
        Manner::EndlessBody,
        Manner::EndlessHead,
        Manner::Slow(2_000),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let bad = FakeVm::start(directory.path(), "bad", LIMITS, Bytes::mib(100));
        let good = FakeVm::start(directory.path(), "good", LIMITS, Bytes::mib(100));
        bad.state().place(Bytes::mib(400), Bytes::mib(400));
        let daemon = Daemon::start(config(&directory, Bytes::mib(800)));
        until_standing(directory.path(), "bad", "following").await;
        bad.state().manner = manner;
        until_standing(directory.path(), "bad", "not-answering").await;

        good.state().used = Bytes::mib(250);
        until(&format!("the good one is served beside {manner:?}"), || target(&good) >= Bytes::mib(300))
            .await;
        good.state().used = Bytes::mib(900);
        two_rounds(directory.path()).await;
        // What the bad one may hold stays its own.
        assert!(target(&good) <= Bytes::mib(400), "{manner:?}: {}", target(&good));
        assert!(bad.state().targets.is_empty(), "{manner:?}");

        bad.state().manner = Manner::Sound;
        until_standing(directory.path(), "bad", "following").await;
        until(&format!("memory moves again after {manner:?}"), || target(&good) > Bytes::mib(400)).await;
        daemon.stop().await.unwrap();
    }
}

#[tokio::test]
async fn one_that_refuses_targets_costs_nobody_anything() {
    let directory = tempfile::tempdir().unwrap();
    let stubborn = FakeVm::start(directory.path(), "stubborn", LIMITS, Bytes::mib(250));
    stubborn.state().manner = Manner::RefusesTargets;
    let good = FakeVm::start(directory.path(), "good", LIMITS, Bytes::mib(250));
    let daemon = Daemon::start(config(&directory, Bytes::gib(2)));
    until("the good one is served", || target(&good) >= Bytes::mib(300)).await;
    until_async("the refusals are counted", || async {
        vm(&state(directory.path()).await, "stubborn").is_some_and(|vm| vm["errors"].as_u64() > Some(2))
    })
    .await;
    let state = state(directory.path()).await;
    let memory = &vm(&state, "stubborn").unwrap()["memory"];
    assert_eq!(memory["target"], Bytes::mib(256).0, "a refused target is not the target");
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn vms_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(config(&directory, Bytes::gib(2)));
    until_async("the daemon serves", || async { state(directory.path()).await != Value::Null }).await;
    let first = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(250));
    until("a VM that comes is served", || target(&first) >= Bytes::mib(300)).await;
    drop(first);
    until_async("a VM that goes is forgotten", || async {
        vm(&state(directory.path()).await, "web").is_none()
    })
    .await;
    // One of the same name is another VM: nothing of the first one's use is remembered.
    let second = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(50));
    until_standing(directory.path(), "web", "following").await;
    let view = state(directory.path()).await;
    assert_eq!(vm(&view, "web").unwrap()["memory"]["used"], Bytes::mib(50).0);
    assert!(second.state().targets.is_empty());
    // A socket that a killed process left behind is no VM, and neither are these.
    drop(std::os::unix::net::UnixListener::bind(directory.path().join("dead.sock")).unwrap());
    std::fs::write(directory.path().join("file.sock"), "").unwrap();
    drop(std::os::unix::net::UnixListener::bind(directory.path().join("Not A Name.sock")).unwrap());
    // One that comes after them is seen by a look at the directory that sees them too.
    let _last = FakeVm::start(directory.path(), "last", LIMITS, Bytes::mib(50));
    until_standing(directory.path(), "last", "following").await;
    let view = state(directory.path()).await;
    assert_eq!(view["vms"].as_array().unwrap().len(), 2, "{view}");
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn a_killed_daemon_carries_on_from_what_vms_say() {
    let directory = tempfile::tempdir().unwrap();
    let a = FakeVm::start(directory.path(), "a", LIMITS, Bytes::mib(400));
    let b = FakeVm::start(directory.path(), "b", LIMITS, Bytes::mib(100));
    a.state().place(Bytes::mib(500), Bytes::mib(500));
    for round in 0..20 {
        let daemon = Daemon::start(config(&directory, Bytes::gib(1)));
        let (needy, other) = if round % 2 == 0 { (&b, &a) } else { (&a, &b) };
        other.state().used = Bytes::mib(100);
        needy.state().used = Bytes::mib(450);
        until("the needy one is served", || target(needy) >= enough(540)).await;
        assert!(target(&a) + target(&b) <= Bytes::gib(1));
        daemon.kill().await;
    }
    // A new one leaves a settled host as it is: everyone has its buffer, and the pool is full.
    for vm in [&a, &b] {
        let mut state = vm.state();
        state.used = Bytes::mib(200);
        state.place(Bytes::mib(300), Bytes::mib(300));
    }
    let before = (a.state().targets.len(), b.state().targets.len());
    let daemon = Daemon::start(config(&directory, Bytes::gib(1)));
    until_standing(directory.path(), "a", "following").await;
    two_rounds(directory.path()).await;
    assert_eq!((a.state().targets.len(), b.state().targets.len()), before);
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn a_second_balancer_refuses_to_start() {
    let directory = tempfile::tempdir().unwrap();
    let first = Daemon::start(config(&directory, Bytes::gib(1)));
    until("the first is up", || daemon::socket_in(directory.path()).exists()).await;
    let error = daemon::run(config(&directory, Bytes::gib(1)), std::future::pending()).await.unwrap_err();
    assert!(matches!(error, DaemonError::AlreadyRunning { .. }), "{error:?}");
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    first.stop().await.unwrap();
    let third = Daemon::start(config(&directory, Bytes::gib(1)));
    until("the third is up", || daemon::socket_in(directory.path()).exists()).await;
    third.stop().await.unwrap();
}

#[tokio::test]
async fn guests_that_do_not_report_or_have_no_driver_are_held() {
    let directory = tempfile::tempdir().unwrap();
    let silent = FakeVm::start(directory.path(), "silent", LIMITS, Bytes::mib(100));
    silent.state().place(Bytes::mib(600), Bytes::mib(600));
    silent.state().report_age = Some(Duration::from_secs(100));
    let driverless = FakeVm::start(directory.path(), "driverless", "512M,min=128M,max=512M", Bytes::mib(100));
    driverless.state().memory.driver = DriverState::Absent;
    driverless.state().memory.host_rss = Some(Bytes::mib(512));
    let needy = FakeVm::start(directory.path(), "needy", LIMITS, Bytes::mib(900));
    let daemon = Daemon::start(config(&directory, Bytes::mib(1500)));
    until_standing(directory.path(), "silent", "stale").await;
    // 1500 less 600 and 512: what can't wait is served from the pool too.
    until("the needy one has what is left", || target(&needy) >= enough(388)).await;
    two_rounds(directory.path()).await;
    assert!(silent.state().targets.is_empty() && driverless.state().targets.is_empty());
    assert!(target(&needy) <= Bytes::mib(388));
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn an_overrun_budget_is_said_and_undone() {
    let directory = tempfile::tempdir().unwrap();
    let a = FakeVm::start(directory.path(), "a", LIMITS, Bytes::mib(100));
    a.state().place(Bytes::mib(900), Bytes::mib(900));
    a.state().follows = false;
    let daemon = Daemon::start(config(&directory, Bytes::mib(600)));
    until_async("it is over budget", || async {
        state(directory.path()).await["host"]["over"] == Bytes::mib(300).0
    })
    .await;
    {
        let mut a = a.state();
        a.follows = true;
        a.memory.actual = a.memory.target;
    }
    until_async("it is within again", || async {
        let state = state(directory.path()).await;
        state["host"]["over"] == 0 && state["host"]["rounds_over_budget"].as_u64() > Some(0)
    })
    .await;
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn two_hundred_vms_cost_one_request_each_a_round() {
    let directory = tempfile::tempdir().unwrap();
    let vms: Vec<_> = (0..200)
        .map(|n| FakeVm::start(directory.path(), &format!("vm-{n}"), LIMITS, Bytes::mib(150)))
        .collect();
    let daemon =
        Daemon::start(Config { interval: Duration::from_secs(1), ..config(&directory, Bytes::gib(64)) });
    until_async("all were asked in some rounds", || async {
        let state = state(directory.path()).await;
        state["rounds"].as_u64() >= Some(4) && state["vms"].as_array().is_some_and(|vms| vms.len() == 200)
    })
    .await;
    let rounds = state(directory.path()).await["rounds"].as_u64().unwrap();
    for vm in &vms {
        let state = vm.state();
        // One to introduce itself, one a round; one connection for all of them.
        assert!(state.requests <= rounds + 3, "{} requests in {rounds} rounds", state.requests);
        assert!(state.requests > 2);
        assert_eq!(state.connections, 1);
        assert!(state.targets.is_empty());
    }
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn a_target_that_somebody_else_sets_too_is_not_ordered_in_every_round() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(250));
    vm.state().set_anew = Some(Bytes::mib(256));
    let interval = Duration::from_millis(50);
    let daemon = Daemon::start(Config { interval, ..config(&directory, Bytes::gib(4)) });
    until("it is ordered to have more", || !vm.state().targets.is_empty()).await;
    let rounds = async || state(directory.path()).await["rounds"].as_u64().unwrap_or(0);
    let last = rounds().await + 40;
    until_async("there are many rounds", async || rounds().await >= last).await;
    let orders = vm.state().targets.len();
    assert!((2..=6).contains(&orders), "{orders} orders in some forty rounds");
    // Alone again, it follows.
    vm.state().set_anew = None;
    until("it has what it needs", || vm.state().memory.target >= Bytes::mib(290)).await;
    daemon.stop().await.unwrap();
}
