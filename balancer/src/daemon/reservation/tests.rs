use super::*;
use proptest::prelude::*;

use crate::host::{Budget, HostMemory};
use crate::policy::host_state::HostState;
use crate::policy::{HostObservation, Policy, Settings};

/// What a guest says that could spare so much a moment ago.
fn spares(spare: Bytes) -> GuestMemory {
    GuestMemory { spare, ..GuestMemory::default() }
}

fn request(name: &str, limits: &str) -> ReservationRequest {
    ReservationRequest {
        name: name.to_owned(),
        limits: limits.parse().unwrap(),
        wait_ms: Some(5000),
        process: None,
        reserved_huge_pages: false,
    }
}

fn taken(budget: u64, by_vms: u64) -> Taken {
    Taken { budget: Bytes::mib(budget), by_vms: Bytes::mib(by_vms) }
}

type Answered = oneshot::Receiver<Result<ReservationView, ApiError>>;

fn ask(reservations: &mut Reservations, request: &ReservationRequest, taken: Taken) -> Answered {
    let (answer, answered) = oneshot::channel();
    reservations.admit(7, Duration::from_secs(100), request, taken, answer);
    answered
}

#[test]
fn what_a_vm_needs_is_more_than_its_guest() {
    assert_eq!(request("web", "256M,max=1G").size(), Bytes::mib(256 + 8 + 2));
}

#[test]
fn a_vm_that_can_never_fit_is_refused_with_the_numbers() {
    let mut reservations = Reservations::default();
    let mut answered = ask(&mut reservations, &request("web", "512M"), taken(1000, 600));
    let api_error = answered.try_recv().unwrap().unwrap_err().to_string();
    for number in ["web", "521 MiB", "600 MiB", "1000 MiB", "391 MiB"] {
        assert!(api_error.contains(number), "{number}: {api_error}");
    }
    assert!(reservations.is_empty());
    // Another's reservation counts too.
    let mut first = ask(&mut reservations, &request("a", "512M"), taken(1000, 0));
    assert!(first.try_recv().is_err(), "it waits");
    let mut second = ask(&mut reservations, &request("b", "512M"), taken(1000, 0));
    assert!(matches!(second.try_recv().unwrap(), Err(ApiError::NoRoom { .. })));
    for huge in ["16777215T", "64M,max=16777215T"] {
        let mut answered = ask(&mut reservations, &request("huge", huge), taken(1000, 0));
        assert!(matches!(answered.try_recv().unwrap(), Err(ApiError::NoRoom { .. })), "{huge}");
    }
}

/// One round with a guest of 700 MiB that uses 200.
fn round(policy: &mut Policy, reservations: &mut Reservations, now: Duration, other: &mut Vm) -> Bytes {
    let mut vms = vec![other.clone()];
    reservations.lend(&mut vms);
    let mut decisions = Vec::new();
    let balance = policy.decide(now, HostObservation::of(Bytes::gib(1)), &mut vms, &mut decisions);
    for vm in &vms {
        if !reservations.settle(vm) {
            *other = vm.clone();
        }
    }
    for decision in &decisions {
        if !reservations.grant(now, decision) {
            other.observed.target = decision.reason.new;
        }
    }
    balance.over
}

#[test]
fn room_is_made_by_others_and_never_more_is_given_than_there_is() {
    let limits: Limits = "700M,min=128M,max=900M".parse().unwrap();
    let mut other = Vm::new(
        1,
        Duration::from_secs(1000),
        Observation {
            driver: DriverState::Active,
            guest: Some(spares(Bytes::mib(500))),
            ..Observation::of(limits)
        },
    );
    let (mut policy, mut reservations) = (Policy::new(Settings::default()), Reservations::default());
    let mut now = Duration::from_secs(100);
    round(&mut policy, &mut reservations, now, &mut other);
    let mut answered = ask(&mut reservations, &request("web", "600M"), taken(1024, 128));
    let mut granted = Vec::new();
    for _ in 0..20 {
        now += Duration::from_secs(1);
        reservations.expire(now.min(Duration::from_secs(104)), |_| false);
        assert_eq!(round(&mut policy, &mut reservations, now, &mut other), Bytes::ZERO);
        granted.push(reservations.views(now)[0].granted);
        // The guest follows with a lag of a round, 100 MiB at a time.
        let to = other.observed.target.max(other.observed.actual.saturating_sub(Bytes::mib(100)));
        other.observed.actual = to;
        other.observed.guest = Some(spares(to.saturating_sub(Bytes::mib(200))));
        assert!(
            granted.last().unwrap().saturating_add(other.observed.actual.max(other.observed.target))
                <= Bytes::gib(1)
        );
    }
    assert!(granted[0] < *granted.last().unwrap(), "what was free came first: {granted:?}");
    let view = answered.try_recv().expect("it was granted").unwrap();
    assert_eq!(view.granted, request("web", "600M").size());
}

