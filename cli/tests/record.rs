//! `ballast record`, and `ballast sim` on what it took.

#[path = "../../balancer/tests/fakes/mod.rs"]
mod fakes;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use api::units::Bytes;
use fakes::FakeVm;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sim::recorded;
use tokio::runtime::Handle;

const LIMITS: &str = "256M,min=128M,max=1G";

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

fn ballast(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    command.args(arguments).env("BALLAST_RUNTIME_DIR", directory);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn said(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Runs the fakes in a thread of their own, as tests wait without them.
fn runtime() -> Handle {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
}

fn until_holds(file: &Path, what: &str) {
    let begun = Instant::now();
    while !fs::read_to_string(file).is_ok_and(|text| text.contains(what)) {
        assert!(begun.elapsed() < PATIENCE, "gave up waiting for {what} in {}", file.display());
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_was_recorded_is_played_by_the_simulator() {
    let runtime = runtime();
    let _guard = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("trace.csv");
    let path = file.to_str().unwrap();
    let web = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(100));
    let silent = FakeVm::start(directory.path(), "silent", LIMITS, Bytes::mib(100));
    silent.state().report_age = Some(Duration::from_secs(100));
    let recorder = ballast(directory.path(), &["record", "-o", path, "--interval", "100ms"]).spawn().unwrap();
    until_holds(&file, "web,134217728,1073741824,104857600");
    // One that comes later joins, one that goes leaves.
    let db = FakeVm::start(directory.path(), "db", LIMITS, Bytes::mib(200));
    until_holds(&file, "db,134217728,1073741824,209715200");
    drop(web);
    db.state().used = Bytes::mib(210);
    until_holds(&file, "db,134217728,1073741824,220200960");
    // The simulator's grain is a second.
    until_holds(&file, "\n2.");
    kill_process(Pid::from_raw(recorder.id().try_into().unwrap()).unwrap(), Signal::INT).unwrap();
    let (code, error) = said(&recorder.wait_with_output().unwrap());
    assert_eq!(code, Some(0), "{error}");
    assert!(error.contains("samples of 2 VMs are in") && error.contains("not to be had"), "{error}");

    let trace = recorded::read(&file, recorded::Part::WHOLE).unwrap();
    let names: Vec<&str> = trace.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["db", "web"]);
    assert_eq!(trace.vms[1].demand[0], Bytes::mib(100));
    assert_eq!(*trace.vms[0].demand.last().unwrap(), Bytes::mib(210));
    assert_eq!(trace.vms[0].limits.max(), Bytes::gib(1));
    let play = ["sim", "--trace", path, "--vms", "2", "--json"];
    let (code, error) = said(&ballast(directory.path(), &play).output().unwrap());
    assert_eq!(code, Some(2));
    assert!(error.contains("record more"), "{error}");
    // As if it had gone on for five minutes.
    let text = fs::read_to_string(&file).unwrap();
    let (_, last) = text.lines().rfind(|line| line.contains(",db,")).unwrap().split_once(',').unwrap();
    fs::write(&file, format!("{text}300.000,{last}\n")).unwrap();
    let sim = ballast(directory.path(), &play).output().unwrap();
    assert_eq!(sim.status.code(), Some(0), "{}", String::from_utf8_lossy(&sim.stderr));
    let report = serde_json::from_slice::<Value>(&sim.stdout).unwrap();
    assert!((298..=300).contains(&report["seconds"].as_u64().unwrap()), "{report}");

    // A recording is never overwritten.
    let before = fs::read(&file).unwrap();
    let (code, error) = said(&ballast(directory.path(), &["record", "-o", path]).output().unwrap());
    assert_eq!(code, Some(1));
    assert!(error.contains("exists already"), "{error}");
    assert_eq!(fs::read(&file).unwrap(), before);
}

#[test]
fn only_those_named_are_recorded_for_as_long_as_asked() {
    let runtime = runtime();
    let _guard = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("trace.csv");
    let _web = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(100));
    let _db = FakeVm::start(directory.path(), "db", LIMITS, Bytes::mib(100));
    let arguments = ["record", "db", "-o", file.to_str().unwrap(), "--interval", "100ms", "--for", "500ms"];
    let (code, error) = said(&ballast(directory.path(), &arguments).output().unwrap());
    assert_eq!(code, Some(0), "{error}");
    let text = fs::read_to_string(&file).unwrap();
    let columns = text.lines().next().unwrap().split(',').count();
    assert!(text.lines().count() > 1, "{text}");
    for line in text.lines().skip(1) {
        assert!(line.contains(",db,"), "{line}");
        assert_eq!(line.split(',').count(), columns, "{line}");
    }
}

#[test]
fn nothing_to_record_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("trace.csv");
    let path = file.to_str().unwrap();
    let (code, error) =
        said(&ballast(directory.path(), &["record", "-o", path, "--for", "300ms"]).output().unwrap());
    assert_eq!(code, Some(1));
    assert!(error.contains("no VM was there"), "{error}");
    assert!(!file.exists());
    for (arguments, part) in [
        (&["record"][..], "--output"),
        (&["record", "../x", "-o", path], "not a VM's name"),
        (&["record", "-o", path, "--interval", "1ms"], "100ms to 10m"),
        (&["record", "-o", path, "--for", "0"], "out of range"),
    ] {
        let (code, error) = said(&ballast(directory.path(), arguments).output().unwrap());
        assert_eq!(code, Some(2), "{error}");
        assert!(error.contains(part), "{part} is missing in {error}");
    }
    let (code, error) =
        said(&ballast(directory.path(), &["record", "-o", "/nonexistent/x.csv"]).output().unwrap());
    assert_eq!(code, Some(1));
    assert!(error.contains("/nonexistent/x.csv"), "{error}");
}

#[test]
fn what_makes_no_sense_together_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sim/samples/lab.csv");
    let sample = sample.to_str().unwrap();
    for (arguments, part) in [
        (&["--trace", sample, "--vms", "2", "--seeds", "1..2"][..], "leave --seeds out"),
        (&["--vms", "2", "--faults", "stuck,lying"], "leave none of 2 VMs"),
        (&["--vms", "10000", "--hours", "600"], "too much to hold"),
        (&["--trace", sample, "--vms", "5"], "1 to 4"),
        (&["--hours", "745"], "at most 744"),
    ] {
        let sim = ballast(directory.path(), &[&["sim"], arguments].concat()).output().unwrap();
        let error = String::from_utf8_lossy(&sim.stderr).into_owned();
        assert!(sim.status.code() == Some(2) && error.contains(part), "{arguments:?}: {error}");
    }
}
