//! VMs that the daemon pauses when nothing is left to move, and whom it resumes.

mod fakes;
mod recorded;

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::status::Pauser;
use api::units::Bytes;
use balancer::daemon::client::Client;
use balancer::daemon::{self, Config, DaemonError, Fate, ForeignVms, LastResort, Sockets};
use balancer::driver::Kind;
use balancer::host::Sources;
use balancer::policy::Settings;
use balancer::policy::guards::Standing;
use balancer::policy::reason::Rule;
use fakes::{FakeVm, Manner};
use recorded::Recorded;
use rustix::process::{Signal, getpid, kill_process};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What all VMs may hold: enough for one of those here and a half.
const BUDGET: Bytes = Bytes::mib(768);

/// Of two VMs of 512 MiB that can't be shrunk one must be paused.
fn config(directory: &TempDir, last_resort: LastResort) -> Config {
    Config {
        directory: Some(directory.path().to_owned()),
        budget: Some(BUDGET),
        interval: Duration::from_millis(50),
        last_resort,
        // An emergency that lasts is a minute, and what was done has ten seconds to work.
        policy: Settings {
            emergency_dwell: Duration::from_millis(300),
            patience: Duration::from_millis(200),
            ..Settings::default()
        },
        // All fakes run in this process, which holds nothing of what they say.
        sources: Sources { processes: "/nowhere".into(), ..Sources::default() },
        ..Config::default()
    }
}

/// A VM that can't be shrunk, of which the host holds a part.
fn vm(directory: &TempDir, name: &str, weight: u64) -> FakeVm {
    let limits = format!("512M,min=512M,max=1G,weight={weight}");
    let vm = FakeVm::start(directory.path(), name, &limits, Bytes::mib(400));
    vm.state().memory.host_rss = Some(Bytes::mib(100));
    vm
}

struct Daemon {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), DaemonError>>,
    config: Arc<Mutex<Config>>,
}

impl Daemon {
    fn start(config: Config) -> Self {
        let (stop, stopped) = oneshot::channel();
        let next = Arc::new(Mutex::new(config.clone()));
        let read = Arc::clone(&next);
        let reread = move || Ok(read.lock().unwrap().clone());
        let task = tokio::spawn(daemon::run_with(config, reread, async move { drop(stopped.await) }));
        Self { stop: Some(stop), task, config: next }
    }

    async fn stop(mut self) {
        drop(self.stop.take());
        self.task.await.unwrap().unwrap();
    }

    /// As `kill -9`: no word to anyone.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// Takes other settings over. It hears the signal from before its first round on.
    fn reload(&self, change: impl FnOnce(&mut Config)) {
        change(&mut self.config.lock().unwrap());
        kill_process(getpid(), Signal::HUP).unwrap();
    }
}

async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "gave up waiting until {what}");
}

fn paused_by(vm: &FakeVm) -> Option<Pauser> {
    vm.state().memory.paused_by
}

async fn until_paused_by(vm: &FakeVm, by: Option<Pauser>) {
    until(&format!("it is paused by {by:?}"), || async { paused_by(vm) == by }).await;
}

fn client(directory: &TempDir) -> Client {
    Client::new(directory.path(), PATIENCE)
}

/// Until the daemon has seen all there is so often that it would have acted.
async fn many_rounds(directory: &TempDir) {
    let rounds = async || client(directory).state().await.map_or(0, |state| state.rounds);
    let first = rounds().await;
    until("it has had its time", || async { rounds().await >= first + 40 }).await;
}

/// What became of the last decision of this rule about `vm`.
async fn fate(directory: &TempDir, vm: &str, rule: Rule) -> Option<Fate> {
    let why = client(directory).why(vm).await.ok()?;
    why.decisions.iter().find(|decision| decision.reason.rule == rule).map(|decision| decision.fate)
}

