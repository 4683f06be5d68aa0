//! What a host tells the cluster of itself, and when: slow figures that cause no churn, and one fast one.
//!
//! Each write to the cluster is a transaction of all its hosts, and each change of a capacity may move a VM. So a
//! capacity is a low quantile over ten minutes, in steps, and told only when it has changed by much for a while. It is
//! never told below the floors that are placed here, as long as they fit: the cluster would move VMs away that the
//! balancer serves. Pressure is told at once when it rises, and after a while when it falls.

use std::collections::VecDeque;
use std::time::Duration;

use crate::daemon::State;
use crate::policy::host_state::HostState;
use api::units::Bytes;
use serde::{Deserialize, Serialize};

/// How long samples count.
const WINDOW: Duration = Duration::from_secs(600);

/// The most samples that are kept: one every two seconds or so of [`WINDOW`].
const MOST_SAMPLES: usize = 300;

/// Which part of the samples may lie below what is told, in percent: the demand above floors is covered for the rest of
/// the time.
const QUANTILE: usize = 5;

/// Capacities are told in these steps, rounded down.
const STEP: u64 = 64;

/// The least change of a capacity that is told, in percent of what was told before.
const WORTH_TELLING: u64 = 5;

const MIB: u64 = 1 << 20;

/// A host at one moment, in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// What all VMs together may hold.
    pub budget: u64,
    /// The sum of what they are guaranteed.
    pub floors: u64,
    /// What they want above that.
    pub wanted: u64,
    /// 0 to 100.
    pub pressure: u64,
}

impl Sample {
    /// From what the balancer tells.
    pub fn of(state: &State) -> Self {
        let mut sample = Self {
            budget: state.host.budget.0 / MIB,
            floors: 0,
            wanted: 0,
            pressure: pressure(state.host.state),
        };
        for vm in &state.vms {
            // Of one that never answered only what the host holds for it is known.
            let (floor, demand) = match &vm.memory {
                Some(memory) if memory.reserved_huge_pages => continue,
                Some(memory) => (memory.limits.min(), memory.limits.clamp(memory.demand)),
                None => (vm.held.unwrap_or_default(), Bytes::ZERO),
            };
            sample.floors = sample.floors.saturating_add(floor.0.div_ceil(MIB));
            sample.wanted = sample.wanted.saturating_add(demand.saturating_sub(floor).0.div_ceil(MIB));
        }
        sample
    }
}

/// A balancer that is not normal takes memory back without hurry (SOFT); from HARD on it takes what guests would
/// rather keep, which is no time for a newcomer. The limit of 80 that the manual names lies between them.
#[must_use]
pub const fn pressure(state: HostState) -> u64 {
    match state {
        HostState::Normal => 0,
        HostState::Soft => 40,
        HostState::Hard => 90,
        HostState::Emergency => 100,
    }
}

/// What the cluster was told last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Told {
    /// What floors this host may hold, in MiB.
    pub capacity: Option<u64>,
    /// The floors that the balancer counts, in MiB.
    pub floors: Option<u64>,
    /// 0 to 100.
    pub pressure: Option<u64>,
}

/// What is remembered between two looks at the balancer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Milliseconds since the host's start, and what was seen then; the oldest first.
    samples: VecDeque<(u64, Sample)>,
    /// What the cluster was told.
    pub told: Told,
    /// Since when the capacity differs by much from what was told.
    differs_since: Option<u64>,
    /// Since when the floors differ from what was told.
    floors_differ_since: Option<u64>,
    /// Since when the pressure is lower than what was told.
    eased_since: Option<u64>,
}

