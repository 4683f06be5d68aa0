//! Room for VMs that are about to start.
//!
//! A reservation is to the policy a VM that has nothing yet and is owed what it
//! starts with. So memory is taken for it from others as for any guest in need,
//! what it was given is charged, and nothing of it exceeds the budget. When the
//! VM's socket answers, the VM's own charge takes its place. Until then it is kept on
//! file ([`kept`]), as a daemon that starts anew could learn of it from nobody.

mod kept;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use balloon::limits::Limits;
use balloon::status::DriverState;
use balloon::units::{Bytes, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tracing::{info, warn};

use self::kept::{Book, Kept};
use super::refusal::Refusal;
use crate::policy::reason::Decision;
use crate::policy::{Said, Vcpus, Vm};

/// How long a reservation stands for a VM that does not appear. A VM's socket is there
/// within a second of the answer, even where its memory is touched first.
pub const LIFE: Duration = Duration::from_secs(60);

/// The longest that a client may wait for room.
pub const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// How long it waits where it does not say.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// More reservations than this are not held at a time.
const MOST: usize = 1024;

/// What a VMM holds beside guest memory, at most: `make bench` counts 3.7 MiB.
const OF_A_VMM: Bytes = Bytes::mib(8);

/// Guest memory for each byte of second-level page tables: 8 bytes map 4 KiB.
const BYTES_MAPPED_BY_A_BYTE: u64 = 512;

/// `POST /reservations`: room for a VM that is about to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// The VM's name.
    pub name: String,
    /// Its limits; it is given what it starts with.
    pub limits: Limits,
    /// How many milliseconds to wait until there is room; 30,000 where it is not said,
    /// 300,000 at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
}

impl Wanted {
    /// How long it waits for room.
    pub fn wait(&self) -> Duration {
        self.wait_ms.map_or(DEFAULT_WAIT, Duration::from_millis).min(LONGEST_WAIT)
    }

    /// What it needs: what the guest starts with, the VMM, and page tables for all it may get.
    pub fn size(&self) -> Bytes {
        let tables = Bytes(self.limits.max().0 / BYTES_MAPPED_BY_A_BYTE);
        let size = self.limits.startup().saturating_add(OF_A_VMM).saturating_add(tables);
        Bytes(size.0.div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE))
    }
}

/// A reservation as it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservationView {
    /// The VM that is about to start.
    pub name: String,
    /// What is reserved for it.
    pub size: Bytes,
    /// What of this is there.
    pub granted: Bytes,
    /// Milliseconds until it is dropped if its VM does not appear.
    pub expires_in_ms: u64,
}

#[derive(Debug)]
struct Reservation {
    vm: Vm,
    size: Bytes,
    granted: Bytes,
    /// When it is dropped: the end of the client's patience, or of [`LIFE`].
    until: Duration,
    /// Whoever waits for it; nobody once it is there.
    answer: Option<oneshot::Sender<Result<ReservationView, Refusal>>>,
}

impl Reservation {
    fn view(&self, name: &str, now: Duration) -> ReservationView {
        let left = self.until.saturating_sub(now).as_millis();
        ReservationView {
            name: name.to_owned(),
            size: self.size,
            granted: self.granted,
            expires_in_ms: u64::try_from(left).unwrap_or(u64::MAX),
        }
    }
}

/// What can't be had for a new VM: what others must keep at least.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// What all VMs together may hold.
    pub budget: Bytes,
    /// What those that run can't be shrunk below.
    pub by_vms: Bytes,
}

/// All reservations.
#[derive(Debug, Default)]
pub struct Ledger {
    of: BTreeMap<String, Reservation>,
    book: Option<Book>,
}

impl Ledger {
    /// One that is kept on file in the daemon's `own` directory, with all that the daemon before this one
    /// had promised. `next_id` gives each its number as a VM of the policy.
    pub fn in_directory(own: &Path, now: Duration, mut next_id: impl FnMut() -> u64) -> Self {
        let book = Book::in_directory(own);
        let kept = book.read().unwrap_or_else(|error| {
            warn!("{}: {error}: nothing is known of VMs that were about to start", book.path().display());
            Vec::new()
        });
        let mut of = BTreeMap::new();
        for kept in kept.into_iter().take(MOST).filter(|kept| kept.left() > Duration::ZERO) {
            let Some(said) = said(kept.size, kept.size) else { continue };
            info!(vm = kept.name, "{} stay reserved for {}", kept.size, kept.name);
            let vm = Vm::new(next_id(), LONGEST_WAIT, said);
            let until = now + kept.left();
            let reservation = Reservation { vm, size: kept.size, granted: kept.size, until, answer: None };
            of.insert(kept.name, reservation);
        }
        Self { of, book: Some(book) }
    }

