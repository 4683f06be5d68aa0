//! A day of a cluster.

use std::sync::Arc;
use std::time::Duration;

use api::units::Bytes;
use balancer::fleet::{Memory, Sample, Told, above_placed, pressure};
use balancer::policy::host_state::HostState;
use balancer::policy::observation::HostObservation;
use serde::Serialize;

use super::placement::{Host, Vm, place};
use super::{Counting, Setup};
use crate::random::Random;
use crate::trace::{self, Kind};

/// How many different VMs there are; each is met many times, at other times of its day.
const PROFILES: usize = 400;

/// A lost host comes back after this many minutes.
const REPAIR: usize = 120;

/// What a host keeps free for guests in need, in percent of its budget: as the balancer's usual settings.
const POOL_PERCENT: u64 = 3;

/// Above which pressure a host takes no newcomer: as the manual's rule.
const PRESSURE_LIMIT: u64 = 80;

/// How long a change lasts before it is told: as `ocf:ballast:node` has it.
const HOLD: Duration = Duration::from_secs(60);

const MINUTE: u64 = 60;
const MIB: u64 = 1 << 20;

/// One VM's day, in MiB.
#[derive(Debug)]
struct Profile {
    min: u64,
    max: u64,
    /// The most that it uses in each minute.
    used: Vec<u64>,
}

/// The demand of all VMs of a cluster.
pub struct Demand {
    /// Which profile each VM has, and how many minutes later.
    vms: Vec<(Arc<Profile>, usize)>,
}

impl Demand {
    /// Of the VMs of this cluster.
    #[must_use]
    pub fn generate(setup: &Setup) -> Self {
        let profiles: Vec<Arc<Profile>> =
            (0..PROFILES.min(setup.vms)).map(|index| Arc::new(Profile::new(setup, index))).collect();
        let mut random = Random::new(setup.seed, u64::MAX - 1);
        let vms = (0..setup.vms).filter_map(|index| {
            let later = random.between(0.0, setup.minutes as f64) as usize;
            Some((Arc::clone(profiles.get(index % profiles.len().max(1))?), later))
        });
        Self { vms: vms.collect() }
    }

    fn used(&self, vm: usize, minute: usize) -> u64 {
        self.vms.get(vm).map_or(0, |(profile, later)| {
            profile.used.get((minute + later) % profile.used.len().max(1)).copied().unwrap_or(0)
        })
    }
}

impl Profile {
    fn new(setup: &Setup, index: usize) -> Self {
        let seconds = setup.minutes as u64 * MINUTE;
        let series = trace::one(Kind::Mixed, setup.seed, index, seconds);
        let minutes = series.demand.chunks(MINUTE as usize).take(setup.minutes);
        Self {
            min: series.limits.min().0 / MIB,
            max: series.limits.max().0 / MIB,
            used: minutes.map(|minute| minute.iter().map(|used| used.0 / MIB).max().unwrap_or(0)).collect(),
        }
    }
}

/// How the cluster stood in one minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Minute {
    /// VMs that run.
    pub running: usize,
    /// VMs that no host may take.
    pub waiting: usize,
    /// VMs on hosts whose guests use more than the host has for them.
    pub short: usize,
}

/// What came of a day.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// By what was counted.
    pub counting: Counting,
    /// VMs that run at the end.
    pub placed: usize,
    /// The time that VMs spent on hosts whose guests used more than there was, in percent of all.
    pub short_percent: f64,
    /// Times that a running VM was moved from a host that was not lost.
    pub moves: usize,
    /// VMs whose host was lost.
    pub lost: usize,
    /// Of these, those that ran elsewhere at once.
    pub recovered: usize,
    /// Capacity that no VM has while VMs wait, in percent of all, as a mean over the minutes in which some wait.
    pub stranded_percent: f64,
    /// Memory that guests use, in percent of what hosts have for them, as a mean.
    pub used_percent: f64,
    /// Each minute.
    pub minutes: Vec<Minute>,
}

/// One host's own side.
#[derive(Clone, Debug, Default)]
struct Own {
    memory: Memory,
    state: HostState,
    /// Minutes until it is back.
    gone: usize,
}