#[test]
fn whoever_is_replaced_is_told_and_nobody_is_by_a_request_that_is_refused() {
    let mut reservations = Reservations::default();
    let mut first = ask(&mut reservations, &request("web", "256M"), taken(1000, 0));
    let mut huge = ask(&mut reservations, &request("web", "2G"), taken(1000, 0));
    assert!(matches!(huge.try_recv().unwrap(), Err(ApiError::NoRoom { .. })));
    assert!(first.try_recv().is_err(), "it still waits");
    // The first's own room does not stand in the second's way.
    let mut second = ask(&mut reservations, &request("web", "600M"), taken(1000, 0));
    assert_eq!(first.try_recv().expect("it is told"), Err(ApiError::Replaced("web".to_owned())));
    assert!(second.try_recv().is_err(), "it waits");
    reservations.expire(Duration::from_secs(101), |name| name == "web");
    assert_eq!(second.try_recv().expect("it is told"), Err(ApiError::RunsAlready("web".to_owned())));
    assert!(reservations.is_empty());
}

#[test]
fn a_reservation_ends_when_its_vm_comes_or_its_time_is_over() {
    let second = Duration::from_secs(1);
    let mut reservations = Reservations::default();
    let mut answered = ask(&mut reservations, &request("web", "256M"), taken(1000, 0));
    reservations.expire(second * 104, |_| false);
    assert!(!reservations.is_empty());
    reservations.expire(second * 105, |_| false);
    let api_error = answered.try_recv().unwrap().unwrap_err();
    assert!(matches!(api_error, ApiError::NotInTime { .. }) && reservations.is_empty(), "{api_error}");

    let answered = ask(&mut reservations, &request("web", "256M"), taken(1000, 0));
    drop(answered);
    reservations.expire(second * 101, |_| false);
    assert!(reservations.is_empty(), "nobody waits for it");

    let _answered = ask(&mut reservations, &request("web", "256M"), taken(1000, 0));
    reservations.expire(second * 101, |name| name == "web");
    assert!(reservations.is_empty(), "its VM has come");

    let _answered = ask(&mut reservations, &request("web", "256M"), taken(1000, 0));
    assert!(reservations.release(second, "web") && !reservations.release(second, "web"));
}

const RESERVE: Bytes = Bytes::gib(2);

