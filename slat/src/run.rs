//! Runs many setups in turn, round about, and makes figures of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use balloon::units::Bytes;
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::figure::{Figure, Quality, Spread};
use crate::host::{self, Fingerprint, KernelMemory};
use crate::linux::Workload;
use crate::linux::density::Density;
use crate::payload::machine::{Failure, Machine, Round};
use crate::payload::memory::Backing;
use crate::payload::{Between, Payload, Place, Setup, native};
use crate::probe::{self, Probe, Verdict};
use crate::walk::PageSize;

/// Version of the JSON that a run is written in.
pub const SCHEMA: u32 = 2;

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
    /// KVM's statistics of the vCPUs in the middle round, those that are not zero.
    pub counts: BTreeMap<String, u64>,
    /// KVM's statistics of the machine at the end of that round, those that are not zero.
    pub machine: BTreeMap<String, u64>,
    /// Why it could not be measured, or not to the end.
    pub failure: Option<String>,
    /// Whether the watchdog had to stop it.
    #[serde(default)]
    pub hung: bool,
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
    /// Workloads of a Linux guest, in the lab.
    #[serde(default)]
    pub linux: Vec<Workload>,
    /// Why there are none, where they were asked for.
    #[serde(default)]
    pub linux_failure: Option<String>,
    /// How many sessions the host bore, in the lab.
    #[serde(default)]
    pub density: Option<Density>,
}

/// Size of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// One setup of each payload.
    Quick,
    /// And what the lab can tell: series that count, none that only time.
    Lab,
    /// Churn and faults on 1 to N vCPUs alone.
    Scaling,
    /// What KVM's memory for a guest depends on, alone.
    Memory,
    /// Nothing but Linux guests.
    Guests,
    /// All of it.
    Full,
}

/// The setups of a plan, none of which needs more than `memory`, on a host of `cpus`.
pub fn setups(extent: Extent, memory: Bytes, cpus: u64) -> Vec<Setup> {
    let mut setups = Vec::new();
    let scale = || scaling(cpus);
    match extent {
        Extent::Scaling => return scale().collect(),
        Extent::Memory => {
            return memory_series().filter(|s| touched(s) <= memory.0 / 4).collect();
        }
        Extent::Guests => return Vec::new(),
        Extent::Quick | Extent::Lab | Extent::Full => {}
    }
    for payload in Payload::ALL {
        let usual = Setup::usual(payload);
        if payload == Payload::Laps {
            // It tells nothing but time.
            continue;
        }
        if payload.runs_natively() {
            setups.push(usual.clone().at(Place::Native));
            setups.push(usual.clone().at(Place::Ring3));
        }
        setups.push(usual.at(Place::Ring0));
    }
    if matches!(extent, Extent::Lab | Extent::Full) {
        setups.extend(counting());
    }
    if extent == Extent::Full {
        setups.extend(timing());
        setups.extend(scale().filter(|s| s.vcpus > 1));
    }
    setups.retain(|s| touched(s) <= memory.0 / 4);
    setups
}

/// Bytes of host memory that a setup really takes.
fn touched(setup: &Setup) -> u64 {
    let data = setup.data.0.saturating_mul(setup.vcpus);
    let stores = setup.operations.saturating_mul(PageSize::Size4K.bytes());
    if setup.present || setup.backing != Backing::Small { data } else { data.min(stores) }
}

/// Series whose counts and memory say something.
fn counting() -> Vec<Setup> {
    let usual = Setup::usual;
    let cold = |place| usual(Payload::ColdTouch).at(place);
    let mut setups = Vec::new();
    for place in [Place::Native, Place::Ring3] {
        setups.push(Setup { present: false, ..cold(place) });
    }
    for backing in [Backing::Transparent, Backing::Hugetlb2M] {
        setups.push(Setup { backing, ..cold(Place::Ring0) });
    }
    for roots in [1, 8, 64] {
        setups.push(Setup { roots, ..usual(Payload::Cr3Reload) });
    }
    // One of the spaces is the payload's usual setup.
    setups.extend(memory_series().filter(|s| *s != usual(Payload::Spaces)));
    setups
}

/// What KVM keeps for a guest: by its size, and by its address spaces.
fn memory_series() -> impl Iterator<Item = Setup> {
    SPACES.into_iter().map(spaces).chain([untouched()])
}

/// Numbers of address spaces in the series.
pub const SPACES: [u64; 5] = [1, 4, 16, 32, 64];

/// Every page of 32 MiB through each of `roots` address spaces.
pub fn spaces(roots: u64) -> Setup {
    Setup { roots, operations: roots * 8192, ..Setup::usual(Payload::Spaces) }
}

/// A guest of 512 MiB that touches next to none of it: what KVM sets aside for the memory alone.
pub fn untouched() -> Setup {
    let setup = Setup::usual(Payload::ColdTouch).at(Place::Ring0);
    Setup { data: Bytes::mib(512), present: false, operations: 512, ..setup }
}

/// Series whose times say something: a guest's ring 3, which every kind of host runs as it is, beside native.
fn timing() -> Vec<Setup> {
    let chase = |place| Setup::usual(Payload::Chase).at(place);
    let mut setups = Vec::new();
    for place in [Place::Native, Place::Ring3] {
        for mib in CHASE_MIB {
            setups.push(Setup { data: Bytes::mib(mib), ..chase(place) });
        }
        for backing in [Backing::Transparent, Backing::Hugetlb2M] {
            setups.push(Setup { backing, data: Bytes::mib(64), ..chase(place) });
        }
    }
    for backing in [Backing::Small, Backing::Transparent, Backing::Hugetlb2M, Backing::Hugetlb1G] {
        let data = Bytes::mib(if backing == Backing::Hugetlb1G { 1024 } else { 64 });
        setups.push(Setup { guest_page: PageSize::Size2M, backing, data, ..chase(Place::Ring3) });
    }
    setups.extend(Between::ALL.map(|between| Setup { between, ..Setup::usual(Payload::Laps) }));
    setups
}

