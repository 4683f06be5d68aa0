//! `ballast slat` as a user meets it, on whatever host runs the test.

use std::fs;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn slat(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    command.arg("slat").args(arguments).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    slat(arguments).output().expect("ballast can be run")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("written")).expect("JSON")
}

#[test]
fn wishes_that_no_host_fulfils_are_refused_before_anything_runs() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("run.json");
    let file = file.to_str().expect("a name");
    for (wish, word) in [
        (&["--payload", "chase", "--data", "3M"][..], "multiple of 2 MiB"),
        (&["--payload", "chase", "--data", "1000G"], "64 GiB"),
        (&["--payload", "churn", "--vcpus", "99"], "1 to 16"),
        (&["--payload", "churn", "--operations", "0"], "no operations"),
        (&["--payload", "mmap-batch", "--operations", "1"], "a multiple of that"),
        (&["--payload", "cold-touch", "--operations", "5000"], "4096 pages"),
        (&["--payload", "chase", "--set", "scaling"], "nothing to run"),
        (&["--payload", "nonsense"], "no payload of this name"),
        (&["--passes", "0"], "--passes"),
    ] {
        let output = run(&[&["run", "--output", file], wish].concat());
        assert_eq!(output.status.code(), Some(2), "{wish:?}: {output:?}");
        assert!(said(&output).contains(word), "{wish:?}: {}", said(&output));
        assert!(!said(&output).contains("pass 1"), "{wish:?}: {}", said(&output));
        assert!(!Path::new(file).exists(), "{wish:?}");
    }
    for command in [&["run", "--payload", "chase"][..], &["lab"], &["lab", "--nested"]] {
        // In the second there is a directory, which takes no files.
        for place in ["/no/such/directory/x.json", "/proc/x.json"] {
            let output = run(&[command, &["--output", place]].concat());
            assert_eq!(output.status.code(), Some(2), "{output:?}");
            assert!(said(&output).contains("nothing was run"), "{}", said(&output));
        }
    }
    // Of the two files that --nested writes, one can't be.
    fs::create_dir(directory.path().join("run.slat-off.json")).expect("a directory");
    let output = run(&["lab", "--nested", "--output", file]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(said(&output).contains("run.slat-off.json"), "{}", said(&output));
}

