//! C9: what tags in the TLB spare.

use super::{Found, Material, Outcome};
use crate::figure::{Comparison, Figure, compare, short};
use crate::lab::Findings;
use crate::payload::{Between, Payload, Setup};
use crate::run::{Measurement, Run};

/// What laps cost more for what comes between them, as evidence of a flush.
fn flush(without: &Figure, with: &Figure) -> Outcome {
    match compare(without, with) {
        Comparison::NoDifference | Comparison::Smaller => Outcome::Holds,
        Comparison::Times(n) if n < 1.1 => Outcome::Holds,
        Comparison::Times(n) if n < 2.0 => Outcome::Partly,
        _ => Outcome::Fails,
    }
}

pub(super) fn switches(run: &Run) -> Option<Found> {
    let lap = |between| run.find(&Setup { between, ..Setup::usual(Payload::Laps) });
    let laps: Vec<_> = Between::ALL.into_iter().filter_map(lap).collect();
    let [nothing, exit, page, set] = laps.as_slice() else { return None };
    let tell = |lap: &&Measurement| {
        let each = lap.ticks.median()? / lap.setup.links() as f64;
        Some(format!("{} {}", lap.setup.between.name(), short(each)))
    };
    let list: Vec<_> = laps.iter().map(tell).collect::<Option<_>>()?;
    let text = format!("Ticks a load in laps over 4 MiB: {}.", list.join(", "));
    if let Some(why) = run.refusal() {
        return Some((Outcome::NotMeasured, format!("{text} Says nothing of SLAT: {why}.")));
    }
    // Where each exit flushes, another VM's turn costs no more than an exit: that must be looked at first.
    let (outcome, why) = match (flush(&nothing.ticks, &exit.ticks), flush(&exit.ticks, &page.ticks)) {
        (Outcome::Fails, _) => {
            (Outcome::Fails, "Each exit costs as much as a flush, another VM's turn or not")
        }
        (_, Outcome::Fails) => {
            (Outcome::Fails, "Another VM's turn costs as much as a flush, however few its pages")
        }
        (Outcome::Holds, Outcome::Holds) => (Outcome::Holds, "Neither an exit nor another VM's turn flushes"),
        _ => (Outcome::Partly, "Something is lost between laps, but less than a flush takes"),
    };
    let shared = match (outcome, flush(&page.ticks, &set.ticks)) {
        (Outcome::Fails, _) => "",
        (_, Outcome::Holds) => "; it has room for both VMs' sets",
        _ => "; the VMs share its entries, and another's set takes some of them",
    };
    Some((outcome, format!("{text} {why}{shared}.")))
}

/// A host's times, and what the lab counts beside them. The times alone judge: KVM's count is of what it asks for.
pub(super) fn tags(material: Material<'_>) -> Option<Found> {
    match (material.here.and_then(switches), material.of_lab(flushes)) {
        (Some((Outcome::NotMeasured, text)), Some((_, counted))) => {
            Some((Outcome::Partly, format!("{counted} {text}")))
        }
        (Some((outcome, text)), Some((_, counted))) => Some((outcome, format!("{text} {counted}"))),
        (timed, counted) => timed.or(counted),
    }
}

/// How often KVM has the TLB flushed in a lap, by what lies between laps.
pub(super) fn flushes(lab: &Findings) -> Option<Found> {
    let list = |run: &Run, of: &dyn Fn(&Measurement) -> Option<f64>| {
        let lap = |between: Between| {
            let setup = Setup { between, ..Setup::usual(Payload::Laps) };
            Some(format!("{} {}", between.name(), short(of(run.find(&setup)?)?)))
        };
        Some(Between::ALL.into_iter().map(lap).collect::<Option<Vec<_>>>()?.join(", "))
    };
    let asked = |m: &Measurement| {
        let count = m.counts.get("tlb_flush").copied().unwrap_or(0);
        m.exits.value.map(|_| count as f64 / m.setup.operations as f64)
    };
    let tagged = lab.switches.as_ref()?;
    let mut text = format!(
        "Flushes that KVM asks for in a lap, with tags in the TLB (exact): {}.",
        list(tagged, &asked)?
    );
    if let Some(exits) = lab.untagged.as_ref().and_then(|run| list(run, &|m| m.exits.median())) {
        text += &format!(
            " Without tags (vpid=0) the processor flushes at each exit and at each entry, and in a lap there are of \
             either: {exits}."
        );
    }
    let other = Setup { between: Between::OtherPage, ..Setup::usual(Payload::Laps) };
    let spared = tagged.find(&other).and_then(asked)? < 0.5;
    Some((if spared { Outcome::Partly } else { Outcome::Fails }, text))
}
