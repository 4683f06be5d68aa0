//! Demand over time, made by seed.
//!
//! A VM is the same in every run of a seed, however many others there are: 20 VMs are the 19 and one more.
//! Its size, base and bursts are drawn from the distributions below; 88 % of bursts are over in two minutes,
//! as published for memory overloads in clouds.

use std::time::Duration;

use api::limits::Limits;
use api::units::Bytes;
use serde::{Deserialize, Serialize};

use super::random::Random;
use super::words::words;

/// Sizes of VMs in MiB, and how often each is met, in percent. A guess at a mixed host.
const SIZES: [(u64, u64); 3] = [(4096, 50), (8192, 35), (16384, 15)];

/// What a VM uses between bursts, as a part of its size. Published traces of business VMs lie lower; a host
/// of those would be too easy.
const BASE: (f64, f64) = (0.15, 0.45);

/// How much of what is left above the base a burst takes.
const BURST: (f64, f64) = (0.3, 0.9);

/// The mean time between two bursts of a VM that bursts, in seconds.
const BURST_EVERY: f64 = 900.0;

/// Length of a burst: log-normal with this median in seconds and this deviation
/// of the logarithm, so that 88 % end within 120 s.
const BURST_LENGTH: (f64, f64) = (45.0, 0.835);

/// How long a burst takes to rise, in seconds: median and deviation of the logarithm.
const BURST_RISE: (f64, f64) = (12.0, 0.7);

/// The fastest that a guest's use grows, in MiB a second.
const FASTEST: f64 = 256.0;

/// Deviation of the noise on use, as a part of the base.
const NOISE: f64 = 0.003;

/// What kind of demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Of each VM one of steady, diurnal, burst and leak, at random.
    Mixed,
    /// The same all the time, with some noise.
    Steady,
    /// Over a day up and down, each VM at its own time.
    Diurnal,
    /// Now and then much more, soon over.
    Burst,
    /// Bursts that meet all VMs at about the same time.
    Peaks,
    /// More and more, until the program is started again.
    Leak,
    /// Half of the VMs start within a minute, some end.
    Storm,
}

words! {
    Kind, UnknownKind: "`{}` is no trace: name a file, or use one of {}",
    Mixed "mixed",
    Steady "steady",
    Diurnal "diurnal",
    Burst "burst",
    Peaks "peaks",
    Leak "leak",
    Storm "storm",
}

/// One VM's demand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// Its limits. `max` is its size.
    pub limits: Limits,
    /// When it starts, in seconds; at 0 it already runs.
    #[serde(default)]
    pub starts: u64,
    /// When it ends, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends: Option<u64>,
    /// What the guest would use if it had enough, in each second, including its kernel and not its caches.
    pub demand: Vec<Bytes>,
    /// Committed memory in percent of use: what the guest promised its programs.
    pub commit_percent: u64,
    /// Page cache that it would keep if it had room.
    pub cache: Bytes,
}

impl Series {
    /// Demand at `now`, on a line between two samples; the last sample stays.
    pub fn at(&self, now: Duration) -> Bytes {
        let second = now.as_secs() as usize;
        let Some(&here) = self.demand.get(second) else {
            return self.demand.last().copied().unwrap_or_default();
        };
        let next = self.demand.get(second + 1).copied().unwrap_or(here);
        let part = u64::from(now.subsec_millis());
        Bytes((here.0 * (1000 - part) + next.0 * part) / 1000)
    }
}

/// The demand of all VMs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    /// Its length in seconds.
    pub seconds: u64,
    /// The VMs.
    pub vms: Vec<Series>,
}

impl Trace {
    /// The trace of this kind and seed: `vms` VMs for `seconds`.
    pub fn generate(kind: Kind, seed: u64, vms: usize, seconds: u64) -> Self {
        let mut common = Random::new(seed, u64::MAX);
        let peaks = bursts(&mut common, seconds, BURST_EVERY);
        let vms = (0..vms).map(|index| generate(kind, seed, index, seconds, &peaks)).collect();
        Self { seconds, vms }
    }
}

