//! Runs many setups in turn, round about, and makes figures of them.

pub mod series;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use api::units::Bytes;
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::counters::pmu::{Pmu, Whose};
use crate::counters::reasons;
use crate::figure::{Figure, Quality, Spread, short};
use crate::host::{self, Fingerprint, KernelMemory};
use crate::lab::walks::Miss;
use crate::linux::Workload;
use crate::linux::density::Density;
use crate::payload::machine::{Failure, Machine, Round};
use crate::payload::{Place, Setup, native};
use crate::probe::{self, Probe, Verdict};

pub use series::{Extent, SPACES, setups, spaces, untouched};

/// Version of the JSON that a run is written in.
pub const SCHEMA: u32 = 3;

/// What the host's clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// Time.
    Time,
    /// Time under an emulator.
    Emulated,
    /// Instructions: one nanosecond is one of them (the deterministic lab).
    Instructions,
}

impl Clock {
    /// How far a duration of this clock can be trusted for code at `place` on such a host.
    fn quality(self, place: Place, verdict: Verdict) -> Quality {
        match (self, place, verdict) {
            (Self::Instructions, ..) => Quality::Exact,
            (Self::Emulated, ..) | (_, Place::Ring0, Verdict::EmulatedRing0) => Quality::DirectionOnly,
            (Self::Time, ..) => Quality::RealTime,
        }
    }

    /// The unit of a duration divided by operations.
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Instructions => "instructions/op",
            Self::Time | Self::Emulated => "ns/op",
        }
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The setups; run in turn, `passes` times over.
    pub setups: Vec<Setup>,
    /// How often each setup gets a new machine.
    pub passes: usize,
    /// Measured rounds in each machine; payloads whose first time counts get one.
    pub rounds: usize,
    /// How long one machine may take.
    pub limit: Duration,
    /// What the clock counts.
    pub clock: Clock,
    /// Whether a last pass, whose times are not told, traces why vCPUs leave.
    pub reasons: bool,
}

/// One setup's figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// What was run.
    pub setup: Setup,
    /// Host clock an operation: nanoseconds, or instructions where the clock counts those.
    pub time: Figure,
    /// Ticks of the guest's (natively the host's) time-stamp counter an operation.
    pub ticks: Figure,
    /// VM exits an operation, without the doorbell's and the host's own interrupts.
    pub exits: Figure,
    /// Operations a second of all vCPUs together.
    pub throughput: Figure,
    /// Kernel memory of page tables that lead to guest memory, in bytes.
    pub tables: Figure,
    /// Kernel memory from vmalloc, in bytes: reverse maps and tracking.
    pub vmalloc: Figure,
    /// All kernel memory that the process's control group was charged for the machine, in bytes.
    pub cgroup: Figure,
    /// Cycles an operation in which the processor was at work on a page walk.
    pub walk_cycles: Figure,
    /// Page walks an operation.
    pub walks: Figure,
    /// How much of the data lies in the host's huge pages, from 0 to 1.
    pub huge_share: Figure,
    /// Exits an operation by reason, of the machine's whole life (warm-up and all), where they were traced.
    pub reasons: BTreeMap<String, f64>,
    /// KVM's statistics of the vCPUs in the middle round, those that are not zero.
    pub counts: BTreeMap<String, u64>,
    /// KVM's statistics of the machine at the end of that round, those that are not zero.
    pub machine: BTreeMap<String, u64>,
    /// Why it could not be measured, or not to the end.
    pub failure: Option<String>,
    /// Whether the watchdog had to stop it.
    #[serde(default)]
    pub hung: bool,
    /// Whether the host lacks what it takes ([`Failure::is_lack`]).
    #[serde(default)]
    pub lack: bool,
}

/// Everything that one call of `ballast slat run` found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The host.
    pub fingerprint: Fingerprint,
    /// What it is.
    pub probe: Probe,
    /// What its clock counts.
    pub clock: Clock,
    /// Whether the user stopped it; what was measured by then is kept.
    pub interrupted: bool,
    /// The figures.
    pub measurements: Vec<Measurement>,
    /// Why exits could not be traced, where that was asked for.
    pub reasons_failure: Option<String>,
    /// Workloads of a Linux guest, in the lab.
    #[serde(default)]
    pub linux: Vec<Workload>,
    /// Why there are none, where they were asked for.
    #[serde(default)]
    pub linux_failure: Option<String>,
    /// How many sessions the host bore, in the lab.
    #[serde(default)]
    pub density: Option<Density>,
    /// What was read in loads that missed the TLB, where the lab's emulator wrote it down.
    #[serde(default)]
    pub misses: Vec<Miss>,
}

