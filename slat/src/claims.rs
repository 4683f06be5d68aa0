//! What the texts claim about SLAT, each against what was measured.

mod material;
mod misses;
mod tags;

use serde::Serialize;

use crate::figure::{Comparison, Figure, compare, short};
use crate::lab::{Findings, Pair};
use crate::linux::density::{Density, LATEST};
use crate::payload::memory::Backing;
use crate::payload::{Payload, Place, Setup};
use crate::probe::Verdict;
use crate::run::{Measurement, Run, spaces, untouched};
use api::units::Bytes;
pub use material::{Material, slat_of};
use misses::walks;
use tags::tags;

/// What came of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The figures agree with it.
    Holds,
    /// The figures contradict it.
    Fails,
    /// The figures show part of it, or its direction.
    Partly,
    /// It was computed, not measured.
    Model,
    /// Nothing was measured.
    NotMeasured,
}

impl Outcome {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Holds => "holds here",
            Self::Fails => "does not hold here",
            Self::Partly => "in part",
            Self::Model => "by the model",
            Self::NotMeasured => "not measured here",
        }
    }
}

/// A claim and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Claim {
    /// `C1` to `C11`, `D1` and `D2`.
    pub id: &'static str,
    /// What is claimed.
    pub claim: &'static str,
    /// What came of it.
    pub outcome: Outcome,
    /// The figures, or nothing.
    pub measured: String,
    /// What a fuller answer would need.
    pub needs: &'static str,
}

const TEXTS: [(&str, &str, &str); 13] = [
    (
        "C1",
        "With SLAT the hypervisor no longer intervenes when a guest works on its page tables",
        "`ballast slat lab`",
    ),
    (
        "C2",
        "The hypervisor's share of the CPU falls from about 10 % to about 2 %",
        "a real host with SLAT on and off for a share of time: the lab counts instructions",
    ),
    (
        "C3",
        "About 1 MB less host memory for each VM",
        "`ballast slat lab`; a VM of the size and age of those that the text has in mind",
    ),
    (
        "C4",
        "1.6 to 2.5 times as many sessions on a host",
        "`ballast slat lab --density`; for time, a real host with SLAT on and off and sessions of one's own",
    ),
    (
        "C5",
        "Up to 23 % faster (AMD); 42 to 48 % on MMU-heavy work, 500 to 600 % on microbenchmarks (VMware)",
        "`ballast slat run --set full` on one real host with SLAT on and off, then `ballast slat compare`",
    ),
    (
        "C6",
        "A TLB miss costs 16 or 20 memory references, where it cost 4",
        "a processor's counters of walk cycles (a PMU, on a real host) to measure it",
    ),
    (
        "C7",
        "On TLB misses the performance hit becomes a catastrophe; larger pages help",
        "`ballast slat run --set full` on a real host with SLAT",
    ),
    (
        "C8",
        "The gain grows with the number of vCPUs",
        "a real host with SLAT on and off: emulated CPUs take turns, and never wait for each other",
    ),
    (
        "C9",
        "A tagged TLB (ASID, VPID) spares the flush at each switch between VMs",
        "`ballast slat run --set full` on a real host with SLAT",
    ),
    ("C10", "Test on your own platform before you deploy", "`ballast slat run --set full` on that platform"),
    ("C11", "Not in the texts: SLAT is not always fewer exits", "`ballast slat lab`"),
    (
        "D1",
        "Dynamic memory spares the administrator exact sizes: the host's memory goes to the VMs that use it",
        "`make demo` for three guests that share one host, `ballast sim --compare` for more VMs on a host than \
         static sizes allow; both measure the balancer, not SLAT",
    ),
    (
        "D2",
        "Memory can be taken from and given to a running VM with stock drivers",
        "`make test`, which does both to stock Debian guests; it has nothing to do with SLAT",
    ),
];

/// The operations of C1, in the order in which they are told.
pub const PAGE_TABLE_WORK: [Payload; 6] = [
    Payload::Invlpg,
    Payload::PteWrite,
    Payload::Churn,
    Payload::DemandFault,
    Payload::MmapBatch,
    Payload::Cr3Reload,
];