#[test]
fn a_part_of_the_lab_asks_for_a_visit_to_put_it_into() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("lab.json");
    let name = file.to_str().expect("a name");
    let part = |arguments: &[&str]| {
        let output = run(&[&["lab", "--only", "density"], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        said(&output)
    };
    assert!(part(&[]).contains("--output"));
    assert!(part(&["--output", name, "--twice"]).contains("--only counting"));
    let output = run(&["lab", "--only", "memory", "--output", name, "--density"]);
    assert!(said(&output).contains("--only density"), "{output:?}");
    assert!(part(&["--output", name]).contains("lab.json"), "nothing is there yet");
    assert!(!file.exists());
    let output = run(&["run", "--payload", "warm-touch", "--passes", "1", "--rounds", "1", "--output", name]);
    assert!(file.exists(), "{output:?}");
    let before = fs::read(&file).expect("written");
    assert!(part(&["--output", name]).contains("ballast slat run"));
    assert_eq!(fs::read(&file).expect("still there"), before);
}

#[test]
fn files_and_kernels_that_are_not_there_are_named() {
    for (arguments, word) in [
        (&["report", "/no/such.json"][..], "/no/such.json"),
        (&["compare", "/no/such.json", "/etc/passwd"], "/no/such.json"),
        (&["report", "/etc/passwd"], "/etc/passwd is neither"),
        (&["lab", "--kernel-root", "/no/such/root"], "/no/such/root"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(said(&output).contains(word), "{}", said(&output));
    }
}

#[test]
fn a_payload_that_hangs_is_stopped_and_named() {
    let output = run(&["run", "--payload", "hang", "--limit", "1", "--passes", "1"]);
    match output.status.code() {
        Some(1) => assert!(said(&output).contains("did not finish within 1 s: hang"), "{}", said(&output)),
        Some(3) => println!("not run: {}", said(&output)),
        _ => panic!("{output:?}"),
    }
}

#[test]
fn a_run_that_measures_nothing_has_failed() {
    let meminfo = fs::read_to_string("/proc/meminfo").expect("Linux");
    let free = meminfo.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    let free: u64 = free.map_or(0, |n| n.trim().parse().expect("a number"));
    // One huge page more than there is.
    let data = format!("{}M", (free + 1) * 2);
    let huge = ["--payload", "warm-touch", "--backing", "hugetlb-2M", "--data", &data, "--passes", "1"];
    let output = run(&[&["run"], &huge[..]].concat());
    match output.status.code() {
        Some(1) => assert!(said(&output).contains("nothing was measured"), "{}", said(&output)),
        Some(3) => println!("not run: {}", said(&output)),
        _ => panic!("{output:?}"),
    }
}

#[test]
fn a_result_is_replaced_as_a_whole_and_pipes_are_left_in_place() {
    let directory = tempfile::tempdir().expect("a directory");
    let (file, link) = (directory.path().join("run.json"), directory.path().join("link.json"));
    std::os::unix::fs::symlink(&file, &link).expect("a link");
    fs::write(&file, "what was there").expect("written");
    let mut earlier = fs::File::open(&file).expect("readable");
    let arguments = ["run", "--payload", "warm-touch", "--passes", "1", "--rounds", "1", "--output"];
    slat(&arguments).arg(&link).output().expect("ballast can be run");
    assert!(read(&file)["measurements"].is_array());
    assert!(link.is_symlink(), "the file is meant, not the link");
    let mut text = String::new();
    earlier.read_to_string(&mut text).expect("readable");
    assert_eq!(text, "what was there", "who reads the old file reads it to its end");
    assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 2, "nothing else is left");
    let output = slat(&arguments).arg("/dev/null").output().expect("ballast can be run");
    assert_ne!(output.status.code(), Some(2), "{output:?}");
    assert!(!Path::new("/dev/null").is_file());
}

#[test]
fn ctrl_c_keeps_what_was_measured() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("run.json");
    let mut command = slat(&["run", "--payload", "chase", "--passes", "100", "--rounds", "2", "--output"]);
    let mut child = command.arg(&file).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("it runs");
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
    // By the second pass each setup has had its turn.
    lines.find(|line| line.starts_with("pass 2 of 100")).expect("the second pass");
    kill_process(Pid::from_child(&child), Signal::INT).expect("it lives");
    let rest: Vec<_> = lines.collect();
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("stopped")), "{rest:?}");
    let run = read(&file);
    assert_eq!(run["interrupted"], true);
    let natively = &run["measurements"][0];
    assert_eq!(natively["setup"]["place"], "native");
    let samples = natively["time"]["value"]["samples"].as_u64().expect("measured");
    assert!((2..200).contains(&samples), "{samples}");
    // And the report takes it.
    let report = slat(&["report"]).arg(&file).output().expect("ballast can be run");
    assert!(report.status.success(), "{report:?}");
    let told = String::from_utf8_lossy(&report.stdout);
    assert!(told.contains("C10") && told.contains("stopped before its end"), "{report:?}");
    let report = slat(&["report", "--json"]).arg(&file).output().expect("ballast can be run");
    let told: Value = serde_json::from_slice(&report.stdout).expect("JSON");
    assert_eq!(told["claims"].as_array().map(Vec::len), Some(13));
    assert_eq!(told["cautions"].as_array().map(Vec::len), Some(1));
    let compared = slat(&["compare", "--json"]).args([&file, &file]).output().expect("ballast can be run");
    let sides: Value = serde_json::from_slice(&compared.stdout).expect("JSON");
    assert_eq!(sides["first"]["interrupted"], true, "{sides:#}");
    assert_eq!(sides["rows"][0]["setup"]["payload"], "chase", "{sides:#}");
}

#[test]
fn nesting_is_refused_where_it_can_not_be_or_asks_for_a_kernel() {
    let output = run(&["lab", "--nested", "--kernel-root", "/no/such/root"]);
    match output.status.code() {
        Some(3) => assert!(said(&output).len() > 40, "{}", said(&output)),
        Some(1) => assert!(said(&output).contains("/no/such/root"), "{}", said(&output)),
        _ => panic!("{output:?}"),
    }
}