/// One VM of a trace of this kind and seed, which is long otherwise.
pub(crate) fn one(kind: Kind, seed: u64, index: usize, seconds: u64) -> Series {
    let mut common = Random::new(seed, u64::MAX);
    let peaks = bursts(&mut common, seconds, BURST_EVERY);
    generate(kind, seed, index, seconds, &peaks)
}

/// One burst: when it begins, in seconds, and its length.
#[derive(Clone, Copy, Debug)]
struct Burst {
    from: f64,
    length: f64,
}

fn bursts(random: &mut Random, seconds: u64, every: f64) -> Vec<Burst> {
    let mut from = 0.0;
    let mut found = Vec::new();
    loop {
        from += random.exponential(every);
        if from >= seconds as f64 {
            return found;
        }
        let length = random.log_normal(BURST_LENGTH.0, BURST_LENGTH.1).clamp(5.0, 1800.0);
        found.push(Burst { from, length });
        from += length;
    }
}

fn generate(kind: Kind, seed: u64, index: usize, seconds: u64, peaks: &[Burst]) -> Series {
    let mut random = Random::new(seed, index as u64);
    let drawn = random.unit() * 100.0;
    let mut below = 0;
    let size = SIZES
        .iter()
        .find(|(_, percent)| {
            below += percent;
            drawn < below as f64
        })
        .map_or(SIZES[0].0, |(size, _)| *size);
    let max = size as f64;
    let base = max * random.between(BASE.0, BASE.1);
    let commit_percent = random.between(105.0, 160.0) as u64;
    let cache = Bytes::mib((max * random.between(0.05, 0.4)) as u64);
    let turn = random.unit();
    let kind = match kind {
        Kind::Mixed if turn < 0.35 => Kind::Steady,
        Kind::Mixed if turn < 0.50 => Kind::Diurnal,
        Kind::Mixed if turn < 0.92 => Kind::Burst,
        Kind::Mixed => Kind::Leak,
        other => other,
    };
    let (mut starts, mut ends) = (0, None);
    let mut demand = match kind {
        Kind::Mixed | Kind::Steady => vec![base; seconds as usize + 1],
        Kind::Diurnal => diurnal(&mut random, base, max, seconds),
        Kind::Burst => {
            let own = bursts(&mut random, seconds, BURST_EVERY);
            raised(&mut random, base, max, seconds, &own)
        }
        Kind::Peaks => {
            let late: Vec<Burst> = peaks
                .iter()
                .map(|peak| Burst { from: peak.from + random.between(0.0, 20.0), ..*peak })
                .collect();
            raised(&mut random, base, max, seconds, &late)
        }
        Kind::Leak => leak(&mut random, base, max, seconds),
        Kind::Storm => {
            if !index.is_multiple_of(2) {
                starts = (seconds / 6) + random.between(0.0, 60.0) as u64;
            }
            if index.is_multiple_of(4) {
                ends = Some((random.between(0.4, 0.9) * seconds as f64) as u64);
            }
            let own = bursts(&mut random, seconds, BURST_EVERY);
            raised(&mut random, base, max, seconds, &own)
        }
    };
    let mut wobble = 0.0;
    let mut before = demand.first().copied().unwrap_or(base);
    for value in &mut demand {
        wobble = 0.98 * wobble + 0.2 * random.normal();
        *value = (*value + base * NOISE * wobble).min(before + FASTEST).clamp(max * 0.05, max * 0.95);
        before = *value;
    }
    let limits = Limits::new(Bytes::mib(size / 2), Bytes::mib(size / 16), Bytes::mib(size), 20, 100)
        .expect("the sizes above are in order, whole pages and above the smallest");
    Series {
        name: format!("vm{index:02}-{}", kind.word()),
        limits,
        starts,
        ends,
        demand: demand.into_iter().map(|mib| Bytes((mib * 1_048_576.0) as u64)).collect(),
        commit_percent,
        cache,
    }
}