/// Every claim against the material.
pub fn claims(material: Material<'_>) -> Vec<Claim> {
    TEXTS
        .iter()
        .map(|(id, claim, needs)| {
            let found = match *id {
                "C1" => material.of_lab(|l| exits(&l.counted)),
                "C2" => material.of_lab(|l| instructions(&l.counted)),
                "C3" => material.of_lab(memory),
                "C4" => material.of_lab(|l| density(l.density.as_ref()?)),
                "C6" => Some(walks(material)),
                "C7" => material.here.and_then(chase),
                "C8" => material.of_lab(|l| scaling(l.scaling.as_ref()?)),
                "C9" => tags(material),
                "C10" => Some(tested(material)),
                "C11" => material.of_lab(|l| cold(&l.counted)),
                _ => None,
            };
            let (outcome, measured) = found.unwrap_or((Outcome::NotMeasured, String::new()));
            Claim { id, claim, outcome, measured, needs }
        })
        .collect()
}

type Found = (Outcome, String);

/// The same setup with SLAT on and off.
pub fn both<'a>(pair: &'a Pair, setup: &Setup) -> Option<(&'a Measurement, &'a Measurement)> {
    Some((pair.on.find(setup)?, pair.off.find(setup)?))
}

fn medians(pair: &Pair, setup: &Setup, of: fn(&Measurement) -> &Figure) -> Option<(f64, f64)> {
    let (on, off) = both(pair, setup)?;
    Some((of(on).median()?, of(off).median()?))
}

fn exits(pair: &Pair) -> Option<Found> {
    let found: Vec<_> = PAGE_TABLE_WORK
        .iter()
        .filter_map(|p| Some((p, medians(pair, &Setup::usual(*p), |m| &m.exits)?)))
        .collect();
    if found.is_empty() {
        return None;
    }
    let guest: Vec<_> = pair
        .workloads()
        .filter_map(|(on, off)| Some(format!("{} {} / {}", on.name, short(on.exits?), short(off.exits?))))
        .collect();
    let spared = |(_, (on, off)): &(_, (f64, f64))| on < off;
    let holds = found.iter().all(|(_, (on, off))| *on < 0.01 && *off >= 0.5);
    let list: Vec<_> =
        found.iter().map(|(p, (on, off))| format!("{p} {} / {}", short(*on), short(*off))).collect();
    let outcome = match (found.len() == PAGE_TABLE_WORK.len(), found.iter().any(spared)) {
        (true, _) if holds => Outcome::Holds,
        (_, true) => Outcome::Partly,
        (_, false) => Outcome::Fails,
    };
    let mut text = format!("Exits an operation, SLAT on / off (exact): {}.", list.join(", "));
    if !guest.is_empty() {
        text += &format!(" In a Linux guest: {}.", guest.join(", "));
    }
    Some((outcome, text))
}

/// Instructions that something takes more with SLAT off, in percent of all with SLAT on.
fn percent((on, off): (f64, f64)) -> String {
    // Rounded first: nobody wants to read "-0.0".
    let rounded = ((off / on.max(f64::MIN_POSITIVE) - 1.0) * 1000.0).round() / 10.0 + 0.0;
    format!("{rounded:+.1} %")
}

fn instructions(pair: &Pair) -> Option<Found> {
    let setup = |payload| Setup::usual(payload).at(Place::Ring3);
    let chase = medians(pair, &setup(Payload::Chase), |m| &m.time)?;
    let fault = medians(pair, &Setup::usual(Payload::DemandFault), |m| &m.time)?;
    let mut text = format!(
        "Instructions with SLAT off against on (exact): {} for a pointer chase; a demand fault takes {} instead of {}.",
        percent(chase),
        short(fault.1),
        short(fault.0)
    );
    let guest: Vec<_> =
        pair.workloads().map(|(on, off)| format!("{} {}", on.name, percent((on.ticks, off.ticks)))).collect();
    // A whole boot is the nearest to a share of all work; without one, what page tables take.
    let booted = pair.workloads().find(|(on, _)| on.name == "boot").map(|(on, off)| (on.ticks, off.ticks));
    let (on, off) = booted.unwrap_or(fault);
    text += &match guest.is_empty() {
        true => " No share of a whole guest was measured.".into(),
        false => format!(" In a Linux guest: {}.", guest.join(", ")),
    };
    Some((if on < off { Outcome::Partly } else { Outcome::Fails }, text))
}

fn kib(bytes: f64) -> String {
    format!("{} KiB", short(bytes / 1024.0))
}