impl Memory {
    /// Takes a sample in, `now` after the host's start, and says what should be told now. A change has to last for
    /// `hold`. The capacity is that of the host alone: see [`above_placed`].
    pub fn look(&mut self, now: Duration, sample: Sample, hold: Duration) -> Told {
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let hold = u64::try_from(hold.as_millis()).unwrap_or(u64::MAX);
        // What is from another start of the host has a later moment than now.
        if self.samples.back().is_some_and(|(at, _)| *at > now) {
            *self = Self::default();
        }
        let window = WINDOW.as_millis() as u64;
        self.samples.push_back((now, sample));
        while self.samples.len() > MOST_SAMPLES
            || self.samples.front().is_some_and(|(at, _)| now.saturating_sub(*at) > window)
        {
            self.samples.pop_front();
        }
        let lasts = |since: &mut Option<u64>, holds: bool| {
            if !holds {
                *since = None;
                return false;
            }
            now.saturating_sub(*since.get_or_insert(now)) >= hold
        };
        let capacity = self.capacity(sample.budget, sample.floors);
        let differs = self.told.capacity.is_none_or(|told| {
            capacity.abs_diff(told).saturating_mul(100) >= told.saturating_mul(WORTH_TELLING).max(1)
        });
        let tell_capacity =
            lasts(&mut self.differs_since, differs) || (differs && self.told.capacity.is_none());
        let floors_differ = self.told.floors != Some(sample.floors);
        let tell_floors = lasts(&mut self.floors_differ_since, floors_differ) || self.told.floors.is_none();
        let eased = self.told.pressure.is_some_and(|told| sample.pressure < told);
        let is_worse = self.told.pressure.is_none_or(|told| sample.pressure > told);
        let tell_pressure = lasts(&mut self.eased_since, eased) || is_worse;
        Told {
            capacity: if tell_capacity { Some(capacity) } else { self.told.capacity },
            floors: if tell_floors { Some(sample.floors) } else { self.told.floors },
            pressure: if tell_pressure { Some(sample.pressure) } else { self.told.pressure },
        }
    }

    /// Notes what the cluster was told.
    pub fn was_told(&mut self, told: Told) {
        if told.capacity != self.told.capacity {
            self.differs_since = None;
        }
        if told.floors != self.told.floors {
            self.floors_differ_since = None;
        }
        if told.pressure != self.told.pressure {
            self.eased_since = None;
        }
        self.told = told;
    }

    fn capacity(&self, budget: u64, floors: u64) -> u64 {
        let mut left: Vec<u64> =
            self.samples.iter().map(|(_, sample)| sample.budget.saturating_sub(sample.wanted)).collect();
        left.sort_unstable();
        let low = left.get(left.len() * QUANTILE / 100).copied().unwrap_or(0);
        above_placed(low / STEP * STEP, budget, floors)
    }
}