/// Runs the day. None where `stop` says so.
pub fn run(setup: &Setup, counting: Counting, demand: &Demand, stop: &dyn Fn() -> bool) -> Option<Outcome> {
    let budget = setup.budget.0 / MIB;
    let mut hosts = vec![Host { capacity: budget, is_online: true, refuses: false }; setup.hosts];
    let mut owns = vec![Own::default(); setup.hosts];
    let mut vms: Vec<Vm> = Vec::with_capacity(setup.vms);
    let mut outcome = Outcome::new(counting);
    let mut losses = Losses::new(setup);
    let mut sums = Sums::default();
    for minute in 0..setup.minutes {
        if stop() {
            return None;
        }
        losses.step(minute, &mut hosts, &mut owns);
        let lost: Vec<usize> =
            (0..vms.len()).filter(|vm| vms[*vm].host.is_some_and(|host| !hosts[host].is_online)).collect();
        lost.iter().for_each(|vm| vms[*vm].host = None);
        let arrived = setup.vms * (minute + 1) * 4 / setup.minutes;
        while vms.len() < arrived.min(setup.vms) {
            let (profile, _) = &demand.vms[vms.len()];
            let weight = if counting == Counting::Sizes { profile.max } else { profile.min };
            vms.push(Vm { weight, host: None });
        }
        let placed = place(&hosts, &vms);
        for (vm, next) in vms.iter_mut().zip(placed) {
            outcome.moves += usize::from(vm.host.is_some() && vm.host != next);
            vm.host = next;
        }
        outcome.lost += lost.len();
        outcome.recovered += lost.iter().filter(|vm| vms[**vm].host.is_some()).count();
        let loads = loads(&vms, demand, minute, setup.hosts);
        outcome.minutes.push(sums.add(&hosts, &vms, &loads, budget));
        if counting == Counting::Pressure {
            for ((host, own), load) in
                hosts.iter_mut().zip(&mut owns).zip(&loads).filter(|((host, _), _)| host.is_online)
            {
                own.tell(host, load, budget, minute);
            }
        }
    }
    outcome.finish(&sums);
    Some(outcome)
}

/// What the VMs of one host are, in MiB.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    vms: usize,
    /// What the cluster counts.
    weight: u64,
    floors: u64,
    /// Use with its buffer, and a floor at least.
    wanted: u64,
    used: u64,
}

fn loads(vms: &[Vm], demand: &Demand, minute: usize, hosts: usize) -> Vec<Load> {
    let mut loads = vec![Load::default(); hosts];
    for (index, vm) in vms.iter().enumerate() {
        let Some(load) = vm.host.and_then(|host| loads.get_mut(host)) else { continue };
        let (profile, used) = (&demand.vms[index].0, demand.used(index, minute));
        load.vms += 1;
        load.weight += vm.weight;
        load.floors += profile.min;
        load.wanted += (used + used / 5).clamp(profile.min, profile.max);
        load.used += used.min(profile.max);
    }
    loads
}

impl Own {
    /// What ocf:ballast:node does, once a minute.
    fn tell(&mut self, host: &mut Host, load: &Load, budget: u64, minute: usize) {
        let free = Bytes::mib(budget.saturating_sub(load.wanted));
        self.state =
            self.state.next(free, Bytes::mib(budget).percent(POOL_PERCENT), &HostObservation::default());
        let sample = Sample {
            budget,
            floors: load.floors,
            wanted: load.wanted.saturating_sub(load.floors),
            pressure: pressure(self.state),
        };
        let before = self.memory.told;
        let mut told = self.memory.look(Duration::from_secs(minute as u64 * MINUTE), sample, HOLD);
        if told.capacity != before.capacity {
            told.capacity = told.capacity.map(|capacity| above_placed(capacity, budget, load.weight));
        }
        self.memory.was_told(told);
        let Told { capacity, pressure, .. } = told;
        host.capacity = capacity.unwrap_or(host.capacity);
        host.refuses = pressure.is_none_or(|pressure| pressure > PRESSURE_LIMIT);
    }
}

/// Which hosts are lost, and when.
struct Losses {
    at: Vec<(usize, usize)>,
}

