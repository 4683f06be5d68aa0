use super::*;

/// A run in which nothing was measured, by which it can be known again.
fn run_of(name: &str) -> Run {
    let (setups, limit) = (Vec::new(), Duration::from_secs(1));
    let clock = crate::run::Clock::Instructions;
    let plan = crate::run::Plan { setups, passes: 1, rounds: 1, limit, clock, reasons: false };
    let mut run = crate::run::run(&plan, &AtomicBool::new(true), |_, _| {});
    run.fingerprint.kernel = name.into();
    run
}

fn both(errand: Errand, round: Round, run: &Run) -> [Outcome; 2] {
    [Paging::Nested, Paging::Shadow].map(|paging| ((paging, errand, round), Ok(run.clone())))
}

fn visit(parts: &[Errand], before: Findings) -> Visit {
    let only = Only { parts: parts.to_vec(), before: Box::new(before) };
    let (vendor, limit) = (Vendor::Amd, Duration::from_secs(1));
    Visit { vendor, only: Some(only), twice: true, density: true, limit, jobs: 1 }
}

fn counted(run: &Run) -> Findings {
    Findings::of(Pair { on: run.clone(), off: run.clone() })
}

#[test]
fn parts_that_were_never_reached_stay_missing_when_another_is_done() {
    let run = run_of("a");
    let before = Findings { interrupted: true, ..counted(&run) };
    let visit = visit(&[Errand::Density], before);
    let outcomes = both(Errand::Density, Round::First, &run);
    let found = visit.findings(&outcomes, false).expect("an earlier count");
    assert!(found.density.is_some() && found.interrupted, "{found:?}");
    let mut rest = Vec::from(both(Errand::Scale, Round::First, &run));
    rest.extend(both(Errand::Reasons, Round::First, &run));
    rest.push(((Paging::NestedOldMmu, Errand::Memory, Round::First), Ok(run)));
    let found = visit.findings(&rest, false).expect("an earlier count");
    assert!(!found.interrupted, "{found:?}");
}

#[test]
fn a_second_count_is_not_held_against_an_earlier_visits_first() {
    let visit = visit(&[Errand::Count], counted(&run_of("a")));
    let again = both(Errand::Count, Round::Again, &run_of("b"));
    let found = visit.findings(&again, false).expect("an earlier count");
    assert_eq!((found.twice, &found.difference), (false, &None));
    let mut all = Vec::from(both(Errand::Count, Round::First, &run_of("a")));
    all.extend(again);
    let found = visit.findings(&all, false).expect("a count");
    assert!(found.twice && found.difference.is_some());
}

#[test]
fn parts_of_different_kernels_are_told_apart() {
    let visit = visit(&[Errand::Density], counted(&run_of("a")));
    let same = visit.findings(&both(Errand::Density, Round::First, &run_of("a")), false);
    assert_eq!(same.expect("a count").mixed(), None);
    let other = visit.findings(&both(Errand::Density, Round::First, &run_of("b")), false);
    let why = other.expect("a count").mixed().expect("two kernels");
    assert!(why.contains("Linux a") && why.contains("Linux b"), "{why}");
}