fn measure(
    kvm: Result<&Kvm, &String>,
    plan: &Plan,
    setup: &Setup,
    stop: &AtomicBool,
) -> Result<Vec<Round>, Failure> {
    let rounds = if setup.payload.once() { 1 } else { plan.rounds };
    if setup.place == Place::Native {
        return native::run(setup, rounds, plan.limit, stop);
    }
    let kvm = kvm.map_err(|why| Failure::NoKvm(why.clone()))?;
    Machine::new(kvm, setup)?.run(rounds, plan.limit, stop)
}

/// Whether these setups can be run on this host at all, asked before anything runs.
///
/// # Errors
/// A sentence about the first that can't.
pub fn possible(setups: &[Setup]) -> Result<(), String> {
    if setups.is_empty() {
        return Err("nothing to run: no setup of this set has such a payload".into());
    }
    let available = host::available_memory().unwrap_or(Bytes(u64::MAX));
    for setup in setups {
        // What runs natively runs in a guest's ring 3, of the same size.
        let place = if setup.place == Place::Native { Place::Ring3 } else { setup.place };
        setup.clone().at(place).check().map_err(|e| e.to_string())?;
        let touched = Bytes(series::touched(setup));
        if touched > available {
            return Err(format!(
                "{} takes {touched} of memory, and this host has {available} to give: name less with --data",
                setup.describe()
            ));
        }
    }
    Ok(())
}

/// Runs a plan; `progress` hears of each setup before it runs.
///
/// Never fails as a whole: a setup that can't run says so in its measurement.
pub fn run(plan: &Plan, stop: &AtomicBool, mut progress: impl FnMut(usize, &Setup)) -> Run {
    let probe = probe::probe();
    let kvm = probe::open_kvm();
    let mut rounds: Vec<Vec<Round>> = vec![Vec::new(); plan.setups.len()];
    let mut failures: Vec<Option<Failure>> = plan.setups.iter().map(|_| None).collect();
    for pass in 0..plan.passes {
        for (setup, (all, failure)) in plan.setups.iter().zip(rounds.iter_mut().zip(&mut failures)) {
            if failure.is_some() || stop.load(Ordering::SeqCst) {
                continue;
            }
            progress(pass, setup);
            match measure(kvm.as_ref(), plan, setup, stop) {
                Ok(more) => all.extend(more),
                Err(why) => *failure = Some(why),
            }
        }
    }
    // The same for all machines.
    let no_pmu = Pmu::of_this_thread(Whose::Guest).err();
    let host = Circumstances { clock: plan.clock, verdict: probe.verdict, no_pmu: no_pmu.as_deref() };
    let mut measurements: Vec<_> = plan
        .setups
        .iter()
        .zip(rounds.iter().zip(failures))
        .map(|(setup, (rounds, failure))| figures(host, setup, rounds, failure))
        .collect();
    let reasons_failure = match (plan.reasons, kvm.as_ref()) {
        (true, Ok(kvm)) => trace(kvm, plan, stop, &mut measurements).err(),
        (true, Err(why)) => Some(why.clone()),
        (false, _) => None,
    };
    Run {
        schema: SCHEMA,
        fingerprint: host::fingerprint(),
        probe,
        clock: plan.clock,
        interrupted: stop.load(Ordering::SeqCst),
        measurements,
        reasons_failure,
        linux: Vec::new(),
        linux_failure: None,
        density: None,
        misses: Vec::new(),
    }
}

