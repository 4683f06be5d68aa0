//! Each claim must be able to fail: figures that contradict it, and those that do not.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::misses::counted;
use super::tags::{flushes, switches};
use super::*;
use crate::figure::Quality;
use crate::lab::walks::{Entry, Miss, Root};
use crate::payload::Between;
use crate::run::{Clock, Plan, run};
use crate::walk::PageSize;

/// A run of these setups on a host of this kind, in which nothing was measured yet.
fn host(setups: Vec<Setup>, clock: Clock, verdict: Verdict) -> Run {
    let limit = Duration::from_secs(1);
    let plan = Plan { setups, passes: 1, rounds: 1, limit, clock, reasons: false };
    let mut run = run(&plan, &AtomicBool::new(true), |_, _| {});
    run.probe.verdict = verdict;
    run.interrupted = false;
    run
}

fn exact(value: f64) -> Figure {
    Figure::new(Quality::Exact, &[value])
}

fn real(value: f64) -> Figure {
    Figure::new(Quality::RealTime, &[value])
}

/// SLAT on and off in the lab, with these exits an operation.
fn exits_of(figures: &[(Setup, f64, f64)]) -> Pair {
    let one = |of: fn(&(Setup, f64, f64)) -> f64, verdict| {
        let setups = figures.iter().map(|(setup, ..)| setup.clone()).collect();
        let mut run = host(setups, Clock::Emulated, verdict);
        for (measurement, figure) in run.measurements.iter_mut().zip(figures) {
            measurement.exits = exact(of(figure));
            measurement.throughput = Figure::new(Quality::DirectionOnly, &[1.0]);
        }
        run
    };
    Pair { on: one(|f| f.1, Verdict::Slat), off: one(|f| f.2, Verdict::ShadowPaging) }
}

fn outcome(found: Option<Found>) -> Option<Outcome> {
    found.map(|(outcome, _)| outcome)
}

#[test]
fn without_material_only_the_model_speaks() {
    let claims = claims(Material::default());
    assert_eq!(claims.len(), 13);
    for claim in claims {
        let expected = if claim.id == "C6" { Outcome::Model } else { Outcome::NotMeasured };
        assert_eq!(claim.outcome, expected, "{claim:?}");
        assert!(!claim.needs.is_empty());
    }
}

#[test]
fn fewer_exits_take_all_six_kinds_of_work_and_none_fewer_is_a_contradiction() {
    let work = |on, off| PAGE_TABLE_WORK.map(|payload| (Setup::usual(payload), on, off));
    assert_eq!(outcome(exits(&exits_of(&work(0.0, 1.0)))), Some(Outcome::Holds));
    assert_eq!(outcome(exits(&exits_of(&work(0.0, 1.0)[..1]))), Some(Outcome::Partly), "one of six");
    assert_eq!(outcome(exits(&exits_of(&work(0.4, 1.0)))), Some(Outcome::Partly));
    assert_eq!(outcome(exits(&exits_of(&work(1.0, 1.0)))), Some(Outcome::Fails));
    assert_eq!(outcome(exits(&exits_of(&[]))), None);
}

#[test]
fn a_share_of_instructions_that_does_not_fall_contradicts_the_claim() {
    let setups = [Setup::usual(Payload::Chase).at(Place::Ring3), Setup::usual(Payload::DemandFault)];
    let pair = |on: f64, off: f64| {
        let run = |each: f64| {
            let mut run = host(setups.to_vec(), Clock::Instructions, Verdict::Slat);
            run.measurements.iter_mut().for_each(|m| m.time = exact(each));
            run
        };
        Pair { on: run(on), off: run(off) }
    };
    assert_eq!(outcome(instructions(&pair(100.0, 900.0))), Some(Outcome::Partly));
    assert_eq!(outcome(instructions(&pair(900.0, 900.0))), Some(Outcome::Fails));
}

#[test]
fn a_chase_that_is_as_fast_as_natively_is_no_catastrophe() {
    let chased = |native: f64, guest: f64, verdict| {
        let guest_setup = chase_of(Bytes::mib(256), Place::Ring3);
        let setups = vec![guest_setup.clone().at(Place::Native), guest_setup];
        let mut run = host(setups, Clock::Time, verdict);
        for (measurement, time) in run.measurements.iter_mut().zip([native, guest]) {
            measurement.time = real(time);
        }
        outcome(chase(&run))
    };
    assert_eq!(chased(10.0, 25.0, Verdict::Slat), Some(Outcome::Partly));
    assert_eq!(chased(10.0, 10.0, Verdict::Slat), Some(Outcome::Fails));
    assert_eq!(chased(10.0, 9.0, Verdict::Slat), Some(Outcome::Fails));
    assert_eq!(chased(10.0, 25.0, Verdict::ShadowPaging), Some(Outcome::NotMeasured));
}

#[test]
fn emulated_vcpus_are_judged_by_their_exits_and_never_by_time() {
    let churn = |vcpus| Setup { vcpus, ..Setup::usual(Payload::Churn) };
    let mut same = exits_of(&[(churn(1), 0.0, 1.0), (churn(4), 0.0, 1.0)]);
    // Emulated throughput that would say anything.
    same.on.measurements[1].throughput = Figure::new(Quality::DirectionOnly, &[74.0]);
    let (found, text) = scaling(&same).expect("two points");
    assert_eq!(found, Outcome::NotMeasured, "{text}");
    assert!(text.contains("No verdict on time") && !text.contains("x74"), "{text}");
    let more = exits_of(&[(churn(1), 0.0, 1.0), (churn(4), 0.0, 1.5)]);
    assert_eq!(outcome(scaling(&more)), Some(Outcome::Partly));
    assert_eq!(outcome(scaling(&exits_of(&[(churn(1), 0.0, 1.0)]))), None, "one point is no growth");

    let mut real_hosts = same;
    for run in [&mut real_hosts.on, &mut real_hosts.off] {
        run.clock = Clock::Time;
    }
    assert_eq!(outcome(scaling(&real_hosts)), Some(Outcome::Partly));
    real_hosts.on.measurements[1].throughput = real(0.5);
    assert_eq!(outcome(scaling(&real_hosts)), Some(Outcome::Fails));
}

