//! The daemon as a process that is killed at any moment, among VMs that are killed too or misbehave.

mod fakes;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api::limits::Limits;
use api::status::Pauser;
use api::units::Bytes;
use balancer::daemon::client::Client;
use balancer::daemon::{self, Config, LastResort, ReservationRequest, VmView};
use balancer::policy::guards::Standing;
use fakes::{FakeVm, Journal, Manner};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(120);

const DIRECTORY: &str = "BALLAST_TEST_DIRECTORY";
const BUDGET: &str = "BALLAST_TEST_BUDGET";
const INTERVAL: &str = "BALLAST_TEST_INTERVAL_MS";
const PAUSES: &str = "BALLAST_TEST_PAUSES";

/// What [`Daemon::start`] runs in a process of its own.
#[test]
#[ignore = "the process that the other tests start and kill"]
fn the_daemon_process() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let (Ok(directory), Some(budget), Some(interval)) =
        (std::env::var(DIRECTORY), number(BUDGET), number(INTERVAL))
    else {
        return;
    };
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let mut config = Config {
        directory: Some(directory.into()),
        budget: Some(Bytes(budget)),
        interval: Duration::from_millis(interval),
        ..Config::default()
    };
    if let Ok(pauses) = std::env::var(PAUSES) {
        config.last_resort = if pauses == "1" { LastResort::Pause } else { LastResort::Advise };
        // An emergency that lasts is a minute, and what was done has ten seconds to work.
        config.policy.emergency_dwell = Duration::from_millis(200);
        config.policy.patience = Duration::from_millis(100);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(daemon::run(config, std::future::pending())).unwrap();
}

struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    fn start(directory: &Path, budget: Bytes, interval: Duration) -> Self {
        Self::start_with(directory, budget, interval, |_| {})
    }

    /// One that comes to its last resort soon, and pauses VMs then, or only advises to.
    fn start_hasty(directory: &Path, budget: Bytes, pauses: bool) -> Self {
        Self::start_with(directory, budget, Duration::from_millis(50), |command| {
            command.env(PAUSES, if pauses { "1" } else { "0" });
        })
    }

    fn start_with(
        directory: &Path,
        budget: Bytes,
        interval: Duration,
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let log = directory.join("log");
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "the_daemon_process", "--ignored", "--nocapture"])
            .env(DIRECTORY, directory)
            .env(BUDGET, budget.0.to_string())
            .env(INTERVAL, interval.as_millis().to_string())
            .stdout(Stdio::null())
            .stderr(file);
        change(&mut command);
        Self { child: command.spawn().unwrap(), log }
    }

    /// As `kill -9`: no word to anyone.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The processor time it has used.
    fn busy(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        // utime and stime (proc(5)), in hundredths of a second on every Linux.
        let ticks = |index: usize| fields[index].parse::<u64>().unwrap();
        Duration::from_millis((ticks(11) + ticks(12)) * 10)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn client(directory: &Path) -> Client {
    Client::new(directory, PATIENCE)
}

/// How many rounds the daemon has made; 0 while it doesn't answer.
async fn rounds(directory: &Path) -> u64 {
    client(directory).state().await.map_or(0, |state| state.rounds)
}

async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(waited.await.is_ok(), "gave up waiting until {what}");
}

/// A small generator whose every run is the same (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}

const LIMITS: &str = "256M,min=128M,max=1G";

