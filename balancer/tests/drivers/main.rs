//! Drivers for other VMMs: against what those publish of their APIs, and against what none should say.
//! QEMU itself is tested with the real program, in the package `tests`.

mod cloud_hypervisor;
mod daemon;
mod firecracker;
mod nonsense;
mod qemu;
#[path = "../recorded/mod.rs"]
mod recorded;

use std::path::PathBuf;
use std::time::Duration;

use api::limits::Wanted;
use balancer::driver::{Driver, Status};
use tempfile::TempDir;

/// Far above what any exchange here needs, far below a test's patience.
const LIMIT: Duration = Duration::from_millis(500);

fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vm.socket");
    (directory, socket)
}

fn limits() -> Option<Wanted> {
    Some("512M,min=256M".parse().unwrap())
}

async fn report(driver: &mut impl Driver) -> Status {
    *driver.report(Duration::ZERO).await.unwrap()
}