/// Guests that answered in time, SLAT on and off.
fn density(pair: &Pair) -> Option<Found> {
    let (on, off) = (pair.on.density.as_ref()?, pair.off.density.as_ref()?);
    let list = |density: &Density| {
        let steps = density.steps.iter().map(|s| format!("{}: {} ms", s.guests, short(s.p95.round())));
        steps.collect::<Vec<_>>().join(", ")
    };
    let text = format!(
        "Sessions that answered within {} ms (19 of 20; half their own work, half the kernel's), SLAT on / off: {} \
         (stopped by {}) / {} (stopped by {}). Slowest twentieth by number of guests, on {}; off {}. One processor \
         on the clock of instructions: exact, and blind to TLBs and caches.",
        LATEST.as_millis(),
        on.sessions,
        on.ended_by,
        off.sessions,
        off.ended_by,
        list(on),
        list(off)
    );
    let outcome = match on.sessions > off.sessions {
        // More may have fitted without.
        true if off.unsettled => Outcome::NotMeasured,
        true => Outcome::Partly,
        false if on.unsettled => Outcome::NotMeasured,
        false => Outcome::Fails,
    };
    Some((outcome, text))
}

/// SLAT's own part, and that of the MMU which KVM has for SLAT alone.
fn memory(lab: &Findings) -> Option<Found> {
    let pair = &lab.counted;
    let (on, off) = medians(pair, &untouched(), |m| &m.vmalloc)?;
    let tables = medians(pair, &spaces(64), |m| &m.tables);
    let mut text = format!(
        "Kernel memory from vmalloc for a VM of 512 MiB that touched 2 MiB of it, SLAT on / off (exact): {} / {}.",
        kib(on),
        kib(off)
    );
    match tables {
        Some((on, off)) => {
            text += &format!(" Tables for 64 address spaces of 32 MiB: {} / {}.", kib(on), kib(off));
        }
        None => text += " The kernel gives no SecPageTables.",
    }
    if let Some((on, off)) = medians(pair, &untouched(), |m| &m.cgroup) {
        text += &format!(" All that its control group was charged: {} / {}.", kib(on), kib(off));
    }
    // With npt=1 KVM also changes to its TDP MMU, which keeps fewer records.
    let old =
        |setup: &Setup, of: fn(&Measurement) -> &Figure| of(lab.old_mmu.as_ref()?.find(setup)?).median();
    if let (Some(vmalloc), Some(tables)) =
        (old(&untouched(), |m| &m.vmalloc), old(&spaces(64), |m| &m.tables))
    {
        text += &format!(
            " With SLAT on and KVM's older MMU (tdp_mmu=0) {} from vmalloc and {} of tables: what lies between is \
             the newer MMU's doing, the rest SLAT's own.",
            kib(vmalloc),
            kib(tables)
        );
    }
    let outcome = if on < off { Outcome::Partly } else { Outcome::Fails };
    Some((outcome, text))
}

/// A pointer chase of the timing series.
pub fn chase_of(data: Bytes, place: Place) -> Setup {
    Setup { data, ..Setup::usual(Payload::Chase).at(place) }
}

fn chase(run: &Run) -> Option<Found> {
    let mut words = Vec::new();
    let mut slower = false;
    for setup in [chase_of(Bytes::mib(16), Place::Ring3), chase_of(Bytes::mib(256), Place::Ring3)] {
        let Some(guest) = run.find(&setup) else { continue };
        let Some(native) = run.find(&setup.clone().at(Place::Native)) else { continue };
        let comparison = compare(&native.time, &guest.time);
        slower |= matches!(comparison, Comparison::Times(n) if n > 1.0);
        let factor = match comparison {
            Comparison::Times(n) => format!("{n:.2} times native"),
            Comparison::NoDifference => "no difference from native".into(),
            Comparison::Larger => "slower than native".into(),
            Comparison::Smaller => "faster than native".into(),
            Comparison::FromZero | Comparison::NotAvailable => continue,
        };
        words.push(format!("over {} {factor}", setup.data));
    }
    if words.is_empty() {
        return None;
    }
    let (outcome, host) = match (run.probe.verdict, run.refusal()) {
        (Verdict::Slat, None) if slower => (Outcome::Partly, "with SLAT, real time"),
        (Verdict::Slat, None) => (Outcome::Fails, "with SLAT, real time"),
        (_, None) => (Outcome::NotMeasured, "over shadow tables, real time: says nothing of SLAT"),
        (Verdict::EmulatedRing0, _) => {
            (Outcome::NotMeasured, "over shadow tables, real time: says nothing of SLAT")
        }
        (_, Some(_)) => (Outcome::NotMeasured, "under an emulator: says nothing of a TLB"),
    };
    Some((outcome, format!("Pointer chase in a guest's ring 3 ({host}): {}.", words.join(", "))))
}