async fn page(directory: &Path) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::UnixStream::connect(daemon::socket_in(directory)).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn the_lightest_is_paused_and_resumed_when_there_is_room() {
    let directory = tempfile::tempdir().unwrap();
    let (light, heavy) = (vm(&directory, "light", 50), vm(&directory, "heavy", 200));
    let daemon = Daemon::start(config(&directory, LastResort::Pause));
    until_paused_by(&light, Some(Pauser::Balancer)).await;
    until("it is seen", || async {
        let state = client(&directory).state().await.unwrap();
        let seen = state.vms.iter().find(|vm| vm.name == "light").unwrap();
        (seen.standing, seen.paused_by) == (Standing::Paused, Some(Pauser::Balancer))
            && state.host.over == Bytes::ZERO
            && page(directory.path()).await.contains("vm_paused_by_balancer{vm=\"light\"} 1\n")
    })
    .await;
    assert_eq!(fate(&directory, "light", Rule::Pause).await, Some(Fate::Taken));
    let why = client(&directory).why("light").await.unwrap();
    assert!(why.sentence.contains("paused it") && why.sentence.contains("412 MiB"), "{}", why.sentence);

    many_rounds(&directory).await;
    assert_eq!((paused_by(&light), paused_by(&heavy)), (Some(Pauser::Balancer), None));
    assert_eq!(light.state().steered, 1, "it is asked once");

    drop(heavy);
    until_paused_by(&light, None).await;
    assert_eq!(fate(&directory, "light", Rule::Resume).await, Some(Fate::Taken));
    daemon.kill().await;
}

#[tokio::test]
async fn where_it_was_not_told_to_it_advises_and_a_changed_setting_counts_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let (light, heavy) = (vm(&directory, "light", 50), vm(&directory, "heavy", 200));
    let daemon = Daemon::start(config(&directory, LastResort::Advise));
    until("it is advised", || async { fate(&directory, "light", Rule::Pause).await == Some(Fate::Advised) })
        .await;
    many_rounds(&directory).await;
    assert_eq!((light.state().steered, heavy.state().steered), (0, 0));

    daemon.reload(|config| config.last_resort = LastResort::Pause);
    until_paused_by(&light, Some(Pauser::Balancer)).await;
    // Set back: whom it paused it resumes all the same.
    daemon.reload(|config| config.last_resort = LastResort::Advise);
    many_rounds(&directory).await;
    assert_eq!(paused_by(&light), Some(Pauser::Balancer), "there is no room yet");
    daemon.reload(|config| config.budget = Some(Bytes::gib(4)));
    until_paused_by(&light, None).await;
    daemon.kill().await;
}

#[tokio::test]
async fn an_operators_pause_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (light, heavy) = (vm(&directory, "light", 50), vm(&directory, "heavy", 200));
    let own = vm(&directory, "own", 300);
    own.state().memory.paused_by = Some(Pauser::Operator);
    let budget = Some(Bytes::mib(512 + 768));
    let daemon = Daemon::start(Config { budget, ..config(&directory, LastResort::Pause) });
    until_paused_by(&light, Some(Pauser::Balancer)).await;
    // An operator takes it over.
    light.state().memory.paused_by = Some(Pauser::Operator);
    let asked = light.state().steered;
    drop(heavy);
    many_rounds(&directory).await;
    daemon.reload(|config| config.budget = Some(Bytes::gib(8)));
    many_rounds(&directory).await;
    assert_eq!((paused_by(&light), paused_by(&own)), (Some(Pauser::Operator), Some(Pauser::Operator)));
    assert_eq!((light.state().steered, own.state().steered), (asked, 0), "it is not even tried");
    daemon.kill().await;
}

#[tokio::test]
async fn a_daemon_that_was_killed_before_it_heard_of_a_pause_leaves_it_to_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let (light, heavy) = (vm(&directory, "light", 50), vm(&directory, "heavy", 200));
    light.state().manner = Manner::ActsMutely;
    let daemon = Daemon::start(config(&directory, LastResort::Pause));
    until_paused_by(&light, Some(Pauser::Balancer)).await;
    daemon.kill().await;
    light.state().manner = Manner::Sound;
    drop(heavy);
    let daemon = Daemon::start(config(&directory, LastResort::Advise));
    until_paused_by(&light, None).await;
    daemon.kill().await;
}

