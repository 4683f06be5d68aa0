use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use api::units::Bytes;

use super::faults::Fault;
use super::policies::ballast::Ballast;
use super::policies::{MemoryPolicy, PolicyName};
use super::report::Report;
use super::score::Score;
use super::sweep::{Source, Sweep};
use super::trace::{Kind, Trace};
use super::{Grow, Reports, Setup, SimulatedHost, Speeds, plot, sweep, world};
use balancer::policy::{Guards, Settings};

fn sweep(policies: &[PolicyName], vms: &[usize], kind: Kind) -> Sweep {
    Sweep {
        policies: policies.to_vec(),
        vms: vms.to_vec(),
        seeds: 1..=2,
        seconds: 900,
        source: Source::Generated(kind),
        setup: Setup::default(),
    }
}

fn go(sweep: &Sweep) -> sweep::Outcome {
    sweep.run(&AtomicBool::new(false), &|_| ())
}

fn score(policy: &mut dyn MemoryPolicy, kind: Kind, vms: usize, faults: &[Fault]) -> Score {
    let trace = Trace::generate(kind, 5, vms, 1800);
    let setup = Setup { faults: faults.to_vec(), ..Setup::default() };
    world::run(&trace, &setup, policy, &mut |_| ())
}

fn without(switch: impl Fn(&mut Guards)) -> Ballast {
    let mut settings = Settings::default();
    switch(&mut settings.guards);
    Ballast::new(settings)
}

#[test]
fn the_same_seeds_give_the_same_figures_to_the_bit() {
    let sweep = sweep(&PolicyName::ALL, &[8, 14], Kind::Mixed);
    assert_eq!(go(&sweep), go(&sweep));
}

#[test]
fn memory_is_neither_made_nor_lost() {
    let trace = Trace::generate(Kind::Storm, 3, 16, 1200);
    for name in PolicyName::ALL {
        world::run(&trace, &Setup::default(), &mut *name.make(), &mut |snapshot| {
            for &(index, _, actual) in &snapshot.vms {
                let limits = trace.vms[index].limits;
                assert!(actual <= limits.max(), "{name}: more than its map");
                assert!(actual >= Bytes(limits.min().0 / 2), "{name}: far below its least");
            }
        });
    }
}

#[test]
fn ours_is_never_over_budget_whatever_comes() {
    for kind in Kind::ALL {
        for vms in [8, 16, 24, 40] {
            let score = score(&mut Ballast::default(), kind, vms, &[]);
            assert_eq!(score.over_budget, 0, "{kind} with {vms} VMs: {} over", score.worst_over);
        }
    }
}

#[test]
fn no_fault_makes_ours_take_more_than_there_is() {
    for fault in Fault::ALL {
        let score = score(&mut Ballast::default(), Kind::Burst, 14, &[fault, fault]);
        assert_eq!(score.over_budget, 0, "{fault}: {} over", score.worst_over);
    }
}

#[test]
fn what_is_wrong_with_one_costs_the_others_little() {
    for fault in Fault::ALL {
        let score = score(&mut Ballast::default(), Kind::Burst, 10, &[fault]);
        assert!(
            score.meets_slo(),
            "{fault}: {} % stalled, {} s killed",
            score.stalled_percent(),
            score.killed_seconds()
        );
    }
}

#[test]
fn each_fault_changes_what_happens() {
    // 16 VMs: the host is short enough that a VM that pays nothing is missed.
    let well = score(&mut Ballast::default(), Kind::Burst, 16, &[]);
    for fault in Fault::ALL {
        let faulty = score(&mut Ballast::default(), Kind::Burst, 16, &[fault, fault]);
        assert_ne!((well.churn, well.decisions), (faulty.churn, faulty.decisions), "{fault}");
    }
}

#[test]
fn nobody_starves_while_there_is_room_whatever_a_guest_makes_of_its_memory() {
    for fault in [Fault::Mem, Fault::Crashkernel, Fault::OffLine, Fault::Limited, Fault::Hidden] {
        for kind in [Kind::Steady, Kind::Burst] {
            let score = score(&mut Ballast::default(), kind, 8, &[fault, fault]);
            assert!(
                score.meets_slo() && score.over_budget == 0,
                "{fault}, {kind}: {} stalled",
                score.stalled
            );
            let permille = score.faulty_stalled * 1000 / score.steps;
            assert!(permille < 1, "{fault}, {kind}: {} of it stalled", score.faulty_stalled);
        }
    }
}