/// vCPUs of the scaling series, with a figure of theirs on and off.
pub fn scaling_points(
    pair: &Pair,
    payload: Payload,
    of: fn(&Measurement) -> &Figure,
) -> Vec<(u64, f64, f64)> {
    (1..=16)
        .filter_map(|vcpus| {
            let setup = Setup { vcpus, ..Setup::usual(payload) };
            medians(pair, &setup, of).map(|(on, off)| (vcpus, on, off))
        })
        .collect()
}

/// Where time says nothing, the exits speak: for the claim where SLAT saves more of them with more vCPUs, and
/// otherwise not at all, as they don't show how long vCPUs wait for each other.
fn scaling(pair: &Pair) -> Option<Found> {
    let of =
        [Payload::Churn, Payload::DemandFault].map(|payload| scaling_points(pair, payload, |m| &m.exits));
    let [churn, fault] = of.each_ref().map(|points| {
        let list =
            points.iter().map(|(vcpus, on, off)| format!("{} / {} at {vcpus}", short(*on), short(*off)));
        list.collect::<Vec<_>>().join(", ")
    });
    let text =
        format!("Exits an operation by vCPUs, SLAT on / off (exact): churn {churn}; demand fault {fault}.");
    if let Some(why) = pair.on.refusal().or(pair.off.refusal()) {
        let ends: Vec<_> = of.iter().filter_map(|points| Some((points.first()?, points.last()?))).collect();
        if ends.iter().all(|(first, last)| first.0 == last.0) {
            return None;
        }
        let saved = |(_, on, off): &(u64, f64, f64)| off - on;
        // A hundredth is the guest's own tables and code.
        let more = ends.iter().any(|(first, last)| saved(last) > saved(first) + 0.01);
        let outcome = if more { Outcome::Partly } else { Outcome::NotMeasured };
        return Some((outcome, format!("{text} No verdict on time: {why}.")));
    }
    let points = scaling_points(pair, Payload::Churn, |m| &m.throughput);
    let [first, .., last] = points.as_slice() else { return None };
    let gain = |(_, on, off): &(u64, f64, f64)| on / off;
    let outcome = if gain(last) > gain(first) { Outcome::Partly } else { Outcome::Fails };
    let gains: Vec<_> = points.iter().map(|p| format!("x{:.2} at {}", gain(p), p.0)).collect();
    Some((outcome, format!("{text} Churn, throughput with SLAT on over off: {}.", gains.join(", "))))
}

fn tested(material: Material<'_>) -> Found {
    let Some(run) = material.here else {
        return (
            Outcome::NotMeasured,
            "Nothing was run on a host of your own; only the lab, or nothing.".into(),
        );
    };
    let count = run.measurements.iter().filter(|m| m.time.value.is_some()).count();
    let host = &run.fingerprint;
    let all = run.measurements.len();
    let text = format!("{count} of {all} setups on {}, Linux {}.", host.processor, host.kernel);
    match run.refusal() {
        _ if count == 0 => (Outcome::NotMeasured, text),
        Some(why) => (Outcome::Partly, format!("{text} No verdict on SLAT's time: {why}.")),
        None if run.interrupted => (Outcome::Partly, format!("{text} It was stopped before its end.")),
        None => (Outcome::Holds, text),
    }
}

fn cold(pair: &Pair) -> Option<Found> {
    let usual = Setup::usual(Payload::ColdTouch).at(Place::Ring0);
    let (on, off) = medians(pair, &usual, |m| &m.exits)?;
    let huge = Setup { backing: Backing::Transparent, ..usual };
    let mut text = format!(
        "First touch of 4K pages that the host already has, exits a page with SLAT on / off (exact): {} / {}",
        short(on),
        short(off)
    );
    if let Some((on, off)) = medians(pair, &huge, |m| &m.exits) {
        text += &format!("; over the host's huge pages {} / {}", short(on), short(off));
    }
    Some((if on > off { Outcome::Holds } else { Outcome::Fails }, text + "."))
}

#[cfg(test)]
mod tests;