    /// Writes down what was promised, where this changed it.
    fn keep(&self, now: Duration) {
        let Some(book) = &self.book else { return };
        let promised = self.of.iter().filter(|(_, reservation)| reservation.granted >= reservation.size);
        let promised = promised.map(|(name, reservation)| {
            Kept::new(name, reservation.granted, reservation.until.saturating_sub(now))
        });
        if let Err(error) = book.write(&promised.collect::<Vec<_>>()) {
            warn!("{}: {error}: after a restart nobody will know what was reserved", book.path().display());
        }
    }

    /// Admits a VM, or refuses it with the numbers. Whoever waits is answered by [`Ledger::grant`]
    /// or [`Ledger::expire`]. A request that is admitted takes the place of an earlier one for the same
    /// name, and whoever waits for that one is told so; one that is refused changes nothing.
    pub fn admit(
        &mut self,
        id: u64,
        now: Duration,
        wanted: &Wanted,
        taken: Taken,
        answer: oneshot::Sender<Result<ReservationView, Refusal>>,
    ) {
        let size = wanted.size();
        let others = self.of.iter().filter(|(name, _)| **name != wanted.name);
        let (count, reserved) = others.fold((0, Bytes::ZERO), |(count, reserved), (_, reservation)| {
            (count + 1, reserved.saturating_add(reservation.size))
        });
        let kept = taken.by_vms.saturating_add(reserved);
        let said = said(size, Bytes::ZERO);
        let refusal = match said {
            Some(_) if count >= MOST => Some(Refusal::TooManyReservations),
            Some(_) if kept.saturating_add(size) <= taken.budget => None,
            _ => Some(Refusal::NoRoom {
                name: wanted.name.clone(),
                size,
                kept,
                budget: taken.budget,
                startup: wanted.limits.startup(),
                left: taken
                    .budget
                    .saturating_sub(kept)
                    .saturating_sub(size.saturating_sub(wanted.limits.startup())),
            }),
        };
        // Whoever asked may have hung up.
        match (refusal, said) {
            (None, Some(said)) => {
                let vm = Vm::new(id, LONGEST_WAIT, said);
                let until = now + wanted.wait();
                let reservation = Reservation { vm, size, granted: Bytes::ZERO, until, answer: Some(answer) };
                if let Some(earlier) = self.of.insert(wanted.name.clone(), reservation) {
                    self.keep(now);
                    info!(
                        vm = wanted.name,
                        "another request for {} takes the place of the first", wanted.name
                    );
                    if let Some(answer) = earlier.answer {
                        let _ = answer.send(Err(Refusal::Replaced(wanted.name.clone())));
                    }
                }
            }
            (Some(refusal), _) => drop(answer.send(Err(refusal))),
            (None, None) => drop(answer.send(Err(Refusal::Stopping))),
        }
    }

    /// Drops one. True where there was one.
    pub fn release(&mut self, now: Duration, name: &str) -> bool {
        let found = self.of.remove(name);
        if found.is_some() {
            self.keep(now);
            info!(vm = name, "the reservation for {name} was given back");
        }
        found.is_some()
    }

    /// Drops those whose VM has come, whose client has gone, and whose time is over.
    pub fn expire(&mut self, now: Duration, has_come: impl Fn(&str) -> bool) {
        let before = self.of.len();
        self.of.retain(|name, reservation| {
            if has_come(name) {
                info!(
                    vm = name,
                    "{name} has come: its reservation of {} is its own now", reservation.granted
                );
                // It started without waiting for the answer, or another of this name did.
                if let Some(answer) = reservation.answer.take() {
                    let _ = answer.send(Err(Refusal::RunsAlready(name.clone())));
                }
                return false;
            }
            let Some(answer) =
                reservation.answer.take_if(|answer| now >= reservation.until || answer.is_closed())
            else {
                let stays = reservation.answer.is_some() || now < reservation.until;
                if !stays {
                    info!(
                        vm = name,
                        "{name} has not come: its reservation of {} is dropped", reservation.granted
                    );
                }
                return stays;
            };
            info!(vm = name, "nobody waits for room for {name} any more");
            let Reservation { granted, size, .. } = *reservation;
            let _ = answer.send(Err(Refusal::NotInTime { name: name.clone(), granted, size }));
            false
        });
        if self.of.len() < before {
            self.keep(now);
        }
    }