/// A host of 64 GiB of which VMs hold 50 and others 2, with room reserved for one of 8 GiB that has touched
/// `touched` of it before it has a socket; `more` is what others took since. Gives the budget before and
/// after, and what becomes of it.
fn starting(touched: Bytes, more: Bytes) -> (Bytes, Bytes, crate::policy::Balance) {
    let second = Duration::from_secs(1);
    let (resident, available) = (Bytes::gib(50), Bytes::gib(12));
    let host = |available| HostMemory { total: Bytes::gib(64), available, swap: None, group: None };
    let mut budget = Budget::all_but(RESERVE);
    let mut reservations = Reservations::default();
    let process = Process { pid: 7, started_ticks: 7 };
    let request = ReservationRequest { process: Some(process), ..request("web", "8G") };
    let before = budget.now(host(available), resident.saturating_add(reservations.touched()));
    let _answered = ask(&mut reservations, &request, Taken { budget: before, by_vms: resident });
    let own = Bytes::mib(9);
    reservations.look(second * 100, |asked| {
        if asked == process { ProcessMemory::Holds(own) } else { ProcessMemory::Unknown }
    });
    let mut other = Vm::new(
        1,
        Duration::from_secs(1000),
        Observation {
            driver: DriverState::Active,
            host_rss: Some(resident),
            guest: Some(spares(Bytes::gib(20))),
            ..Observation::of("50G,min=8G,max=50G".parse().unwrap())
        },
    );
    let mut policy = Policy::new(Settings::default());
    let mut balance = crate::policy::Balance::default();
    let mut after = before;
    for (round, touched, more) in [(100, Bytes::ZERO, Bytes::ZERO), (101, touched, more)] {
        let now = second * round;
        reservations.look(now, |_| ProcessMemory::Holds(own.saturating_add(touched)));
        let available = available.saturating_sub(touched).saturating_sub(more);
        after = budget.now(host(available), resident.saturating_add(reservations.touched()));
        let mut vms = vec![other.clone()];
        reservations.lend(&mut vms);
        let mut decisions = Vec::new();
        balance = policy.decide(now, HostObservation::of(after), &mut vms, &mut decisions);
        for vm in &vms {
            if !reservations.settle(vm) {
                other = vm.clone();
            }
        }
        decisions.retain(|decision| !reservations.grant(now, decision));
    }
    assert_eq!(reservations.views(second * 101)[0].granted, request.size());
    (before, after, balance)
}

proptest! {
    #[test]
    fn what_a_starting_vm_touches_is_counted_once(percent in 0..=100_u64, more in 0..=4096_u64) {
        let touched = request("web", "8G").size().percent(percent);
        let more = Bytes::mib(more);
        let (before, after, balance) = starting(touched, more);
        // What others took is never given to VMs; the budget follows in steps of 64 MiB.
        let there = before.saturating_sub(more);
        prop_assert!(after.0.abs_diff(there.0) < Bytes::mib(64).0, "{} of {}", after, there);
        if more == Bytes::ZERO {
            prop_assert_eq!(after, before);
        }
        if more < Bytes::mib(1024) {
            prop_assert_eq!(balance.over, Bytes::ZERO);
            prop_assert!(balance.state != HostState::Emergency, "{}", balance.state);
        }
    }
}

/// Reservations in which `web` has all that it asked for, until a minute after 100 s.
fn promised() -> Reservations {
    let second = Duration::from_secs(1);
    let mut reservations = Reservations::default();
    let size = request("web", "8G").size();
    let observed = observed(size, size).unwrap();
    let starting = Some(StartingProcess::new(Process { pid: 7, started_ticks: 7 }));
    let vm = Vm::new(7, LONGEST_WAIT, observed);
    let until = second * 160;
    let reservation =
        Reservation { vm, size, granted: size, until, starting, reserved_huge_pages: false, answer: None };
    reservations.of.insert("web".to_owned(), reservation);
    reservations
}

#[test]
fn a_reservation_stands_while_its_vm_touches_more_and_no_longer() {
    let second = Duration::from_secs(1);
    let mut reservations = promised();
    for now in 100..300 {
        reservations.look(second * now, |_| ProcessMemory::Holds(Bytes::mib(20 * u64::from(now))));
        reservations.expire(second * now, |_| false);
        assert!(!reservations.is_empty(), "{now}");
    }
    for now in 300..360 {
        reservations.look(second * now, |_| ProcessMemory::Holds(Bytes::mib(20 * 299)));
        reservations.expire(second * now, |_| false);
    }
    assert!(reservations.is_empty());
}

#[test]
fn a_reservation_ends_with_the_process_that_it_was_for() {
    let second = Duration::from_secs(1);
    let mut reservations = promised();
    for (now, current, stands) in [
        (100, ProcessMemory::Gone, true),
        (101, ProcessMemory::Unknown, true),
        (102, ProcessMemory::Holds(Bytes::mib(9)), true),
        (103, ProcessMemory::Unknown, true),
        (104, ProcessMemory::Gone, false),
    ] {
        reservations.look(second * now, |_| current);
        reservations.expire(second * now, |_| false);
        assert_eq!(!reservations.is_empty(), stands, "{now}");
    }
}