#[test]
fn what_a_guest_does_not_manage_is_kept_from_nobody() {
    // So short that what two such guests were given and can't use is missed, were it granted to them.
    let stalled = |faults: &[Fault]| score(&mut Ballast::default(), Kind::Steady, 14, faults).stalled;
    let (with, without) = (stalled(&[Fault::Mem; 6]), stalled(&[]));
    assert!(with <= without, "{with} against {without}");
}

#[test]
fn who_dies_and_starts_anew_waits_for_room_and_gets_it() {
    let trace = Trace::generate(Kind::Steady, 5, 10, 900);
    let setup = Setup { faults: vec![Fault::Dying], ..Setup::default() };
    let (mut deaths, mut starts, mut there) = (0, 0, true);
    let score = world::run(&trace, &setup, &mut Ballast::default(), &mut |snapshot| {
        let is = snapshot.vms.iter().any(|(index, ..)| *index == 0);
        deaths += u32::from(there && !is);
        starts += u32::from(!there && is);
        there = is;
    });
    assert_eq!((deaths, starts, score.over_budget), (3, 3, 0));
}

#[test]
fn guests_that_grow_by_plugging_are_balanced_too() {
    for kind in [Kind::Burst, Kind::Storm] {
        let trace = Trace::generate(kind, 5, 10, 1800);
        let setup = Setup { grow: Grow::Plug, ..Setup::default() };
        let score = world::run(&trace, &setup, &mut Ballast::default(), &mut |_| ());
        assert!(score.over_budget == 0 && score.meets_slo(), "{kind}: {} stalled", score.stalled);
    }
}

#[test]
fn slow_balloons_do_not_take_ours_over_budget() {
    let speeds = Speeds { inflate: Bytes::mib(16), reclaim: Bytes::mib(16), ..Speeds::default() };
    let setup = Setup { speeds, ..Setup::default() };
    for vms in [14, 18] {
        let trace = Trace::generate(Kind::Burst, 5, vms, 1800);
        let score = world::run(&trace, &setup, &mut Ballast::default(), &mut |_| ());
        assert_eq!(score.over_budget, 0, "{vms} VMs: {} over", score.worst_over);
    }
}

#[test]
fn stalls_come_with_demand_that_does_not_fit_under_any_law() {
    for name in PolicyName::ALL {
        let few = score(&mut *name.make(), Kind::Steady, 6, &[]);
        let many = score(&mut *name.make(), Kind::Steady, 60, &[]);
        assert_eq!(few.stalled, 0, "{name}");
        assert!(!many.meets_slo(), "{name}");
    }
}

#[test]
fn steady_demand_moves_nothing_back_and_forth() {
    for vms in [8, 14, 16] {
        assert_eq!(score(&mut Ballast::default(), Kind::Steady, vms, &[]).reversals, 0, "{vms} VMs");
    }
}

/// An hour in which ten VMs rise at the same moments.
fn peaks(switch: impl Fn(&mut Guards)) -> Score {
    let trace = Trace::generate(Kind::Peaks, 5, 10, 3600);
    world::run(&trace, &Setup::default(), &mut without(switch), &mut |_| ())
}

#[test]
fn without_rest_after_a_move_memory_goes_to_and_fro() {
    assert_eq!(peaks(|_| ()).reversals, 0);
    assert!(peaks(|guards| guards.moves_rest = false).reversals > 0);
}

#[test]
fn no_overload_moves_memory_to_and_fro() {
    for (kind, vms) in [(Kind::Mixed, 20), (Kind::Burst, 20), (Kind::Peaks, 14), (Kind::Storm, 20)] {
        let overload = Sweep { seeds: 11..=14, seconds: 1800, ..sweep(&[PolicyName::Ballast], &[vms], kind) };
        let score = go(&overload).cells[&(PolicyName::Ballast, vms)].score;
        assert!(!score.meets_slo(), "{kind:?}: that is no overload");
        assert_eq!(score.reversals, 0, "{kind:?}");
    }
}

#[test]
fn guests_that_are_asked_wait_less_for_memory() {
    let stalled = |reports| {
        let setup = Setup { reports, ..Setup::default() };
        let trace = Trace::generate(Kind::Burst, 5, 13, 3600);
        world::run(&trace, &setup, &mut Ballast::default(), &mut |_| ()).stalled
    };
    let (asked, timed) = (stalled(Reports::Asked), stalled(Reports::Timed));
    assert!(asked < timed, "{asked} against {timed}");
}