/// One more round of each guest, traced. Stops at the first that can't be.
fn trace(kvm: &Kvm, plan: &Plan, stop: &AtomicBool, measurements: &mut [Measurement]) -> Result<(), String> {
    let guests = |m: &&mut Measurement| m.setup.place != Place::Native && m.failure.is_none();
    for measurement in measurements.iter_mut().filter(guests) {
        if stop.load(Ordering::SeqCst) {
            return Err("stopped before all exits were traced".into());
        }
        let setup = &measurement.setup;
        let trace = reasons::Trace::start().map_err(|e| e.to_string())?;
        let result = Machine::new(kvm, setup).and_then(|m| m.run(1, plan.limit, stop));
        let counts = reasons::read().map_err(|e| e.to_string())?;
        drop(trace);
        result.map_err(|e| format!("{}: {e}", setup.describe()))?;
        let operations = (setup.warm() + setup.operations) as f64 * setup.vcpus as f64;
        let each = |(reason, count): (String, u64)| (reason, count as f64 / operations);
        measurement.reasons = counts.into_iter().map(each).collect();
    }
    Ok(())
}

/// What decides how far figures can be trusted.
#[derive(Clone, Copy)]
struct Circumstances<'a> {
    clock: Clock,
    verdict: Verdict,
    /// Why the processor's counters can't be read.
    no_pmu: Option<&'a str>,
}

fn figures(
    Circumstances { clock, verdict, no_pmu }: Circumstances<'_>,
    setup: &Setup,
    rounds: &[Round],
    failure: Option<Failure>,
) -> Measurement {
    let hung = matches!(failure, Some(Failure::Hung(_)));
    let lack = failure.as_ref().is_some_and(Failure::is_lack);
    let failure = failure.map(|f| f.to_string());
    let each = setup.operations as f64;
    let all = each * setup.vcpus as f64;
    let quality = clock.quality(setup.place, verdict);
    let missing = || match &failure {
        Some(why) => why.clone(),
        None => "not reached before the run was stopped".into(),
    };
    // One sample a round; a figure that lacks one lacks all.
    let figure = |quality: Quality, why: &str, sample: &dyn Fn(&Round) -> Option<f64>| {
        if rounds.is_empty() {
            return Figure::not_available(missing());
        }
        match rounds.iter().map(sample).collect::<Option<Vec<f64>>>() {
            Some(samples) => Figure::new(quality, &samples),
            None => Figure::not_available(why),
        }
    };
    let nanoseconds = |r: &Round| r.elapsed.as_nanos() as f64;
    let guest = setup.place != Place::Native;
    // Emulated ring 0 leaves for reasons of the emulator's own.
    let counted = if verdict == Verdict::EmulatedRing0 { Quality::DirectionOnly } else { Quality::Exact };
    let counted_by_pmu = if clock == Clock::Time { Quality::RealTime } else { Quality::DirectionOnly };
    let kernel = |of: fn(&KernelMemory) -> Option<Bytes>| {
        move |r: &Round| if guest { of(&r.kernel).map(|b| b.0 as f64) } else { None }
    };
    let middle = rounds.get(rounds.len() / 2);
    let nonzero = |counts: Option<&crate::counters::Counts>| {
        let all = counts.into_iter().flat_map(|c| c.0.iter());
        all.filter(|(_, n)| **n > 0).map(|(name, n)| (name.clone(), *n)).collect()
    };
    Measurement {
        setup: setup.clone(),
        time: figure(quality, "", &|r| Some(nanoseconds(r) / each)),
        ticks: figure(quality, "taken in ring 3 and natively only", &|r| Some(r.ticks? as f64 / each)),
        exits: figure(counted, "there is no guest, or KVM counts no exits", &|r| {
            guest.then_some(r.vcpus.exits()? as f64 / all)
        }),
        throughput: figure(quality, "", &|r| Some(all * 1e9 / nanoseconds(r).max(1.0))),
        tables: figure(
            Quality::Exact,
            "there is no guest, or no SecPageTables in /proc/meminfo (Linux 6.1 and later)",
            &kernel(|k| k.tables),
        ),
        vmalloc: figure(Quality::Exact, "there is no guest", &kernel(|k| k.vmalloc)),
        cgroup: figure(
            Quality::Exact,
            "there is no guest, or no control group of its own with a memory controller (cgroup 2)",
            &kernel(|k| k.cgroup),
        ),
        walk_cycles: figure(counted_by_pmu, no_pmu.unwrap_or("this processor has no event for it"), &|r| {
            Some(r.walks.cycles? as f64 / all)
        }),
        walks: figure(counted_by_pmu, no_pmu.unwrap_or("the counters had no turn on the processor"), &|r| {
            Some(r.walks.count? as f64 / all)
        }),
        huge_share: figure(Quality::Exact, "/proc/self/smaps does not tell", &|r| r.huge),
        reasons: BTreeMap::new(),
        counts: nonzero(middle.map(|r| &r.vcpus)),
        machine: nonzero(middle.map(|r| &r.vm)),
        failure,
        hung,
        lack,
    }
}