/// A capacity that does not drive away what is placed here, as long as the budget has room for it.
pub fn above_placed(capacity: u64, budget: u64, placed: u64) -> u64 {
    capacity.max(placed.min(budget))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLD: Duration = Duration::from_secs(60);

    fn sample(budget: u64, floors: u64, wanted: u64, pressure: u64) -> Sample {
        Sample { budget, floors, wanted, pressure }
    }

    /// What is told at each of many looks, ten seconds apart, and taken by the cluster.
    fn told(memory: &mut Memory, from: u64, samples: impl IntoIterator<Item = Sample>) -> Vec<Told> {
        let mut told = Vec::new();
        for (at, sample) in (from..).step_by(10).zip(samples) {
            let now = memory.look(Duration::from_secs(at), sample, HOLD);
            memory.was_told(now);
            told.push(now);
        }
        told
    }

    fn changes(told: &[Told]) -> usize {
        told.windows(2).filter(|pair| pair[0].capacity != pair[1].capacity).count()
    }

    #[test]
    fn the_first_look_is_told_at_once() {
        let first = Memory::default().look(Duration::from_secs(5), sample(1000, 300, 100, 0), HOLD);
        assert_eq!(first, Told { capacity: Some(896), floors: Some(300), pressure: Some(0) });
    }

    #[test]
    fn demand_that_comes_and_goes_moves_no_capacity() {
        let mut memory = Memory::default();
        let waves = (0..360).map(|at| sample(100_000, 30_000, if at % 6 < 3 { 2_000 } else { 12_000 }, 0));
        let told = told(&mut memory, 0, waves);
        // The first wave's peak, once, and never again within the hour.
        assert!(changes(&told) <= 1, "{} changes", changes(&told));
        assert_eq!(told.last().unwrap().capacity, Some(88_000));
    }

    #[test]
    fn a_burst_shorter_than_the_hold_is_not_told() {
        let mut memory = Memory::default();
        let burst = (0..60).map(|at| sample(100_000, 30_000, if at == 30 { 50_000 } else { 0 }, 0));
        assert_eq!(changes(&told(&mut memory, 0, burst)), 0);
    }

    #[test]
    fn demand_that_stays_is_told_once_it_has_lasted() {
        let mut memory = Memory::default();
        told(&mut memory, 0, [sample(100_000, 30_000, 0, 0); 10]);
        let after = told(&mut memory, 100, [sample(100_000, 30_000, 40_000, 0); 20]);
        let when = after.iter().position(|told| told.capacity < Some(70_000)).unwrap();
        assert!((6..=8).contains(&when), "told after {} s", when * 10);
        // Once it has gone it takes ten minutes: nobody knows before whether it comes back.
        let after = told(&mut memory, 300, [sample(100_000, 30_000, 0, 0); 80]);
        let when = after.iter().position(|told| told.capacity > Some(70_000)).unwrap();
        assert!((55..=70).contains(&when), "told after {} s", when * 10);
    }

    #[test]
    fn floors_that_fit_are_never_driven_away_and_those_that_do_not_are() {
        for (budget, floors, wanted, capacity) in [
            (1000, 700, 900, 700),
            (1000, 1000, 900, 1000),
            (1000, 1200, 0, 1000),
            (1000, 300, 0, 960),
            (0, 0, u64::MAX, 0),
        ] {
            let told = Memory::default().look(Duration::ZERO, sample(budget, floors, wanted, 0), HOLD);
            assert_eq!(told.capacity, Some(capacity), "{budget} {floors} {wanted}");
        }
    }

    #[test]
    fn pressure_is_told_at_once_and_taken_back_after_a_while() {
        let mut memory = Memory::default();
        told(&mut memory, 0, [sample(1000, 300, 0, 0); 3]);
        let after = told(&mut memory, 30, [sample(1000, 300, 0, 100)]);
        assert_eq!(after[0].pressure, Some(100));
        // A short relief is none.
        let after = told(&mut memory, 40, [sample(1000, 300, 0, 0), sample(1000, 300, 0, 100)]);
        assert_eq!(after[1].pressure, Some(100));
        let after = told(&mut memory, 60, [sample(1000, 300, 0, 0); 8]);
        assert_eq!(after.iter().position(|told| told.pressure == Some(0)), Some(6));
    }

    #[test]
    fn what_another_start_of_the_host_remembered_is_forgotten() {
        let mut memory = Memory::default();
        told(&mut memory, 5_000, [sample(1000, 300, 600, 100)]);
        let first = memory.look(Duration::from_secs(7), sample(1000, 300, 0, 0), HOLD);
        assert_eq!(first, Told { capacity: Some(960), floors: Some(300), pressure: Some(0) });
    }

    #[test]
    fn a_balancers_state_is_counted_by_floors() {
        let state: State = serde_json::from_str(
            r#"{"rounds":1,"host":{"total":0,"available":0,"budget":1073741824,"charged":0,"free":0,"over":0,
            "unserved":0,"state":"hard","rounds_over_budget":0},
            "vms":[{"name":"web","standing":"following","report_age_ms":null,"last_reason":null,"grows":0,"shrinks":0,
                "errors":0,"memory":{"limits":{"startup":268435456,"min":134217728,"max":1073741824},"used":null,
                "demand":201326592,"entitlement":0,"target":0,"actual":0,"host_rss":null,"charge":0}},
              {"name":"dumb","standing":"not-answering","report_age_ms":null,"last_reason":null,"grows":0,"shrinks":0,
                "errors":0,"memory":null,"held":104857600}]}"#,
        )
        .unwrap();
        assert_eq!(Sample::of(&state), sample(1024, 128 + 100, 64, 90));
    }
}
