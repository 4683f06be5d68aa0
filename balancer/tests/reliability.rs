//! The daemon as a process that is killed at any moment, among VMs that are killed too or misbehave.

mod fakes;
mod process;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use api::limits::Limits;
use api::status::Pauser;
use api::units::Bytes;
use balancer::daemon::client::Error;
use balancer::daemon::{ReservationRequest, VmView};
use balancer::policy::guards::Standing;
use fakes::{FakeVm, Journal, Manner};
use process::{Daemon, client, rounds, until};

/// What [`Daemon::start`] runs in a process of its own; without its word there is nothing to do.
#[test]
fn the_daemon_process() {
    process::serve();
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
async fn a_vm_that_starts_waits_for_the_daemon_that_comes_after_one_that_was_killed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    let wanted = ReservationRequest {
        name: "web".to_owned(),
        limits: LIMITS.parse().unwrap(),
        wait_ms: Some(60_000),
        process: None,
        reserved_huge_pages: false,
    };
    let none = client(&path).reserve(&wanted).await.unwrap_err();
    assert!(matches!(none, Error::NotRunning { .. }), "where none ever ran nobody waits: {none}");
    let mut first = Daemon::start(&path, Bytes::gib(2), Duration::from_millis(50));
    until("it serves", || async { rounds(&path).await > 0 }).await;
    first.kill();
    let (path, asking) = (path.clone(), path);
    let asked = tokio::spawn(async move { client(&asking).reserve(&wanted).await });
    let _second = Daemon::start(&path, Bytes::gib(2), Duration::from_millis(50));
    let reservation = asked.await.unwrap().expect("the new daemon answers");
    assert_eq!(reservation.granted, reservation.size);
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

#[tokio::test]
async fn a_hundred_vms_are_asked_in_every_round() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let start = |n| FakeVm::start(path, &format!("vm-{n}"), LIMITS, Bytes::mib(150));
    let _vms: Vec<_> = (0..100).map(start).collect();
    let _daemon = Daemon::start(path, Bytes::gib(100), Duration::from_secs(1));
    until("all are known", || async { client(path).state().await.is_ok_and(|state| state.vms.len() == 100) })
        .await;
    let first = rounds(path).await;
    until("rounds go on", || async { rounds(path).await >= first + 3 }).await;
    let state = client(path).state().await.unwrap();
    assert!(state.vms.iter().all(|vm| vm.memory.is_some() && vm.errors == 0), "{:?}", state.host);
}
