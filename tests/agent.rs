//! The guest's agent: heard by the VM, and answered by the daemon long before its next round.

use std::time::{Duration, Instant};

use api::agent::Version;
use api::units::Bytes;
use guests::{Daemon, Host, Printed, Vm, VmSettings, images};
use lab::Kernel;

/// The daemon's rounds are this far apart. What a guest gets sooner, it did not get by a round.
const INTERVAL: Duration = Duration::from_secs(60);
/// How long a guest takes to be granted memory when it calls.
const GRANT: Duration = Duration::from_secs(5);

const LIMITS: &str = "208M,min=160M,max=512M";

/// A guest that runs short is granted memory long before the daemon would have looked by itself.
fn is_granted_memory(vm: &mut Vm) {
    vm.wait_for_memory("the first inflation", GRANT * 2, |memory| memory.actual <= Bytes::mib(210));
    let interval = format!("{}s", INTERVAL.as_secs());
    let daemon = Daemon::with(Printed::Yes, &["--interval", &interval, "--budget", "1G"]);
    daemon.wait_for_rounds(1, 1, GRANT);
    let before = vm.memory();
    let start = Instant::now();
    vm.type_in("spike:260M:6s\n");
    // The target, not what the guest has: when all is gone its driver helps itself to the balloon's pages.
    let granted =
        vm.wait_for_memory("the grant", GRANT, |memory| memory.target > before.target + Bytes::mib(16));
    assert!(start.elapsed() < INTERVAL / 2, "that may have been a round");
    println!(
        "had {}, was granted {} {:?} after the spike began",
        before.target,
        granted.target,
        start.elapsed()
    );
    vm.wait_for_line("DONE spike", GRANT * 6);
}

/// It ends by itself, and nothing in it was killed.
fn ends_well(mut vm: Vm) {
    vm.type_in("end\n");
    vm.wait_for_line("SUMMARY oom_kills=0", GRANT);
    assert_eq!(vm.wait_for_end(GRANT), 0);
}

fn calls_and_is_answered(kernel: Kernel) {
    let images = images(kernel);
    // The balloon's driver reports once and then for an hour not again: only the agent can tell.
    let settings = VmSettings::new("a", &images, LIMITS, "ballast.console").agent(&images);
    let mut vm = settings.with(&["--statistics-interval", "1h"]).start();
    vm.wait_until_ready();
    let memory = vm.wait_for_memory("the agent's first word", GRANT, |memory| memory.agent.is_some());
    let agent = memory.agent.expect("it was waited for");
    assert_eq!((agent.version, agent.connected, agent.malformed), (Some(Version::OWN), true, 0));
    assert!(agent.figures.committed > Some(Bytes::ZERO), "{agent:?}");
    assert!(agent.figures.stall_us.is_some(), "the guest's kernel tells its pressure: {agent:?}");
    assert_eq!(agent.distress_age_ms, None);
    is_granted_memory(&mut vm);
    assert!(vm.memory().agent.is_some_and(|agent| agent.distress_age_ms.is_some()), "nobody else could tell");
    ends_well(vm);
}

#[test]
fn a_guest_of_6_1_calls_and_is_answered_between_the_rounds() {
    Host::new()
        .guest(Kernel::V6_1)
        .usually(Duration::from_secs(90))
        .run(|| calls_and_is_answered(Kernel::V6_1));
}

#[test]
fn a_guest_of_6_12_calls_and_is_answered_between_the_rounds() {
    Host::new()
        .guest(Kernel::V6_12)
        .usually(Duration::from_secs(90))
        .run(|| calls_and_is_answered(Kernel::V6_12));
}

#[test]
fn a_guest_without_an_agent_is_found_by_its_reports_between_the_rounds() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(90)).run(|| {
        let images = images(Kernel::V6_1);
        let mut vm = VmSettings::new("a", &images, LIMITS, "ballast.console").start();
        vm.wait_until_ready();
        is_granted_memory(&mut vm);
        assert_eq!(vm.memory().agent, None);
        ends_well(vm);
    });
}

#[test]
fn the_agent_is_small() {
    let path = if lab::inside() { return } else { lab::agent().expect("it builds") };
    let size = std::fs::metadata(&path).expect("it was built").len();
    assert!(Bytes(size) < Bytes::mib(1), "{} has {size} bytes", path.display());
}
