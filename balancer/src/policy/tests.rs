//! The policy against small hosts of model guests.
//!
//! The guests here are as simple as can be: they follow their target at a given
//! speed, or don't. Real ones are in the lab.

use std::collections::VecDeque;

use api::guest_memory::GuestMemory;
use api::limits::Limits;

use api::status::{DriverState, Pauser};

use super::guards::{self, Standing};
use super::*;

/// A guest as the tests play it.
#[derive(Clone, Debug)]
struct Guest {
    vm: Vm,
    /// What its programs want; what they get is capped by what it has.
    wants: Bytes,
    /// What it can move in a tick.
    speed: Bytes,
    /// Gives nothing up.
    stuck: bool,
    /// Ends so far above each target.
    keeps: Bytes,
    /// Its reports are this old.
    age: Duration,
    /// Claims to use all it has.
    lies: bool,
    /// What it could spare at the end of each second, the newest first.
    spares: VecDeque<Bytes>,
}

impl Guest {
    fn new(id: u64, limits: &str, wants: Bytes) -> Self {
        let limits: Limits = limits.parse().unwrap();
        let observed = Observation { driver: DriverState::Active, ..Observation::of(limits) };
        let vm = Vm::new(id, Duration::from_secs(1000), observed);
        let speed = Bytes::gib(1);
        let spares = VecDeque::new();
        Self { vm, wants, speed, stuck: false, keeps: Bytes::ZERO, age: Duration::ZERO, lies: false, spares }
    }

    fn live(&mut self) {
        let observed = &mut self.vm.observed;
        if observed.actual < observed.target {
            observed.actual = observed.target.min(observed.actual.saturating_add(self.speed));
        } else if !self.stuck {
            let reached = observed.target.saturating_add(self.keeps).min(observed.actual);
            observed.actual = reached.max(observed.actual.saturating_sub(self.speed));
        }
        let waits = self.lies || self.wants > observed.actual;
        observed.stalls.allocation_stalls =
            Some(observed.stalls.allocation_stalls.unwrap_or(0) + u64::from(waits));
        let spare = if self.lies { Bytes::ZERO } else { observed.actual.saturating_sub(self.wants) };
        self.spares.push_front(spare);
        self.spares.truncate(64);
        // An old report tells of what was then.
        let then = self.spares.get(self.age.as_secs() as usize).or(self.spares.back());
        observed.guest =
            then.map(|spare| GuestMemory { age: self.age, spare: *spare, ..GuestMemory::default() });
    }
}

/// A host that is played tick by tick.
struct World {
    policy: Policy,
    host: HostObservation,
    guests: Vec<Guest>,
    now: Duration,
    decisions: Vec<Decision>,
    balance: Balance,
}

impl World {
    fn new(budget: Bytes, guests: Vec<Guest>) -> Self {
        Self::with(budget, guests, Guards::default())
    }

    fn with(budget: Bytes, guests: Vec<Guest>, guards: Guards) -> Self {
        let settings = Settings { guards, ..Settings::default() };
        let now = Duration::from_secs(100);
        let host = HostObservation::of(budget);
        Self {
            policy: Policy::new(settings),
            host,
            guests,
            now,
            decisions: Vec::new(),
            balance: Balance::default(),
        }
    }

    fn tick(&mut self) {
        self.now += Duration::from_secs(1);
        for guest in &mut self.guests {
            guest.live();
        }
        self.round();
    }

    /// One decision over things as they are.
    fn round(&mut self) {
        let mut vms: Vec<Vm> = self.guests.iter().map(|guest| guest.vm.clone()).collect();
        self.balance = self.policy.decide(self.now, self.host, &mut vms, &mut self.decisions);
        for (guest, vm) in self.guests.iter_mut().zip(vms) {
            guest.vm = vm;
        }
        for decision in &self.decisions {
            let guest = self.guests.iter_mut().find(|guest| guest.vm.id == decision.vm).unwrap();
            assert_eq!(
                guest.vm.observed.target, decision.reason.old,
                "a reason must tell the target it changed"
            );
            guest.vm.observed.target = decision.reason.new;
        }
    }

    /// A tick and some rounds at odd moments after it, as pushes make them.
    fn tick_with_pushes(&mut self, pushes: u32) {
        self.tick();
        let tick = self.now;
        for push in 1..=pushes {
            self.now = tick + Duration::from_millis(u64::from(push) * 40);
            for guest in &mut self.guests {
                // Nothing new was said: the same report, older.
                if let Some(said) = &mut guest.vm.observed.guest {
                    said.age += Duration::from_millis(40);
                }
            }
            self.round();
        }
        self.now = tick;
    }

    fn run(&mut self, ticks: u32) {
        for _ in 0..ticks {
            self.tick();
        }
    }

    fn charged(&self) -> Bytes {
        self.guests.iter().map(|guest| guest.vm.observed.target.max(guest.vm.observed.actual)).sum()
    }

    fn target(&self, index: usize) -> Bytes {
        self.guests[index].vm.observed.target
    }
}

mod emergency;
mod example;
mod managed;
mod properties;
mod serving;
mod twins;

const WIDE: &str = "256M,min=128M,max=1G";