/// Working sets of the pointer chase in the timing series.
const CHASE_MIB: [u64; 8] = [2, 4, 8, 32, 64, 128, 256, 1024];

/// Work on page tables by more and more vCPUs of one machine.
fn scaling(cpus: u64) -> impl Iterator<Item = Setup> {
    let counts = [1, 2, 4, 8, 16].into_iter().filter(move |n| *n <= cpus.max(1));
    counts.flat_map(|vcpus| {
        [Payload::Churn, Payload::DemandFault].map(|payload| Setup { vcpus, ..Setup::usual(payload) })
    })
}

fn measure(
    kvm: Result<&Kvm, &String>,
    plan: &Plan,
    setup: &Setup,
    stop: &AtomicBool,
) -> Result<Vec<Round>, Failure> {
    let rounds = if setup.payload.once() { 1 } else { plan.rounds };
    if setup.place == Place::Native {
        return native::run(setup, rounds);
    }
    let kvm = kvm.map_err(|why| Failure::NoKvm(why.clone()))?;
    Machine::new(kvm, setup)?.run(rounds, plan.limit, stop)
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
    let measurements = plan
        .setups
        .iter()
        .zip(rounds.iter().zip(failures))
        .map(|(setup, (rounds, failure))| figures(plan.clock, probe.verdict, setup, rounds, failure))
        .collect();
    Run {
        schema: SCHEMA,
        fingerprint: host::fingerprint(),
        probe,
        clock: plan.clock,
        interrupted: stop.load(Ordering::SeqCst),
        measurements,
        linux: Vec::new(),
        linux_failure: None,
        density: None,
    }
}

fn figures(
    clock: Clock,
    verdict: Verdict,
    setup: &Setup,
    rounds: &[Round],
    failure: Option<Failure>,
) -> Measurement {
    let hung = matches!(failure, Some(Failure::Hung(_)));
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
        counts: nonzero(middle.map(|r| &r.vcpus)),
        machine: nonzero(middle.map(|r| &r.vm)),
        failure,
        hung,
    }
}

/// A spread for people: the median, and the ends where they differ.
fn spread(value: Spread) -> String {
    use crate::figure::short;
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

    /// Rows for a table: setup, exits, time, quality of the time, tables.
    pub fn rows(&self) -> Vec<[String; 5]> {
        let row = |m: &Measurement| {
            [
                m.setup.describe(),
                cell(&m.exits),
                cell(&m.time),
                m.time.quality.name().to_owned(),
                m.failure.clone().unwrap_or_default(),
            ]
        };
        self.measurements.iter().map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static GO_ON: AtomicBool = AtomicBool::new(false);

    fn plan(setups: Vec<Setup>) -> Plan {
        Plan { setups, passes: 2, rounds: 2, limit: Duration::from_secs(30), clock: Clock::Time }
    }

    #[test]
    fn a_native_run_has_time_and_no_exits() {
        let setup = Setup::usual(Payload::Chase).at(Place::Native);
        let run = run(&plan(vec![setup.clone()]), &GO_ON, |_, _| {});
        let found = run.find(&setup).expect("measured");
        assert_eq!(found.time.value.map(|v| v.samples), Some(4));
        assert_eq!(found.exits.quality, Quality::NotAvailable);
        let json = serde_json::to_string(&run).expect("JSON");
        let read: Run = serde_json::from_str(&json).expect("the same");
        assert_eq!((&read.fingerprint, &read.probe), (&run.fingerprint, &run.probe));
        assert_eq!(read.find(&setup).map(|m| &m.exits), Some(&found.exits));
    }

    #[test]
    fn a_stopped_run_keeps_its_shape_and_says_so() {
        let stop = AtomicBool::new(true);
        let run = run(&plan(setups(Extent::Full, Bytes::gib(64), 4)), &stop, |_, _| panic!("nothing runs"));
        assert!(run.interrupted);
        assert!(run.measurements.iter().all(|m| m.time.value.is_none() && m.time.why.is_some()));
    }

    #[test]
    fn plans_fit_the_host_and_repeat_nothing() {
        for extent in [Extent::Quick, Extent::Lab, Extent::Scaling, Extent::Memory, Extent::Full] {
            let mut all = setups(extent, Bytes::gib(64), 8);
            let count = all.len();
            assert!(all.iter().all(|s| s.place != Place::Native || s.payload.runs_natively()));
            all.sort();
            all.dedup();
            assert_eq!(all.len(), count);
            let small = setups(extent, Bytes::mib(64), 1);
            assert!(small.iter().all(|s| touched(s) <= 16 << 20), "{small:?}");
        }
    }

    #[test]
    fn emulated_time_is_never_called_real() {
        use Verdict::*;
        assert_eq!(Clock::Time.quality(Place::Ring0, EmulatedRing0), Quality::DirectionOnly);
        assert_eq!(Clock::Time.quality(Place::Ring3, EmulatedRing0), Quality::RealTime);
        assert_eq!(Clock::Emulated.quality(Place::Native, Slat), Quality::DirectionOnly);
        assert_eq!(Clock::Instructions.quality(Place::Ring0, Slat), Quality::Exact);
    }
}