#[tokio::test]
async fn killed_at_random_the_budget_holds_and_no_target_is_lost() {
    const VMS: u64 = 8;
    const ROUNDS: u64 = 300;
    let budget = Bytes::mib(2560);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let journal = Journal::default();
    let start_vm = |name: &str| {
        let vm = FakeVm::start(path, name, LIMITS, Bytes::mib(150));
        vm.state().pace = Some(Bytes::mib(64));
        vm.state().journal = Some(journal.clone());
        journal.0.lock().unwrap().push((name.to_owned(), Bytes::mib(256)));
        vm
    };
    let mut vms: BTreeMap<String, FakeVm> =
        (0..VMS).map(|n| format!("vm-{n}")).map(|name| (name.clone(), start_vm(&name))).collect();
    let mut dice = Dice(20_261);
    let (mut total, mut daemons, mut killed) = (0, 0, 0);
    while total < ROUNDS {
        let mut daemon = Daemon::start(path, budget, Duration::from_millis(50));
        daemons += 1;
        let last = 3 + dice.below(15);
        let mut seen = 0;
        while seen < last {
            let name = format!("vm-{}", dice.below(VMS));
            match (vms.remove(&name), dice.below(8)) {
                // Some leave their sockets behind.
                (Some(vm), 0) => {
                    vm.kill();
                    killed += 1;
                }
                (Some(vm), 1) => {
                    drop(vm);
                    killed += 1;
                }
                (Some(vm), _) => {
                    vm.state().used = Bytes::mib(64 + dice.below(900));
                    vms.insert(name, vm);
                }
                // One that starts asks for room first, as `ballast run` does.
                (None, _) => {
                    let limits: Limits = LIMITS.parse().unwrap();
                    let wanted = ReservationRequest {
                        name: name.clone(),
                        limits,
                        wait_ms: Some(100),
                        process: None,
                        reserved_huge_pages: false,
                    };
                    if client(path).reserve(&wanted).await.is_ok() {
                        let _ = fs::remove_file(path.join(format!("{name}.sock")));
                        vms.insert(name.clone(), start_vm(&name));
                    }
                }
            }
            let before = seen;
            until("rounds go on", || async { rounds(path).await > before }).await;
            seen = rounds(path).await;
        }
        total += seen;
        daemon.kill();
    }
    let most = journal.most();
    println!("{total} rounds, {daemons} daemons and {killed} VMs killed, {most} of {budget} held at most");
    assert!(most <= budget, "{most}");
    assert!(daemons >= 10 && killed >= 10 && most > budget.percent(80), "it was put to the test");

    // And from all of this a daemon finds its way back: everybody has what it wants, and what the
    // daemon believes is what the VMs say.
    for vm in vms.values() {
        vm.state().used = Bytes::mib(150);
    }
    let _daemon = Daemon::start(path, budget, Duration::from_millis(50));
    until("everybody is served again", || async {
        let Ok(state) = client(path).state().await else { return false };
        vms.iter().all(|(name, vm)| {
            let target = vm.state().memory.target;
            let view = state.vms.iter().find(|view| view.name == *name);
            let believed = view.and_then(|view| view.memory.as_ref()).map(|memory| memory.target);
            let standing = view.map(|view| view.standing);
            believed == Some(target) && standing == Some(Standing::Following) && target >= Bytes::mib(160)
        })
    })
    .await;
    assert!(journal.most() <= budget);
}

#[tokio::test]
async fn each_that_misbehaves_is_named_in_the_log_and_costs_the_others_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let start = |name: &str, manner| {
        let vm = FakeVm::start(path, name, LIMITS, Bytes::mib(150));
        vm.state().manner = manner;
        vm
    };
    let bad = [
        start("never-answers", Manner::Silent),
        start("answers-garbage", Manner::Garbage),
        start("answers-slowly", Manner::Slow(3000)),
        start("refuses", Manner::RefusesTargets),
        start("never-acts", Manner::Sound),
        start("lies", Manner::Sound),
    ];
    let [.., refuses, never_acts, lies] = &bad;
    refuses.state().used = Bytes::mib(300);
    never_acts.state().follows = false;
    never_acts.state().place(Bytes::mib(256), Bytes::mib(900));
    // It uses 100 MiB and says 1 GiB; the host holds what it touched.
    lies.state().used = Bytes::gib(1);
    lies.state().memory.host_rss = Some(Bytes::mib(100));
    let good = [start("good-a", Manner::Sound), start("good-b", Manner::Sound)];
    // 900 that one keeps, 256 for each other bad one that is heard, and 2 x 600 for the good ones.
    let daemon = Daemon::start(path, Bytes::mib(900 + 2 * 256 + 1024 + 2 * 640), Duration::from_millis(100));
    for (name, word) in [
        ("never-answers", "did not answer"),
        ("answers-garbage", "nonsense"),
        ("answers-slowly", "did not answer"),
        ("refuses", "refused"),
        ("never-acts", "does not give up"),
        ("lies", "the host holds"),
    ] {
        until(&format!("{name} is named in the log"), || async {
            daemon.log().lines().any(|line| line.contains(name) && line.contains(word))
        })
        .await;
    }
    for vm in &good {
        vm.state().used = Bytes::mib(500);
    }
    until("the good ones have what they want", || async {
        good.iter().all(|vm| vm.state().memory.target >= Bytes::mib(584))
    })
    .await;
    let state = client(path).state().await.unwrap();
    assert_eq!(state.host.over, Bytes::ZERO, "{:?}", state.host);
}