fn diurnal(random: &mut Random, base: f64, max: f64, seconds: u64) -> Vec<f64> {
    let high = random.between(0.2, 0.6) * (max - base);
    let phase = random.unit();
    (0..=seconds)
        .map(|second| {
            let day = second as f64 / 86_400.0 + phase;
            base + high * (1.0 - (std::f64::consts::TAU * day).cos()) / 2.0
        })
        .collect()
}

fn raised(random: &mut Random, base: f64, max: f64, seconds: u64, bursts: &[Burst]) -> Vec<f64> {
    let mut demand = vec![base; seconds as usize + 1];
    for burst in bursts {
        let high = random.between(BURST.0, BURST.1) * (max - base);
        let rise = random.log_normal(BURST_RISE.0, BURST_RISE.1).clamp(2.0, burst.length.max(2.0));
        let from = burst.from as usize;
        let fall = 3.0;
        for (second, value) in demand.iter_mut().enumerate().skip(from) {
            let since = second as f64 - burst.from;
            if since > burst.length + fall {
                break;
            }
            let part =
                (since / rise).clamp(0.0, 1.0).min(((burst.length + fall - since) / fall).clamp(0.0, 1.0));
            *value = value.max(base + high * part);
        }
    }
    demand
}

fn leak(random: &mut Random, base: f64, max: f64, seconds: u64) -> Vec<f64> {
    let slope = (max * 0.9 - base) / random.between(3600.0, 6.0 * 3600.0);
    let mut value = base + (max * 0.9 - base) * random.unit();
    (0..=seconds)
        .map(|_| {
            value += slope;
            if value > max * 0.9 {
                value = base;
            }
            value
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_trace_and_more_vms_leave_the_others_as_they_are() {
        for kind in Kind::ALL {
            let few = Trace::generate(kind, 3, 5, 600);
            let many = Trace::generate(kind, 3, 9, 600);
            assert_eq!(few.vms[..], many.vms[..5], "{kind}");
            assert_ne!(few.vms, Trace::generate(kind, 4, 5, 600).vms, "{kind}");
            assert_eq!(kind.word().parse::<Kind>(), Ok(kind));
        }
    }

    #[test]
    fn bursts_are_as_short_as_published() {
        let mut random = Random::new(1, 1);
        let all = bursts(&mut random, 40_000_000, BURST_EVERY);
        let short = all.iter().filter(|burst| burst.length < 120.0).count();
        let percent = short as f64 * 100.0 / all.len() as f64;
        assert!((percent - 88.0).abs() < 1.0, "{percent} % of {} bursts", all.len());
    }

    #[test]
    fn demand_stays_within_the_vm_and_rises_no_faster_than_a_guest_can() {
        for kind in Kind::ALL {
            for vm in &Trace::generate(kind, 11, 12, 3600).vms {
                assert_eq!(vm.demand.len(), 3601);
                for pair in vm.demand.windows(2) {
                    assert!(pair[1] <= vm.limits.max());
                    assert!(pair[1].saturating_sub(pair[0]) <= Bytes::mib(FASTEST as u64 + 1), "{}", vm.name);
                }
            }
        }
    }

    #[test]
    fn peaks_meet_all_at_once_and_a_storm_starts_half() {
        let storm = Trace::generate(Kind::Storm, 2, 20, 3600);
        assert_eq!(storm.vms.iter().filter(|vm| vm.starts > 0).count(), 10);
        let spread = |kind| {
            let trace = Trace::generate(kind, 2, 20, 7200);
            let sums: Vec<u64> = (0..7200).map(|s| trace.vms.iter().map(|vm| vm.demand[s].0).sum()).collect();
            *sums.iter().max().unwrap() as f64 / (sums.iter().sum::<u64>() as f64 / 7200.0)
        };
        assert!(spread(Kind::Peaks) > spread(Kind::Burst) * 1.2);
    }
}
