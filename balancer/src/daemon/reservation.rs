//! Room for VMs that are about to start.
//!
//! The policy sees a reservation as a VM that has nothing yet and needs what it starts with. So memory is
//! taken from others for it as for any guest in need, grants to it are charged, and the budget holds. When
//! the VM's socket answers, the VM's own charge replaces the reservation. Until then the reservation is on
//! file ([`store`]), as a new daemon could not learn of it otherwise, and the VM's process tells what it has
//! touched already ([`starting_process`]).

mod starting_process;
mod store;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use api::guest_memory::GuestMemory;
use api::limits::{Limits, SMALLEST};
use api::status::DriverState;
use api::units::{Bytes, PAGE_SIZE, optional_whole};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tracing::{info, warn};

pub use self::starting_process::Process;
use self::starting_process::{Growth, ProcessMemory, StartingProcess, prolonged};
use self::store::{ReservationStore, StoredReservation};
use super::api_error::ApiError;
use crate::policy::reason::Decision;
use crate::policy::{Observation, Vcpus, Vm};

/// How long a reservation stands for a VM that does not appear. A VM's socket is there within a second of the
/// answer, or after minutes if the VM touches its memory first: then the reservation stands while its process
/// touches more.
pub const LIFE: Duration = Duration::from_secs(60);

/// The longest that a client may wait for room.
pub const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// How long it waits by default.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// The most reservations at a time.
const MOST: usize = 1024;

/// The most that a VMM holds beside guest memory: `make bench` counts 5.5 MiB.
const OF_A_VMM: Bytes = Bytes::mib(8);

/// Guest memory for each byte of second-level page tables: 8 bytes map 4 KiB.
const BYTES_MAPPED_BY_A_BYTE: u64 = 512;

/// `POST /reservations`: room for a VM that is about to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReservationRequest {
    /// The VM's name.
    pub name: String,
    /// Its limits; it is given what it starts with.
    pub limits: Limits,
    /// How many milliseconds to wait for room; 30,000 by default, 300,000 at most.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_whole")]
    pub wait_ms: Option<u64>,
    /// The process that will hold its memory, if it runs already: what it comes to hold from now on counts as
    /// the VM's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// Its guest's memory lies in the host's reserved huge pages (hugetlb), which are no part of the budget:
    /// it needs room for its VMM alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reserved_huge_pages: bool,
}

impl ReservationRequest {
    /// How long it waits for room.
    pub fn wait(&self) -> Duration {
        self.wait_ms.map_or(DEFAULT_WAIT, Duration::from_millis).min(LONGEST_WAIT)
    }

    /// What it needs: the guest's startup memory, the VMM, and page tables for its max. On reserved huge
    /// pages the last two, and no less than the smallest VM.
    pub fn size(&self) -> Bytes {
        let tables = Bytes(self.limits.max().0 / BYTES_MAPPED_BY_A_BYTE);
        if self.reserved_huge_pages {
            // Huge pages need no tables of the last level.
            let tables = Bytes(tables.0 / BYTES_MAPPED_BY_A_BYTE);
            return OF_A_VMM.saturating_add(tables).max(SMALLEST).page_floor();
        }
        self.limits.startup().saturating_add(OF_A_VMM).saturating_add(tables).page_ceil()
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
    /// When it is dropped: at the end of the client's wait, or of [`LIFE`].
    until: Duration,
    starting: Option<StartingProcess>,
    /// The rest of the VM's memory lies in reserved huge pages.
    reserved_huge_pages: bool,
    /// The client that waits for it; `None` once it is granted.
    answer: Option<oneshot::Sender<Result<ReservationView, ApiError>>>,
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

/// What is not available to a new VM.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// What all VMs together may hold.
    pub budget: Bytes,
    /// What the running VMs can't be shrunk below.
    pub by_vms: Bytes,
}

/// All reservations.
#[derive(Debug, Default)]
pub struct Reservations {
    of: BTreeMap<String, Reservation>,
    store: Option<ReservationStore>,
    /// Until when promises may stand that nobody knows of: the file could not be read.
    unknown_until: Option<Duration>,
}

impl Reservations {
    /// Those on file in the daemon's `own` directory, which the daemon before this one granted. `next_id`
    /// numbers them as VMs of the policy.
    pub fn in_directory(own: &Path, now: Duration, mut next_id: impl FnMut() -> u64) -> Self {
        let store = ReservationStore::in_directory(own);
        let mut unknown_until = None;
        let kept = store.read().unwrap_or_else(|error| {
            let left = store.longest_left();
            warn!(
                "can't read {}: {error}: memory may be promised to VMs that are about to start, so no memory is \
                 moved or promised for {} s, when such promises are over; if no VM was about to start, remove the \
                 file and start the balancer again",
                store.path().display(),
                left.as_secs()
            );
            unknown_until = Some(now + left);
            Vec::new()
        });
        let mut of = BTreeMap::new();
        for kept in kept.into_iter().take(MOST).filter(|kept| kept.left() > Duration::ZERO) {
            let Some(observed) = observed(kept.size, kept.size) else { continue };
            info!(vm = kept.name, "{} stay reserved for {}", kept.size, kept.name);
            let vm = Vm::new(next_id(), LONGEST_WAIT, observed);
            let until = now + kept.left();
            let StoredReservation { size, starting, .. } = kept;
            // Its process will tell whether it lies in huge pages.
            let reservation = Reservation {
                vm,
                size,
                granted: size,
                until,
                starting,
                reserved_huge_pages: false,
                answer: None,
            };
            of.insert(kept.name, reservation);
        }
        Self { of, store: Some(store), unknown_until }
    }