    /// Hands them to the policy as VMs.
    pub fn lend(&mut self, vms: &mut Vec<Vm>) {
        for reservation in self.of.values_mut() {
            if let Some(said) = said(reservation.size, reservation.granted) {
                reservation.vm.said = said;
            }
            vms.push(reservation.vm.clone());
        }
    }

    /// Takes one back from the policy. False where the VM is no reservation.
    pub fn settle(&mut self, vm: &Vm) -> bool {
        let found = self.of.values_mut().find(|reservation| reservation.vm.id == vm.id);
        match found {
            Some(reservation) => {
                reservation.vm = vm.clone();
                true
            }
            None => false,
        }
    }

    /// Gives what the policy decided. False where the decision is about no reservation.
    pub fn grant(&mut self, now: Duration, decision: &Decision) -> bool {
        let found = self.of.iter_mut().find(|(_, reservation)| reservation.vm.id == decision.vm);
        let Some((name, reservation)) = found else { return false };
        // What is reserved is not taken away again.
        reservation.granted = reservation.granted.max(decision.reason.new.min(reservation.size));
        if reservation.granted >= reservation.size
            && let Some(answer) = reservation.answer.take()
        {
            info!(vm = name, "{} is reserved for {name}", reservation.size);
            reservation.until = now + LIFE;
            let view = reservation.view(name, now);
            // First on file: nobody holds a promise that a killed daemon forgets.
            self.keep(now);
            let _ = answer.send(Ok(view));
        }
        true
    }

    /// How they stand.
    pub fn views(&self, now: Duration) -> Vec<ReservationView> {
        self.of.iter().map(|(name, reservation)| reservation.view(name, now)).collect()
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.of.is_empty()
    }
}

