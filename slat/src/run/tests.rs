use super::*;
use crate::payload::Payload;
use crate::payload::memory::Backing;

static GO_ON: AtomicBool = AtomicBool::new(false);

fn plan(setups: Vec<Setup>) -> Plan {
    Plan { setups, passes: 2, rounds: 2, limit: Duration::from_secs(30), clock: Clock::Time, reasons: false }
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
fn a_run_that_measured_nothing_has_failed_and_a_lack_beside_figures_has_not() {
    let usual = Setup::usual(Payload::Chase).at(Place::Native);
    // More than any host sets aside.
    let huge = Setup { backing: Backing::Hugetlb2M, data: Bytes::gib(1 << 20), ..usual.clone() };
    let nothing = run(&plan(vec![huge.clone()]), &GO_ON, |_, _| {});
    let why = nothing.failed().expect("nothing was measured");
    assert!(why.contains("nothing was measured") && why.contains("nr_hugepages"), "{why}");
    let some = run(&plan(vec![huge, usual.clone()]), &GO_ON, |_, _| {});
    assert_eq!(some.failed(), None);
    let two = Setup { vcpus: 2, ..usual.clone() };
    let why = run(&plan(vec![two, usual]), &GO_ON, |_, _| {}).failed().expect("one is impossible");
    assert!(why.contains("one thread"), "{why}");
}

#[test]
fn what_this_host_has_no_memory_for_is_refused() {
    let usual = Setup::usual(Payload::Chase).at(Place::Native);
    assert_eq!(possible(std::slice::from_ref(&usual)), Ok(()));
    for data in [Bytes::mib(3), Bytes::gib(1000), Bytes(0)] {
        let why = possible(&[Setup { data, ..usual.clone() }]).expect_err("impossible");
        assert!(why.contains(&data.to_string()), "{why}");
    }
    assert!(possible(&[]).is_err());
}

#[test]
fn emulated_time_is_never_called_real() {
    use Verdict::*;
    assert_eq!(Clock::Time.quality(Place::Ring0, EmulatedRing0), Quality::DirectionOnly);
    assert_eq!(Clock::Time.quality(Place::Ring3, EmulatedRing0), Quality::RealTime);
    assert_eq!(Clock::Emulated.quality(Place::Native, Slat), Quality::DirectionOnly);
    assert_eq!(Clock::Instructions.quality(Place::Ring0, Slat), Quality::Exact);
}