#[tokio::test]
async fn a_daemon_that_ends_leaves_them_paused() {
    let directory = tempfile::tempdir().unwrap();
    let (light, heavy) = (vm(&directory, "light", 50), vm(&directory, "heavy", 200));
    let daemon = Daemon::start(config(&directory, LastResort::Pause));
    until_paused_by(&light, Some(Pauser::Balancer)).await;
    daemon.stop().await;
    assert_eq!(paused_by(&light), Some(Pauser::Balancer), "there is no room for it");
    let daemon = Daemon::start(config(&directory, LastResort::Pause));
    many_rounds(&directory).await;
    assert_eq!((paused_by(&light), paused_by(&heavy)), (Some(Pauser::Balancer), None));
    drop(heavy);
    until_paused_by(&light, None).await;
    daemon.stop().await;
}

#[tokio::test]
async fn where_the_lightest_refuses_the_next_one_is_paused() {
    let directory = tempfile::tempdir().unwrap();
    let (light, middle) = (vm(&directory, "light", 50), vm(&directory, "middle", 100));
    let heavy = vm(&directory, "heavy", 200);
    light.state().manner = Manner::RefusesPauses;
    let budget = Some(Bytes::mib(512 + 768));
    let daemon = Daemon::start(Config { budget, ..config(&directory, LastResort::Pause) });
    until_paused_by(&middle, Some(Pauser::Balancer)).await;
    assert_eq!(fate(&directory, "light", Rule::Pause).await, Some(Fate::Refused));
    many_rounds(&directory).await;
    assert_eq!((paused_by(&light), light.state().steered, paused_by(&heavy)), (None, 1, None));
    daemon.kill().await;
}

#[tokio::test]
async fn one_that_dies_while_paused_is_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let (light, heavy) = (vm(&directory, "light", 50), vm(&directory, "heavy", 200));
    let daemon = Daemon::start(config(&directory, LastResort::Pause));
    until_paused_by(&light, Some(Pauser::Balancer)).await;
    drop(light);
    until("it is gone", || async { client(&directory).state().await.unwrap().vms.len() == 1 }).await;
    // One of its name that can do with little has nothing to do with it.
    let again = FakeVm::start(directory.path(), "light", "128M,min=128M,max=256M", Bytes::mib(50));
    until("the new one is seen", || async {
        let state = client(&directory).state().await.unwrap();
        state.vms.iter().any(|vm| vm.name == "light" && vm.standing == Standing::Following)
    })
    .await;
    many_rounds(&directory).await;
    assert_eq!((again.state().steered, heavy.state().steered), (0, 0));
    daemon.kill().await;
}

#[tokio::test]
async fn vms_of_other_vmms_are_only_advised_on() {
    let directory = tempfile::tempdir().unwrap();
    let vms: Vec<_> = ["a", "b"]
        .map(|name| {
            let info = r#"{"config": {"memory": {"size": 536870912}}, "state": "Running"}"#;
            let socket = directory.path().join(format!("{name}.api"));
            Recorded::http(socket, &[("GET /api/v1/vm.info", 200, info)])
        })
        .into();
    let sockets = Sockets::new(&format!("{}/*.api", directory.path().display())).unwrap();
    let foreign = ForeignVms { driver: Kind::CloudHypervisor, sockets, memory: None };
    // Their process is this one, of which the kernel says that it holds little of what they have.
    let sources = Sources::default();
    let config = Config { vms: vec![foreign], sources, ..config(&directory, LastResort::Pause) };
    let daemon = Daemon::start(config);
    until("it is advised", || async {
        let decisions = client(&directory).decisions().await.map_or(vec![], |answer| answer.decisions);
        decisions.iter().any(|decision| decision.reason.rule == Rule::Pause && decision.fate == Fate::Advised)
    })
    .await;
    let why = client(&directory).state().await.unwrap();
    assert!(why.vms.iter().all(|vm| vm.paused_by.is_none() && vm.errors == 0), "nobody was asked to pause");
    assert_eq!(vms.len(), 2);
    daemon.kill().await;
}