#[tokio::test]
async fn whoever_misbehaves_and_behaves_in_turn_does_not_fill_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let vm = FakeVm::start(path, "fickle", LIMITS, Bytes::mib(100));
    let daemon = Daemon::start(path, Bytes::gib(2), Duration::from_millis(50));
    let until_seen = async |what: &str, seen: fn(&VmView) -> bool| {
        until(what, || async {
            client(path).state().await.is_ok_and(|state| state.vms.first().is_some_and(seen))
        })
        .await;
    };
    for _ in 0..15 {
        vm.state().manner = Manner::Garbage;
        until_seen("it does not answer", |vm| vm.standing == Standing::NotAnswering).await;
        vm.state().manner = Manner::Sound;
        until_seen("it answers", |vm| vm.standing == Standing::Following).await;
        vm.state().report_age = Some(Duration::from_secs(100));
        until_seen("it is silent", |vm| vm.standing == Standing::Stale).await;
        vm.state().report_age = Some(Duration::from_millis(100));
        until_seen("it reports", |vm| vm.standing == Standing::Following).await;
    }
    let log = daemon.log();
    for line in ["nonsense", "answers again", "no reports", "reports and follows again"] {
        let count = log.lines().filter(|text| text.contains(line)).count();
        // At once, after a minute and after three, should this take so long.
        assert!((1..=3).contains(&count), "{count} lines with {line} in {log}");
    }
}

#[tokio::test]
async fn killed_at_random_it_forgets_nobody_that_it_paused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let start = |name: &str, weight: u64| {
        let vm = FakeVm::start(path, name, &format!("512M,min=512M,max=1G,weight={weight}"), Bytes::mib(400));
        vm.state().memory.host_rss = Some(Bytes::mib(100));
        vm
    };
    let paused_by = |vm: &FakeVm| vm.state().memory.paused_by;
    let vms = [start("light", 50), start("middle", 100), start("heavy", 200)];
    let own = start("own", 10);
    own.state().memory.paused_by = Some(Pauser::Operator);
    let mut dice = Dice(7);
    let paused = Cell::new(0);
    for _ in 0..15 {
        let mut daemon = Daemon::start_hasty(path, Bytes::mib(1024 + dice.below(1600)), true);
        let last = 2 + dice.below(30);
        until("it is time to die", || async {
            let running = vms.iter().filter(|vm| paused_by(vm).is_none()).count();
            assert!(running > 0, "the last one was paused");
            paused.set(paused.get().max(vms.len() - running));
            rounds(path).await >= last
        })
        .await;
        daemon.kill();
    }
    assert_eq!(paused.get(), 2, "all but one were paused at some time");
    // Whatever there is now: a daemon with little room that lives pauses, and says so.
    let mut daemon = Daemon::start_hasty(path, Bytes::mib(1024), true);
    for (vm, name) in vms.iter().zip(["light", "middle"]) {
        until("it is paused", || async { paused_by(vm) == Some(Pauser::Balancer) }).await;
        let line = format!("{name} is PAUSED by the balancer");
        until("it is said", || async { daemon.log().contains(&line) }).await;
    }
    daemon.kill();
    // The next one, which was not told to pause anybody, resumes them.
    let daemon = Daemon::start_hasty(path, Bytes::gib(8), false);
    until("all run", || async { vms.iter().all(|vm| paused_by(vm).is_none()) }).await;
    for name in ["light", "middle"] {
        let line = format!("{name} is no longer paused by the balancer");
        until("that is said", || async { daemon.log().contains(&line) }).await;
    }
    assert_eq!((paused_by(&own), own.state().steered), (Some(Pauser::Operator), 0));
}

/// Runs as many VMs as are asked for at a pace of one second, and prints what it costs.
async fn load(vms: usize, measured: u64) -> (Duration, f64) {
    // The fakes live in this process: two descriptors each.
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let vms: Vec<_> =
        (0..vms).map(|n| FakeVm::start(path, &format!("vm-{n}"), LIMITS, Bytes::mib(150))).collect();
    let daemon = Daemon::start(path, Bytes::gib(vms.len() as u64), Duration::from_secs(1));
    until("all are known", || async {
        let state = client(path).state().await;
        state.is_ok_and(|state| state.vms.iter().filter(|vm| vm.memory.is_some()).count() == vms.len())
    })
    .await;
    let (first, busy, began) = (rounds(path).await, daemon.busy(), Instant::now());
    until("it was measured", || async { rounds(path).await >= first + measured }).await;
    let share = (daemon.busy() - busy).as_secs_f64() / began.elapsed().as_secs_f64();
    let round = began.elapsed() / u32::try_from(rounds(path).await - first).unwrap();
    println!(
        "{} VMs: {:.1} % of a processor, {} ms from round to round",
        vms.len(),
        share * 100.0,
        round.as_millis()
    );
    let state = client(path).state().await.unwrap();
    assert!(state.vms.iter().all(|vm| vm.errors == 0), "nobody was left without a connection");
    (round, share)
}

#[tokio::test]
async fn a_hundred_vms_are_asked_in_every_round() {
    load(100, 3).await;
}

/// `cargo test --release -p balancer --test reliability -- --ignored --nocapture a_thousand_vms`
#[tokio::test]
#[ignore = "measures; run it by hand on a quiet machine"]
async fn a_thousand_vms_a_second() {
    load(1000, 20).await;
}
