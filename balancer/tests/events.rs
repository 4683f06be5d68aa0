//! Guests that can't wait for the daemon's next round.

mod fakes;

use std::time::{Duration, Instant};

use api::agent::EventKind;
use api::status::OomDeflate;
use api::units::Bytes;
use balancer::daemon::client::Client;
use balancer::daemon::{self, Config};
use fakes::{FakeVm, Manner};
use tempfile::TempDir;
use tokio::task::JoinHandle;

const LIMITS: &str = "256M,min=128M,max=1G";

/// The daemon's rounds are a minute apart. What happens sooner than half of
/// that after the first was not for a round.
const INTERVAL: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(30);

/// A daemon after its first round.
async fn daemon(directory: &TempDir, budget: Bytes, vms: &[&FakeVm]) -> (JoinHandle<()>, Instant) {
    daemon_every(INTERVAL, directory, budget, vms).await
}

async fn daemon_every(
    interval: Duration,
    directory: &TempDir,
    budget: Bytes,
    vms: &[&FakeVm],
) -> (JoinHandle<()>, Instant) {
    let config = Config {
        directory: Some(directory.path().to_owned()),
        budget: Some(budget),
        interval,
        ..Config::default()
    };
    let start = Instant::now();
    let task = tokio::spawn(async move { drop(daemon::run(config, std::future::pending()).await) });
    for vm in vms {
        until(start, "the first round", || vm.state().requests >= 2).await;
    }
    (task, start)
}

/// Waits for what must happen before the second round.
async fn until(start: Instant, what: &str, mut done: impl FnMut() -> bool) {
    while !done() {
        assert!(start.elapsed() < SOON, "gave up waiting for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_guest_that_calls_is_granted_memory_between_the_rounds() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "a", LIMITS, Bytes::mib(100));
    let (_daemon, start) = daemon(&directory, Bytes::gib(2), &[&vm]).await;
    vm.state().used = Bytes::mib(250);
    until(start, "the daemon to listen", || vm.state().call()).await;
    until(start, "the grant", || vm.state().memory.target > Bytes::mib(270)).await;
}

/// Its report is of the round before, and says that it has much to spare.
#[tokio::test]
async fn a_guest_that_took_pages_back_rather_than_run_out_of_memory_is_granted_more_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "a", LIMITS, Bytes::mib(100));
    let (_daemon, start) = daemon(&directory, Bytes::gib(2), &[&vm]).await;
    {
        let mut state = vm.state();
        let target = state.memory.target;
        (state.follows, state.report_age) = (false, Some(Duration::from_millis(900)));
        state.memory.actual = target + Bytes::mib(8);
        state.memory.oom_deflate =
            Some(OomDeflate { taken: Bytes::mib(8), had: target + Bytes::mib(8), age_ms: 0 });
    }
    let has = vm.state().memory.actual;
    until(start, "the daemon to listen", || vm.state().tell(EventKind::DeflatedOnOom)).await;
    until(start, "the grant", || vm.state().memory.target > has).await;
}

#[tokio::test]
async fn others_pay_between_the_rounds_too() {
    let directory = tempfile::tempdir().unwrap();
    let poor = FakeVm::start(directory.path(), "poor", LIMITS, Bytes::mib(200));
    let rich = FakeVm::start(directory.path(), "rich", LIMITS, Bytes::mib(500));
    rich.state().place(Bytes::mib(700), Bytes::mib(700));
    let (_daemon, start) = daemon(&directory, Bytes::mib(980), &[&poor, &rich]).await;
    // Nothing says that `rich` needs less by now but the rounds between the rounds.
    rich.state().used = Bytes::mib(100);
    poor.state().used = Bytes::mib(250);
    until(start, "the daemon to listen", || poor.state().call()).await;
    until(start, "the payment", || rich.state().memory.actual < Bytes::mib(680)).await;
    until(start, "the grant", || {
        poor.state().call();
        poor.state().memory.target > Bytes::mib(270)
    })
    .await;
    let held = poor.state().memory.actual.saturating_add(rich.state().memory.actual);
    assert!(held <= Bytes::mib(980), "{held} is over the budget");
}

#[tokio::test]
async fn a_guest_is_asked_for_fresh_figures_and_only_a_round_waits_for_them() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "a", LIMITS, Bytes::mib(100));
    let (_daemon, start) = daemon(&directory, Bytes::gib(2), &[&vm]).await;
    until(start, "the round's question", || !vm.state().patience.is_empty()).await;
    assert!(vm.state().patience.iter().all(|patience| *patience == Some(100)), "{:?}", vm.state().patience);
    until(start, "the daemon to listen", || vm.state().call()).await;
    until(start, "a question between the rounds", || vm.state().patience.last() == Some(&Some(0))).await;
}

