//! Commands that ask more VMs than a process usually has descriptors for.

#[path = "../../balancer/tests/fakes/mod.rs"]
mod fakes;

use std::process::{Command, Output};

use api::units::Bytes;
use fakes::FakeVm;

/// `ballast ps` after `limits`, among a hundred VMs that run in this process.
async fn ps(limits: &str) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let start =
        |n| FakeVm::start(directory.path(), &format!("vm-{n}"), "256M,min=128M,max=1G", Bytes::mib(150));
    let _vms: Vec<_> = (0..100).map(start).collect();
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{limits} && exec \"$0\" ps"), env!("CARGO_BIN_EXE_ballast")]);
    command.env("BALLAST_RUNTIME_DIR", directory.path());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_client_takes_all_descriptors_that_it_may_have() {
    let output = ps("ulimit -Sn 64 && ulimit -Hn 1024").await;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(out.lines().filter(|line| line.contains("running")).count(), 100, "{out}{err}");
    assert!(output.status.success() && err.is_empty(), "{err}");
}

#[tokio::test]
async fn a_client_without_descriptors_tells_that_as_its_own_trouble() {
    let output = ps("ulimit -n 64").await;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(out.lines().count(), 101, "{out}");
    let lines: Vec<_> = err.lines().filter(|line| line.contains(".sock")).collect();
    assert!(!lines.is_empty(), "{out}{err}");
    for line in lines {
        assert!(line.contains("this process could not ask") && line.contains("ulimit -n"), "{line}");
    }
    assert!(!err.contains("ended"), "{err}");
}