    /// Whether all promises of the daemon before this one are known, or over.
    pub fn are_known(&self, now: Duration) -> bool {
        self.unknown_until.is_none_or(|until| now >= until)
    }

    /// Writes what was granted to the file.
    pub fn keep(&self, now: Duration) {
        let Some(store) = &self.store else { return };
        let promised = self.of.iter().filter(|(_, reservation)| reservation.granted >= reservation.size);
        let promised = promised.map(|(name, reservation)| {
            StoredReservation::new(
                name,
                reservation.granted,
                reservation.starting,
                reservation.until.saturating_sub(now),
            )
        });
        if let Err(error) = store.write(&promised.collect::<Vec<_>>()) {
            warn!("{}: {error}: after a restart nobody will know what was reserved", store.path().display());
        }
    }

    /// Admits a VM, or refuses it with the numbers. [`Reservations::grant`] or [`Reservations::expire`]
    /// answers a request that was admitted. It replaces an earlier one for the same name, whose client is
    /// told so; a refused one changes nothing.
    pub fn admit(
        &mut self,
        id: u64,
        now: Duration,
        request: &ReservationRequest,
        taken: Taken,
        answer: oneshot::Sender<Result<ReservationView, ApiError>>,
    ) {
        let size = request.size();
        let others = self.of.iter().filter(|(name, _)| **name != request.name);
        let (count, reserved) = others.fold((0, Bytes::ZERO), |(count, reserved), (_, reservation)| {
            (count + 1, reserved.saturating_add(reservation.size))
        });
        let kept = taken.by_vms.saturating_add(reserved);
        let observed = observed(size, Bytes::ZERO);
        let api_error = match observed {
            Some(_) if count >= MOST => Some(ApiError::TooManyReservations),
            Some(_) if kept.saturating_add(size) <= taken.budget => None,
            _ if request.reserved_huge_pages => {
                Some(ApiError::NoRoomForVmm { name: request.name.clone(), size, kept, budget: taken.budget })
            }
            _ => Some(ApiError::NoRoom {
                name: request.name.clone(),
                size,
                kept,
                budget: taken.budget,
                startup: request.limits.startup(),
                left: taken
                    .budget
                    .saturating_sub(kept)
                    .saturating_sub(size.saturating_sub(request.limits.startup())),
            }),
        };
        // The client may have hung up.
        match (api_error, observed) {
            (None, Some(observed)) => {
                let vm = Vm::new(id, LONGEST_WAIT, observed);
                let until = now + request.wait();
                let (granted, starting) = (Bytes::ZERO, request.process.map(StartingProcess::new));
                let ReservationRequest { reserved_huge_pages, .. } = *request;
                let answer = Some(answer);
                let reservation =
                    Reservation { vm, size, granted, until, starting, reserved_huge_pages, answer };
                if let Some(earlier) = self.of.insert(request.name.clone(), reservation) {
                    self.keep(now);
                    info!(
                        vm = request.name,
                        "another request for {} takes the place of the first", request.name
                    );
                    if let Some(answer) = earlier.answer {
                        let _ = answer.send(Err(ApiError::Replaced(request.name.clone())));
                    }
                }
            }
            (Some(api_error), _) => drop(answer.send(Err(api_error))),
            (None, None) => drop(answer.send(Err(ApiError::Stopping))),
        }
    }

    /// Drops one; true if there was one.
    pub fn release(&mut self, now: Duration, name: &str) -> bool {
        let found = self.of.remove(name);
        if found.is_some() {
            self.keep(now);
            info!(vm = name, "the reservation for {name} was given back");
        }
        found.is_some()
    }

