//! Guests whose kernels do not manage all that they were given.

use api::agent::AgentFigures;
use api::report::Report;
use api::status::{AgedReport, MemoryStatus};

use super::*;

/// A VM that was given so many MiB, of which its kernel had so many when it last reported and could spare some.
fn status(limits: &str, given: u64, actual: u64, had: u64, managed: u64, spare: u64) -> MemoryStatus {
    let limits: Limits = limits.parse().unwrap();
    MemoryStatus {
        actual: Bytes::mib(actual),
        most: Some(limits.max().saturating_sub(Bytes::mib(given - actual))),
        followed: Some(true),
        host_rss: Some(Bytes::mib(100)),
        driver: DriverState::Active,
        report: Some(AgedReport {
            age_ms: 10,
            had: Some(Bytes::mib(had)),
            managed: Some(Bytes::mib(managed)),
            statistics: Report { available: Some(Bytes::mib(spare)), ..Report::default() },
        }),
        ..MemoryStatus::before_the_start(limits, Bytes::mib(given))
    }
}

/// A guest that says so.
fn guest(status: &MemoryStatus) -> Guest {
    let observed = Observation::from(status);
    Guest { vm: Vm::new(1, Duration::from_secs(1000), observed), ..Guest::new(1, WIDE, Bytes::ZERO) }
}

#[test]
fn a_guest_is_not_grown_for_what_it_does_not_manage() {
    // mem=256M of 512, and a neighbour that wants more than there is.
    let limited = status("256M,min=96M,max=512M", 512, 268, 268, 219, 170);
    let mut world = World::new(
        Bytes::mib(900),
        vec![guest(&limited), Guest::new(2, "256M,min=96M,max=1G", Bytes::mib(900))],
    );
    for _ in 0..200 {
        world.now += Duration::from_secs(1);
        world.guests[1].live();
        // It follows, and goes on using 98 MiB.
        let observed = &mut world.guests[0].vm.observed;
        observed.actual = observed.target;
        let (had, spare) = (observed.actual, observed.actual.saturating_sub(Bytes::mib(98)));
        observed.guest = Some(GuestMemory { had: Some(had), spare, ..GuestMemory::default() });
        world.round();
        assert!(world.target(0) <= Bytes::mib(268), "{}", world.target(0));
    }
    assert_eq!(world.guests[0].vm.used(), Some(Bytes::mib(98)));
    assert!(world.target(0) < Bytes::mib(150), "{}", world.target(0));
    assert!(world.target(1) > Bytes::mib(700), "its neighbour has the rest: {}", world.target(1));
}

#[test]
fn who_touches_what_it_says_not_to_have_is_charged_all_of_it() {
    let limited = status("1G,min=256M,max=4G", 4096, 1024, 1024, 950, 500);
    let mut world = World::new(Bytes::gib(8), vec![guest(&limited)]);
    let mut charge = |held: u64| {
        world.guests[0].vm.observed.host_rss = Some(Bytes::mib(held));
        world.now += Duration::from_secs(1);
        world.round();
        let observed = &world.guests[0].vm.observed;
        (world.guests[0].vm.charge(), observed.target.max(observed.actual))
    };
    let (charged, has) = charge(1000);
    assert_eq!(charged, has, "believed");
    let (charged, _) = charge(1100);
    assert_eq!(charged, Bytes::mib(1100), "what it holds: a crash kernel was loaded");
    let unmanaged = Bytes::gib(3);
    for held in [1300, 1000] {
        let (charged, has) = charge(held);
        assert_eq!(charged, has + unmanaged, "it lied once");
    }
    // What it is charged for is kept from all others.
    assert_eq!(world.balance.free, Bytes::gib(8) - world.balance.charged);
}

#[test]
fn a_report_and_what_was_had_are_of_one_moment() {
    // It reported when it had 400 MiB, and has been given all back since: its driver is gone.
    let mut unbound = status("256M,min=96M,max=512M", 512, 512, 400, 360, 300);
    assert_eq!(unbound.used(), Some(Bytes::mib(100)));
    let guest = guest(&unbound);
    let mut world = World::new(Bytes::gib(1), vec![guest]);
    world.round();
    assert_eq!(world.guests[0].vm.used(), Some(Bytes::mib(100)));
    // An agent's newer word goes with what was had then, and one that is gone says nothing.
    let figures = AgentFigures { available: Some(Bytes::mib(200)), ..AgentFigures::default() };
    let mut agent = api::agent::AgentStatus {
        connected: true,
        version: None,
        age_ms: 1,
        distress_age_ms: None,
        figures,
        had: Some(Bytes::mib(420)),
        managed: None,
        heard: 1,
        dropped: 0,
        malformed: 0,
    };
    unbound.agent = Some(agent);
    assert_eq!(unbound.used(), Some(Bytes::mib(220)));
    agent.connected = false;
    unbound.agent = Some(agent);
    assert_eq!(unbound.used(), Some(Bytes::mib(100)));
}

#[test]
fn use_is_shown_up_to_what_the_kernel_manages() {
    let full = status("256M,max=512M", 256, 256, 256, 219, 3);
    assert_eq!(full.used(), Some(Bytes::mib(219)));
    // A guest that is full lacks what its kernel has, too: the policy does not count that away.
    let mut world = World::new(Bytes::gib(1), vec![guest(&full)]);
    world.round();
    assert_eq!(world.guests[0].vm.used(), Some(Bytes::mib(253)));
}

#[test]
fn what_a_kernel_has_for_itself_is_asked_of_no_guest() {
    // max=16G costs 354 MiB before the guest runs.
    let large = status("512M,min=128M,max=16G", 512, 512, 512, 158, 100);
    let observed = Observation::from(&large);
    assert_eq!(observed.limits.min(), Bytes::mib(354 + 16));
    // It would be shrunk below that in an emergency that lasts.
    let mut world = World::new(Bytes::mib(512), vec![guest(&large), Guest::new(2, WIDE, Bytes::gib(1))]);
    for _ in 0..200 {
        world.now += Duration::from_secs(1);
        world.guests[1].live();
        world.round();
        assert!(world.target(0) >= Bytes::mib(370), "{}", world.target(0));
    }
    // A share that nobody knows is none to reckon with.
    let unknown = MemoryStatus { report: None, ..large };
    assert_eq!(Observation::from(&unknown).limits.min(), Bytes::mib(128));
}