#[tokio::test]
async fn who_waits_for_memory_is_looked_at_when_another_calls() {
    let directory = tempfile::tempdir().unwrap();
    // All is given out and nobody can pay, so that it waits from the first round on and nothing moves.
    let poor = FakeVm::start(directory.path(), "poor", LIMITS, Bytes::mib(250));
    let other = FakeVm::start(directory.path(), "other", "256M,min=256M,max=1G", Bytes::mib(100));
    let (_daemon, start) = daemon(&directory, Bytes::mib(512), &[&poor, &other]).await;
    let between = |vm: &FakeVm| vm.state().patience.iter().filter(|patience| **patience == Some(0)).count();
    until(start, "the daemon to listen", || other.state().call()).await;
    until(start, "a question to who waits", || between(&poor) > 0).await;
    assert_eq!(poor.state().targets, []);
}

/// As when a guest calls without a pause, or some call in turn, and a VM that moves is slow to say so.
#[tokio::test]
async fn rounds_go_on_whoever_calls_however_often() {
    let directory = tempfile::tempdir().unwrap();
    let callers = ["a", "b", "c"].map(|name| FakeVm::start(directory.path(), name, LIMITS, Bytes::mib(100)));
    let slow = FakeVm::start(directory.path(), "slow", LIMITS, Bytes::mib(100));
    slow.state().place(Bytes::mib(300), Bytes::mib(700));
    slow.state().follows = false;
    slow.state().manner = Manner::Slow(400);
    let quiet = FakeVm::start(directory.path(), "quiet", "256M,min=256M,max=256M", Bytes::mib(100));
    let all: Vec<&FakeVm> = callers.iter().chain([&slow, &quiet]).collect();
    let (_daemon, start) = daemon_every(Duration::from_secs(1), &directory, Bytes::gib(2), &all).await;
    until(start, "the daemon to listen", || callers.iter().all(|caller| caller.state().call())).await;
    let rounds = || quiet.state().patience.iter().filter(|patience| **patience == Some(100)).count();
    let before = rounds();
    until(start, "three rounds more", || {
        callers.iter().for_each(|caller| _ = caller.state().call());
        rounds() >= before + 3
    })
    .await;
}

#[tokio::test]
async fn whoever_calls_is_looked_at_while_a_vm_that_is_always_slow_owes_its_answer() {
    let directory = tempfile::tempdir().unwrap();
    let caller = FakeVm::start(directory.path(), "caller", LIMITS, Bytes::mib(100));
    let slow = FakeVm::start(directory.path(), "slow", LIMITS, Bytes::mib(200));
    let (_daemon, start) =
        daemon_every(Duration::from_secs(1), &directory, Bytes::gib(2), &[&caller, &slow]).await;
    until(start, "the daemon to listen", || caller.state().call() && slow.state().call()).await;
    let answers = || slow.state().patience.len();
    // Within what a round would wait for it.
    slow.state().manner = Manner::Slow(400);
    let known = answers() + 3;
    until(start, "some slow answers", || answers() >= known).await;
    let looks = || caller.state().patience.iter().filter(|patience| **patience == Some(0)).count();
    // It is known to be slow after some rounds. One of its answers may come before the caller's look is
    // seen here, where this machine is busy: then the next counts.
    let (mut owed, mut before) = (None, 0);
    until(start, "a look at the caller before the slow one's answer", || {
        if owed == Some(answers()) && looks() > before {
            return true;
        }
        let owes = {
            let slow = slow.state();
            // One question was who it is, and some may have been a target.
            slow.requests > (1 + slow.patience.len() + slow.targets.len()) as u64
        };
        if owed.is_none_or(|owed| owed != answers()) && owes {
            (owed, before) = (Some(answers()), looks());
            caller.state().call();
        }
        false
    })
    .await;
    // Nor is it forgotten: its targets follow what it says.
    slow.state().used = Bytes::mib(400);
    until(start, "a grant to the slow one", || slow.state().memory.target > Bytes::mib(420)).await;
}

#[tokio::test]
async fn what_is_looked_at_between_the_rounds_is_no_round() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "a", "1G,min=1G,max=2G", Bytes::mib(100));
    let (_daemon, start) = daemon(&directory, Bytes::mib(512), &[&vm]).await;
    let looks = || vm.state().patience.iter().filter(|patience| **patience == Some(0)).count();
    until(start, "some looks", || {
        vm.state().call();
        looks() >= 5
    })
    .await;
    let state = Client::new(directory.path(), SOON).state().await.unwrap();
    assert!(state.host.over > Bytes::ZERO);
    assert_eq!((state.rounds, state.host.rounds_over_budget), (1, 1));
}

#[tokio::test]
async fn a_vm_that_tells_nonsense_or_nothing_is_balanced_by_polling() {
    let directory = tempfile::tempdir().unwrap();
    let mute = FakeVm::start(directory.path(), "mute", LIMITS, Bytes::mib(100));
    let vm = FakeVm::start(directory.path(), "a", LIMITS, Bytes::mib(100));
    mute.state().manner = Manner::Garbage;
    let (_daemon, start) = daemon(&directory, Bytes::gib(2), &[&vm]).await;
    vm.state().used = Bytes::mib(250);
    until(start, "the daemon to listen", || vm.state().call()).await;
    until(start, "the grant", || vm.state().memory.target > Bytes::mib(270)).await;
}