    /// Drops those whose VM has come, whose client has gone, or whose time is over.
    pub fn expire(&mut self, now: Duration, has_come: impl Fn(&str) -> bool) {
        let before = self.of.len();
        self.of.retain(|name, reservation| {
            if has_come(name) {
                info!(
                    vm = name,
                    "{name} has come: its reservation of {} is its own now", reservation.granted
                );
                // A VM of this name started without waiting for the answer.
                if let Some(answer) = reservation.answer.take() {
                    let _ = answer.send(Err(ApiError::RunsAlready(name.clone())));
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
            let _ = answer.send(Err(ApiError::NotInTime { name: name.clone(), granted, size }));
            false
        });
        if self.of.len() < before {
            self.keep(now);
        }
    }

    /// When the next client that waits for room has waited long enough.
    pub fn next_to_give_up(&self) -> Option<Duration> {
        let waiting = self.of.values().filter(|reservation| reservation.answer.is_some());
        waiting.map(|reservation| reservation.until).min()
    }

    /// Looks at what VMs have touched of their grants. Call it before the host's free memory is read, so that
    /// what is touched in between is not counted twice.
    pub fn look(&mut self, now: Duration, held: impl Fn(Process) -> ProcessMemory) {
        let mut changed = false;
        for Reservation { starting, granted, size, until, .. } in self.of.values_mut() {
            let Some(starting) = starting else { continue };
            let moved = match starting.look(*granted, &held) {
                Growth::More if granted >= size => prolonged(*until, now, LIFE),
                // There is no process left that could come.
                Growth::Ended => Some(now),
                Growth::More | Growth::Same => None,
            };
            if let Some(moved) = moved {
                *until = moved;
                changed = true;
            }
        }
        if changed {
            self.keep(now);
        }
    }

    /// Memory of the host that VMs use before they appear. It is charged as granted already, so it must not
    /// reduce the budget.
    pub fn touched(&self) -> Bytes {
        self.of
            .values()
            .filter_map(|reservation| reservation.starting)
            .map(|starting| starting.touched())
            .sum()
    }

    pub fn is_for(&self, name: &str) -> bool {
        self.of.contains_key(name)
    }

    pub fn is_for_huge_pages(&self, name: &str) -> bool {
        self.of.get(name).is_some_and(|reservation| reservation.reserved_huge_pages)
    }

    /// Hands them to the policy as VMs.
    pub fn lend(&mut self, vms: &mut Vec<Vm>) {
        for reservation in self.of.values_mut() {
            if let Some(observed) = observed(reservation.size, reservation.granted) {
                reservation.vm.observed = observed;
            }
            vms.push(reservation.vm.clone());
        }
    }

    /// Takes one back from the policy; false if the VM is no reservation.
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

    /// Grants what the policy decided; false if the decision is about no reservation.
    pub fn grant(&mut self, now: Duration, decision: &Decision) -> bool {
        let found = self.of.iter_mut().find(|(_, reservation)| reservation.vm.id == decision.vm);
        let Some((name, reservation)) = found else { return false };
        // A grant is never taken away again.
        reservation.granted = reservation.granted.max(decision.reason.new.min(reservation.size));
        if reservation.granted >= reservation.size
            && let Some(answer) = reservation.answer.take()
        {
            info!(vm = name, "{} is reserved for {name}", reservation.size);
            reservation.until = now + LIFE;
            let view = reservation.view(name, now);
            // First to the file: a killed daemon must not forget a grant that a client knows of.
            self.keep(now);
            let _ = answer.send(Ok(view));
        }
        true
    }

    pub fn views(&self, now: Duration) -> Vec<ReservationView> {
        self.of.iter().map(|(name, reservation)| reservation.view(name, now)).collect()
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.of.is_empty()
    }
}

/// The observation of a guest that uses all it was granted and needs `size`; `None` if no limits can say so.
fn observed(size: Bytes, granted: Bytes) -> Option<Observation> {
    // A range of one page, as the policy gives nothing to a VM whose limits leave nothing to move.
    let limits =
        Limits::new(size, size, Bytes(size.0.checked_add(PAGE_SIZE)?), 0, api::limits::DEFAULT_WEIGHT);
    Some(Observation {
        target: granted,
        actual: granted,
        host_rss: Some(Bytes::ZERO),
        driver: DriverState::Active,
        guest: Some(GuestMemory::default()),
        vcpus: Vcpus::NotYet,
        ..Observation::of(limits.ok()?)
    })
}

#[cfg(test)]
#[path = "reservation/tests.rs"]
mod tests;