/// A guest that uses all it was given and is owed `size`. `None` where no limits can say so.
fn said(size: Bytes, granted: Bytes) -> Option<Said> {
    // One page of range, as a VM that nobody may move is given nothing either.
    let limits =
        Limits::new(size, size, Bytes(size.0.checked_add(PAGE_SIZE)?), 0, balloon::limits::DEFAULT_WEIGHT);
    Some(Said {
        target: granted,
        actual: granted,
        host_rss: Bytes::ZERO,
        driver: DriverState::Active,
        spare: Some((Duration::ZERO, Bytes::ZERO)),
        vcpus: Vcpus::NotYet,
        ..Said::of(limits.ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Host, Policy, Settings};

    fn wanted(name: &str, limits: &str) -> Wanted {
        Wanted { name: name.to_owned(), limits: limits.parse().unwrap(), wait_ms: Some(5000) }
    }

    fn taken(budget: u64, by_vms: u64) -> Taken {
        Taken { budget: Bytes::mib(budget), by_vms: Bytes::mib(by_vms) }
    }

    type Answered = oneshot::Receiver<Result<ReservationView, Refusal>>;

    fn ask(ledger: &mut Ledger, wanted: &Wanted, taken: Taken) -> Answered {
        let (answer, answered) = oneshot::channel();
        ledger.admit(7, Duration::from_secs(100), wanted, taken, answer);
        answered
    }

    #[test]
    fn what_a_vm_needs_is_more_than_its_guest() {
        assert_eq!(wanted("web", "256M,max=1G").size(), Bytes::mib(256 + 8 + 2));
    }

    #[test]
    fn a_vm_that_can_never_fit_is_refused_with_the_numbers() {
        let mut ledger = Ledger::default();
        let mut answered = ask(&mut ledger, &wanted("web", "512M"), taken(1000, 600));
        let refusal = answered.try_recv().unwrap().unwrap_err().to_string();
        for number in ["web", "521 MiB", "600 MiB", "1000 MiB", "391 MiB"] {
            assert!(refusal.contains(number), "{number}: {refusal}");
        }
        assert!(ledger.is_empty());
        // Another's reservation counts too.
        let mut first = ask(&mut ledger, &wanted("a", "512M"), taken(1000, 0));
        assert!(first.try_recv().is_err(), "it waits");
        let mut second = ask(&mut ledger, &wanted("b", "512M"), taken(1000, 0));
        assert!(matches!(second.try_recv().unwrap(), Err(Refusal::NoRoom { .. })));
        for huge in ["16777215T", "64M,max=16777215T"] {
            let mut answered = ask(&mut ledger, &wanted("huge", huge), taken(1000, 0));
            assert!(matches!(answered.try_recv().unwrap(), Err(Refusal::NoRoom { .. })), "{huge}");
        }
    }

    /// One round with a guest of 700 MiB that uses 200.
    fn round(policy: &mut Policy, ledger: &mut Ledger, now: Duration, other: &mut Vm) -> Bytes {
        let mut vms = vec![other.clone()];
        ledger.lend(&mut vms);
        let mut decisions = Vec::new();
        let balance = policy.decide(now, Host::of(Bytes::gib(1)), &mut vms, &mut decisions);
        for vm in &vms {
            if !ledger.settle(vm) {
                *other = vm.clone();
            }
        }
        for decision in &decisions {
            if !ledger.grant(now, decision) {
                other.said.target = decision.reason.new;
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
            Said {
                driver: DriverState::Active,
                spare: Some((Duration::ZERO, Bytes::mib(500))),
                ..Said::of(limits)
            },
        );
        let (mut policy, mut ledger) = (Policy::new(Settings::default()), Ledger::default());
        let mut now = Duration::from_secs(100);
        round(&mut policy, &mut ledger, now, &mut other);
        let mut answered = ask(&mut ledger, &wanted("web", "600M"), taken(1024, 128));
        let mut granted = Vec::new();
        for _ in 0..20 {
            now += Duration::from_secs(1);
            ledger.expire(now.min(Duration::from_secs(104)), |_| false);
            assert_eq!(round(&mut policy, &mut ledger, now, &mut other), Bytes::ZERO);
            granted.push(ledger.views(now)[0].granted);
            // The guest follows with a lag of a round, 100 MiB at a time.
            let to = other.said.target.max(other.said.actual.saturating_sub(Bytes::mib(100)));
            other.said.actual = to;
            other.said.spare = Some((Duration::ZERO, to.saturating_sub(Bytes::mib(200))));
            assert!(
                granted.last().unwrap().saturating_add(other.said.actual.max(other.said.target))
                    <= Bytes::gib(1)
            );
        }
        assert!(granted[0] < *granted.last().unwrap(), "what was free came first: {granted:?}");
        let view = answered.try_recv().expect("it was granted").unwrap();
        assert_eq!(view.granted, wanted("web", "600M").size());
    }

    #[test]
    fn whoever_is_replaced_is_told_and_nobody_is_by_a_request_that_is_refused() {
        let mut ledger = Ledger::default();
        let mut first = ask(&mut ledger, &wanted("web", "256M"), taken(1000, 0));
        let mut huge = ask(&mut ledger, &wanted("web", "2G"), taken(1000, 0));
        assert!(matches!(huge.try_recv().unwrap(), Err(Refusal::NoRoom { .. })));
        assert!(first.try_recv().is_err(), "it still waits");
        // The first's own room does not stand in the second's way.
        let mut second = ask(&mut ledger, &wanted("web", "600M"), taken(1000, 0));
        assert_eq!(first.try_recv().expect("it is told"), Err(Refusal::Replaced("web".to_owned())));
        assert!(second.try_recv().is_err(), "it waits");
        ledger.expire(Duration::from_secs(101), |name| name == "web");
        assert_eq!(second.try_recv().expect("it is told"), Err(Refusal::RunsAlready("web".to_owned())));
        assert!(ledger.is_empty());
    }

    #[test]
    fn a_reservation_ends_when_its_vm_comes_or_its_time_is_over() {
        let second = Duration::from_secs(1);
        let mut ledger = Ledger::default();
        let mut answered = ask(&mut ledger, &wanted("web", "256M"), taken(1000, 0));
        ledger.expire(second * 104, |_| false);
        assert!(!ledger.is_empty());
        ledger.expire(second * 105, |_| false);
        let refusal = answered.try_recv().unwrap().unwrap_err();
        assert!(matches!(refusal, Refusal::NotInTime { .. }) && ledger.is_empty(), "{refusal}");

        let answered = ask(&mut ledger, &wanted("web", "256M"), taken(1000, 0));
        drop(answered);
        ledger.expire(second * 101, |_| false);
        assert!(ledger.is_empty(), "nobody waits for it");

        let _answered = ask(&mut ledger, &wanted("web", "256M"), taken(1000, 0));
        ledger.expire(second * 101, |name| name == "web");
        assert!(ledger.is_empty(), "its VM has come");

        let _answered = ask(&mut ledger, &wanted("web", "256M"), taken(1000, 0));
        assert!(ledger.release(second, "web") && !ledger.release(second, "web"));
    }
}