#[test]
fn a_tlb_that_each_exit_flushes_is_not_a_tagged_one() {
    let laps = |ticks: [f64; 4]| {
        let setups = Between::ALL.map(|between| Setup { between, ..Setup::usual(Payload::Laps) });
        let mut run = host(setups.to_vec(), Clock::Time, Verdict::Slat);
        for (measurement, ticks) in run.measurements.iter_mut().zip(ticks) {
            measurement.ticks = real(ticks);
        }
        switches(&run).expect("all four")
    };
    let (found, text) = laps([100.0, 101.0, 102.0, 103.0]);
    assert_eq!(found, Outcome::Holds);
    assert!(text.contains("room for both"), "{text}");
    let (found, text) = laps([100.0, 101.0, 102.0, 300.0]);
    assert_eq!(found, Outcome::Holds);
    assert!(text.contains("share its entries"), "{text}");
    assert_eq!(laps([100.0, 101.0, 300.0, 300.0]).0, Outcome::Fails, "flushed at each switch");
    assert_eq!(laps([100.0, 300.0, 300.0, 300.0]).0, Outcome::Fails, "flushed at each exit");
    assert_eq!(laps([100.0, 150.0, 150.0, 150.0]).0, Outcome::Partly);
}

#[test]
fn a_platform_on_which_nothing_was_measured_is_not_a_tested_one() {
    let setup = Setup::usual(Payload::Chase).at(Place::Native);
    let mut run = host(vec![setup], Clock::Time, Verdict::Slat);
    let tested = |run: &Run| super::tested(Material { here: Some(run), ..Material::default() }).0;
    assert_eq!(tested(&run), Outcome::NotMeasured);
    run.measurements[0].time = real(1.0);
    assert_eq!(tested(&run), Outcome::Holds);
    run.interrupted = true;
    assert_eq!(tested(&run), Outcome::Partly);
}

#[test]
fn what_one_vendor_contradicts_holds_in_part() {
    let work =
        |on, off| Findings::of(exits_of(&PAGE_TABLE_WORK.map(|payload| (Setup::usual(payload), on, off))));
    let (good, bad) = (work(0.0, 1.0), work(1.0, 1.0));
    let of = |amd, intel| {
        let found = Material { amd, intel, here: None }.of_lab(|lab| exits(&lab.counted));
        found.expect("a lab was there")
    };
    assert_eq!(of(Some(&good), Some(&good)).0, Outcome::Holds);
    assert_eq!(of(None, Some(&bad)).0, Outcome::Fails);
    let (outcome, text) = of(Some(&good), Some(&bad));
    assert_eq!(outcome, Outcome::Partly);
    assert!(text.starts_with("AMD (NPT): ") && text.contains("Intel (EPT): "), "{text}");
}

#[test]
fn a_flush_at_another_vms_turn_contradicts_tags() {
    let laps: Vec<_> =
        Between::ALL.into_iter().map(|between| Setup { between, ..Setup::usual(Payload::Laps) }).collect();
    let of = |flushes_a_lap: u64| {
        let mut run = host(laps.clone(), Clock::Instructions, Verdict::Slat);
        for measurement in &mut run.measurements {
            measurement.exits = exact(1.0);
            let flushes = flushes_a_lap * measurement.setup.operations;
            measurement.counts.insert("tlb_flush".into(), flushes);
        }
        let pair = Pair { on: run.clone(), off: run.clone() };
        flushes(&Findings { switches: Some(run), ..Findings::of(pair) })
    };
    assert_eq!(outcome(of(0)), Some(Outcome::Partly));
    assert_eq!(outcome(of(1)), Some(Outcome::Fails));
    let run = host(laps, Clock::Instructions, Verdict::Slat);
    assert_eq!(flushes(&Findings::of(Pair { on: run.clone(), off: run })), None, "none was counted");
}

#[test]
fn a_miss_that_costs_no_more_with_slat_contradicts_the_claim() {
    let of = |on: usize, off: usize| {
        let run = |references| {
            let mut run = host(Vec::new(), Clock::Instructions, Verdict::Slat);
            let (guest_page, host_page) = (PageSize::Size4K, PageSize::Size4K);
            let entries = vec![Entry { root: Root::Cr3, level: 1 }; references];
            run.misses = vec![Miss { guest_page, host_page, entries }];
            run
        };
        counted(&Pair { on: run(on), off: run(off) }).expect("both were counted")
    };
    assert_eq!(of(20, 4).0, Outcome::Holds);
    assert_eq!(of(24, 4).0, Outcome::Partly);
    assert_eq!(of(4, 4).0, Outcome::Fails);
    assert!(of(24, 4).1.contains("not all the model's"), "the entries are none of a walk's");
    let none = host(Vec::new(), Clock::Instructions, Verdict::Slat);
    assert_eq!(counted(&Pair { on: none.clone(), off: none }), None);
}