#[test]
fn without_following_rises_and_distress_guests_wait_longer() {
    let stalled = |rises, distress| {
        let policy =
            || without(|guards| (guards.rises_are_forecast, guards.distress_counts) = (rises, distress));
        [9, 11, 13].iter().map(|&vms| score(&mut policy(), Kind::Burst, vms, &[]).stalled).sum::<u64>()
    };
    let (both, distress, neither) = (stalled(true, true), stalled(false, true), stalled(false, false));
    assert!(
        both < distress && distress < neither,
        "{both}, {distress} without rises, {neither} without either"
    );
}

#[test]
fn vms_that_start_find_room_and_those_that_end_leave_it() {
    let trace = Trace::generate(Kind::Storm, 7, 12, 1800);
    let mut most = 0;
    let score = world::run(&trace, &Setup::default(), &mut Ballast::default(), &mut |snapshot| {
        most = most.max(snapshot.vms.len())
    });
    assert!(most >= 10, "{most} of 12 ran at once");
    assert_eq!(score.over_budget, 0);
}

#[test]
fn an_early_end_keeps_what_there_is() {
    let sweep = sweep(&[PolicyName::Ballast, PolicyName::Static], &[8, 10], Kind::Steady);
    let stop = AtomicBool::new(false);
    let outcome = sweep.run(&stop, &|_| stop.store(true, Ordering::Relaxed));
    assert!(!outcome.complete && !outcome.cells.is_empty());
    let report = Report::new(&sweep, &outcome);
    assert!(report.table().contains("Ended early"));
    assert!(go(&sweep).complete);
}

#[test]
fn the_report_counts_vms_at_equal_service_and_pictures_are_drawn() {
    let sweep = sweep(&[PolicyName::Ballast, PolicyName::Static], &[6, 10, 40], Kind::Burst);
    let outcome = go(&sweep);
    let report = Report::new(&sweep, &outcome);
    let most =
        |policy| report.served.iter().find(|served| served.policy == policy).unwrap().capacity.most_vms;
    assert!(most(PolicyName::Ballast) >= most(PolicyName::Static));
    assert!(most(PolicyName::Ballast) < Some(40));
    let bound = report.bound;
    assert!(bound.most_vms >= most(PolicyName::Ballast) && bound.mean_vms > Some(0.0), "{bound:?}");
    assert!(report.table().contains("bound") && report.bounds.len() == 3);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["served"][0]["most_vms"], serde_json::json!(most(PolicyName::Ballast)));
    assert_eq!(json["rows"].as_array().unwrap().len(), 6);
    let host = SimulatedHost::default();
    let picture = plot::service(&outcome, &sweep.policies, &host, &report.about()).unwrap();
    assert!(picture.contains("ballast") && picture.trim_end().ends_with("</svg>"), "{picture}");
    let go_on = std::sync::atomic::AtomicBool::new(false);
    let (trace, snapshots) =
        sweep::watch(&sweep, PolicyName::Ballast, 6, 1, &go_on).expect("it is not stopped");
    assert_eq!(snapshots.len(), 900);
    assert_eq!(snapshots[1].now, Duration::from_secs(1));
    let picture = plot::memory(PolicyName::Ballast, &trace, &snapshots, &host).unwrap();
    assert!(picture.trim_end().ends_with("</svg>"), "{picture}");
}

#[test]
fn speeds_are_read_from_a_file_and_the_rest_stays_as_it_is() {
    let speeds: Speeds = serde_json::from_str(r#"{"inflate": 1048576}"#).unwrap();
    assert_eq!((speeds.inflate, speeds.deflate), (Bytes::mib(1), Speeds::default().deflate));
    // What `make bench` writes.
    let measured = r#"{"deflate": 4, "inflate": 3, "plug": 6, "unplug": 5}"#;
    let speeds: Speeds = serde_json::from_str(measured).unwrap();
    assert_eq!((speeds.plug, speeds.unplug, speeds.swap), (Bytes(6), Bytes(5), Speeds::default().swap));
    assert!(serde_json::from_str::<Speeds>(r#"{"inflat": 1}"#).is_err());
}
