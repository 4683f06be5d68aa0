use super::*;
use crate::policies::PolicyName;
use crate::{Setup, SimulatedHost, world};

fn file(name: &str, content: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    (directory, path)
}

#[test]
fn bitbrains_files_are_one_vm_each_in_kilobytes() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/bitbrains");
    let trace = read(&directory, Part::WHOLE).unwrap();
    assert_eq!(trace.vms.len(), 2);
    assert_eq!(trace.seconds, 900);
    let vm = &trace.vms[0];
    assert_eq!(vm.limits.max(), Bytes::gib(8));
    assert_eq!(vm.demand[0], Bytes::kib(1_572_864));
    assert_eq!(vm.demand[150], Bytes::kib((1_572_864 + 2_097_152) / 2), "a line in between");
}

#[test]
fn google_usage_is_a_part_of_the_largest_machine_in_microseconds() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/google-2019.jsonl");
    let trace = read(&path, Part::WHOLE).unwrap();
    assert_eq!(trace.vms.len(), 2);
    let vm = trace.vms.iter().find(|vm| vm.name == "330587238433-0").unwrap();
    assert_eq!(vm.limits.max(), Bytes::gib(8));
    assert_eq!(vm.demand[0], Bytes::gib(2));
    assert_eq!(vm.demand[150], Bytes::gib(4), "the window's most is in its middle");
}

#[test]
fn what_real_guests_did_is_played_under_every_law() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/lab.csv");
    let trace = read(&path, Part::WHOLE).unwrap();
    let names: Vec<&str> = trace.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["build", "db", "leak", "web"]);
    assert!(trace.seconds >= 120, "{} s", trace.seconds);
    for vm in &trace.vms {
        let most = vm.demand.iter().max().unwrap();
        let least = vm.demand.iter().filter(|demand| **demand > Bytes::ZERO).min().unwrap();
        assert!(most.0 > least.0 * 3 / 2, "{} moved from {least} to {most} only", vm.name);
    }
    let host = SimulatedHost { total: Bytes::mib(1280), reserve: Bytes::mib(256) };
    let setup = Setup { host, ..Setup::default() };
    for name in PolicyName::ALL {
        let score = world::run(&trace, &setup, &mut *name.make(), &mut |_| ());
        assert!(score.steps > 0, "{name}");
        assert!(name != PolicyName::Ballast || score.over_budget == 0, "{} over", score.worst_over);
    }
}

#[test]
fn own_recordings_are_read_as_csv_and_as_json() {
    let rows = "0,web,134217728,1073741824,268435456,67108864,402653184\n\
                2,web,134217728,1073741824,536870912,67108864,805306368\n";
    let (_keep, path) = file("web.csv", &format!("{OWN_HEADER}\n{rows}"));
    let trace = read(&path, Part::WHOLE).unwrap();
    let vm = &trace.vms[0];
    assert_eq!(
        (vm.demand[0], vm.demand[1], vm.demand[2]),
        (Bytes::mib(256), Bytes::mib(384), Bytes::mib(512))
    );
    assert_eq!((vm.limits.min(), vm.limits.max()), (Bytes::mib(128), Bytes::gib(1)));
    assert_eq!((vm.commit_percent, vm.cache), (150, Bytes::mib(64)));
    let (_keep, path) = file("web.json", &serde_json::to_string(&trace).unwrap());
    assert_eq!(read(&path, Part::WHOLE).unwrap(), trace);
}

#[test]
fn a_month_of_many_vms_is_cut_to_what_is_played() {
    let directory = tempfile::tempdir().unwrap();
    let month = || (0..8640).map(|row| 1_376_314_846 + row * 300);
    for vm in 1..=30 {
        let rows: String = month().map(|second| format!("{second};\t8388608;\t{vm}E5\n")).collect();
        let header = "Timestamp [ms];\tMemory capacity provisioned [KB];\tMemory usage [KB]\n";
        fs::write(directory.path().join(format!("{vm}.csv")), header.to_owned() + &rows).unwrap();
    }
    let trace = read(directory.path(), Part { vms: 14, seconds: 3600 }).unwrap();
    assert_eq!((trace.vms.len(), trace.seconds), (14, 3600));
    assert!(trace.vms.iter().all(|vm| vm.demand.len() == 3601 && vm.ends.is_none()));
    let one = read(&directory.path().join("7.csv"), Part::WHOLE).unwrap();
    assert_eq!((one.vms.len(), one.seconds), (1, 8639 * 300));
    // Two hundred for a month would be more than fits into memory.
    let at = |second| (second, Bytes::mib(1), Bytes::ZERO, Bytes::ZERO);
    let seen = || Recording { samples: vec![at(0), at(LONGEST)], ..Recording::default() };
    let found = (0..200).map(|vm| (vm.to_string(), seen())).collect();
    let error = finish(Path::new("a"), found, Part::WHOLE).unwrap_err();
    assert!(error.to_string().contains("too many"));
}

#[test]
fn what_was_committed_before_the_agent_came_is_not_nothing() {
    let rows = "0,web,134217728,1073741824,268435456,0,0\n\
                2,web,134217728,1073741824,268435456,0,402653184\n";
    let (_keep, path) = file("web.csv", &format!("{OWN_HEADER}\n{rows}"));
    assert_eq!(read(&path, Part::WHOLE).unwrap().vms[0].commit_percent, 150);
}

#[test]
fn errors_name_file_and_line() {
    for (name, content, part) in [
        ("a.csv", "what,is,this\n1,2,3\n", "no format"),
        ("b.csv", "second,vm,min,max,used,cache,committed\n1,2\n", "line 2"),
        ("c.csv", "second,vm,min,max,used,cache,committed\n1,a,1,2,x,4,5\n", "`x` is not a number for used"),
        ("d.csv", "second,vm,min,max,used,cache,committed\n", "no samples"),
        ("e.csv", "Timestamp [ms];CPU cores\n1;2\n", "no columns"),
        ("f.jsonl", "{\"start_time\":1}\n", "line 1"),
        ("g.json", "{}", "not a recording"),
        (
            "h.csv",
            "Timestamp [ms];Memory capacity provisioned [KB];Memory usage [KB]\n1;2e13;3\n",
            "too many for Memory capacity",
        ),
    ] {
        let (_keep, path) = file(name, content);
        let error = read(&path, Part::WHOLE).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(name), "{error}");
    }
    assert!(read(Path::new("/nowhere.csv"), Part::WHOLE).unwrap_err().to_string().contains("can't read"));
}