impl Losses {
    fn new(setup: &Setup) -> Self {
        let mut random = Random::new(setup.seed, u64::MAX - 2);
        // Once all VMs are there.
        let from = setup.minutes as f64 / 4.0;
        let at = (0..setup.losses).map(|_| {
            let minute = random.between(from, setup.minutes as f64) as usize;
            (minute, random.between(0.0, setup.hosts as f64) as usize)
        });
        Self { at: at.collect() }
    }

    fn step(&mut self, minute: usize, hosts: &mut [Host], owns: &mut [Own]) {
        for (host, own) in hosts.iter_mut().zip(owns.iter_mut()).filter(|(host, _)| !host.is_online) {
            own.gone -= 1;
            host.is_online = own.gone == 0;
        }
        for (_, index) in self.at.iter().filter(|(at, _)| *at == minute) {
            if let (Some(host), Some(own)) = (hosts.get_mut(*index), owns.get_mut(*index)) {
                host.is_online = false;
                *own = Own { gone: REPAIR, ..Own::default() };
            }
        }
    }
}

/// What means are made of.
#[derive(Default)]
struct Sums {
    vm_minutes: u64,
    short: u64,
    stranded: f64,
    with_waiting: u64,
    used: f64,
    minutes: u64,
}

impl Sums {
    fn add(&mut self, hosts: &[Host], vms: &[Vm], loads: &[Load], budget: u64) -> Minute {
        let running = vms.iter().filter(|vm| vm.host.is_some()).count();
        let short = loads.iter().filter(|load| load.used > budget).map(|load| load.vms).sum();
        let minute = Minute { running, waiting: vms.len() - running, short };
        let online = hosts.iter().zip(loads).filter(|(host, _)| host.is_online);
        let (mut capacity, mut left, mut used, mut all) = (0, 0, 0, 0);
        for (host, load) in online {
            capacity += host.capacity;
            left += host.capacity.saturating_sub(load.weight);
            used += load.used.min(budget);
            all += budget;
        }
        self.vm_minutes += running as u64;
        self.short += short as u64;
        self.minutes += 1;
        self.used += used as f64 / all.max(1) as f64;
        if minute.waiting > 0 {
            self.with_waiting += 1;
            self.stranded += left as f64 / capacity.max(1) as f64;
        }
        minute
    }
}

impl Outcome {
    fn new(counting: Counting) -> Self {
        Self {
            counting,
            placed: 0,
            short_percent: 0.0,
            moves: 0,
            lost: 0,
            recovered: 0,
            stranded_percent: 0.0,
            used_percent: 0.0,
            minutes: Vec::new(),
        }
    }

    fn finish(&mut self, sums: &Sums) {
        self.placed = self.minutes.last().map_or(0, |minute| minute.running);
        self.short_percent = sums.short as f64 * 100.0 / sums.vm_minutes.max(1) as f64;
        self.stranded_percent = sums.stranded * 100.0 / sums.with_waiting.max(1) as f64;
        self.used_percent = sums.used * 100.0 / sums.minutes.max(1) as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETUP: Setup =
        Setup { hosts: 20, vms: 800, budget: Bytes::gib(126), minutes: 240, losses: 2, seed: 201 };

    fn outcome(counting: Counting) -> Outcome {
        run(&SETUP, counting, &Demand::generate(&SETUP), &|| false).unwrap()
    }

    #[test]
    fn floors_place_more_than_sizes_and_nobody_is_moved() {
        let [sizes, floors, pressure] = Counting::ALL.map(outcome);
        // Nobody is short where each VM has all that it may ever want, and so nobody else fits.
        assert_eq!(sizes.short_percent, 0.0);
        assert!(sizes.placed * 2 < floors.placed, "{} and {}", sizes.placed, floors.placed);
        assert!(pressure.placed >= sizes.placed, "{} and {}", sizes.placed, pressure.placed);
        assert!(sizes.lost > 0 && floors.lost > sizes.lost);
        assert_eq!(floors.recovered, floors.lost);
        for outcome in [&sizes, &floors, &pressure] {
            assert_eq!(outcome.moves, 0, "{outcome:?}");
        }
    }

    #[test]
    fn a_day_is_the_same_each_time_and_can_be_stopped() {
        assert_eq!(outcome(Counting::Pressure), outcome(Counting::Pressure));
        assert_eq!(run(&SETUP, Counting::Sizes, &Demand::generate(&SETUP), &|| true), None);
    }
}