/// A spread for people: the median, and the ends where they differ.
fn spread(value: Spread) -> String {
    if short(value.low) == short(value.high) {
        return short(value.median);
    }
    format!("{} ({}..{})", short(value.median), short(value.low), short(value.high))
}

/// A figure for people: a dash where it is not available.
pub fn cell(figure: &Figure) -> String {
    figure.value.map_or_else(|| "-".into(), spread)
}

impl Run {
    /// The measurement of exactly this setup.
    pub fn find(&self, setup: &Setup) -> Option<&Measurement> {
        self.measurements.iter().find(|m| m.setup == *setup)
    }

    /// What was to be measured and failed, other than for what this host lacks, or that nothing was measured at
    /// all; `None` where all is well.
    pub fn failed(&self) -> Option<String> {
        let tell = |m: &Measurement| Some(format!("{}: {}", m.setup.describe(), m.failure.as_ref()?));
        let faults: Vec<_> = self.measurements.iter().filter(|m| !m.lack).filter_map(tell).collect();
        if !faults.is_empty() {
            return Some(format!("not all could be measured: {}", faults.join("; ")));
        }
        if self.measurements.iter().any(|m| m.time.value.is_some()) {
            return None;
        }
        let why = self.measurements.iter().find_map(tell);
        Some(format!("nothing was measured: {}", why.unwrap_or_else(|| "nothing was to be".into())))
    }

    /// What the host is and what its figures are worth.
    pub fn heading(&self) -> String {
        let host = &self.fingerprint;
        let mut text =
            format!("{}, Linux {}\n{}\n", host.processor, host.kernel, self.probe.verdict.sentence());
        if let Some(why) = self.refusal() {
            text += &format!("No verdict on SLAT's time: {why}.\n");
        }
        text + &format!("Time is in {}: median (lowest..highest).\n", self.clock.unit())
    }

    /// Why these figures give no verdict on what SLAT costs or saves in time; `None` where they may.
    pub fn refusal(&self) -> Option<&'static str> {
        match (self.clock, self.probe.verdict) {
            (Clock::Emulated, _) => {
                Some("this host is emulated, and an emulator has no TLB of the real kind")
            }
            (Clock::Instructions, _) => {
                Some("the clock counts instructions, which says nothing about TLBs and caches")
            }
            (_, Verdict::EmulatedRing0) => {
                Some("ring 0 is emulated here; ring 3 beside native is real time, over shadow tables")
            }
            (_, Verdict::Unknown) => Some("no guest could be run"),
            (Clock::Time, Verdict::Slat | Verdict::ShadowPaging) => None,
        }
    }

    /// Rows for a table: setup, exits, time, quality of the time, walk cycles, huge pages, note.
    pub fn rows(&self) -> Vec<[String; 7]> {
        let row = |m: &Measurement| {
            let huge = m.huge_share.median().map_or("-".into(), |share| format!("{:.0} %", share * 100.0));
            [
                m.setup.describe(),
                cell(&m.exits),
                cell(&m.time),
                m.time.quality.name().to_owned(),
                cell(&m.walk_cycles),
                huge,
                m.failure.clone().unwrap_or_default(),
            ]
        };
        self.measurements.iter().map(row).collect()
    }

    /// Rows for why guests left: setup, reasons, the most frequent first.
    pub fn reason_rows(&self) -> Vec<[String; 2]> {
        let traced = self.measurements.iter().filter(|m| !m.reasons.is_empty());
        traced.map(|m| [m.setup.describe(), reasons::list(&m.reasons)]).collect()
    }

    /// What could not be had on this host for any of the figures, and why.
    pub fn remarks(&self) -> String {
        let mut text = String::new();
        let cycles = || self.measurements.iter().map(|m| &m.walk_cycles);
        if cycles().all(|figure| figure.value.is_none())
            && let Some(why) = cycles().find_map(|figure| figure.why.as_ref())
        {
            text += &format!("No walk cycles: {why}.\n");
        }
        if let Some(why) = &self.reasons_failure {
            text += &format!("No exit reasons: {why}.\n");
        }
        text
    }
}
