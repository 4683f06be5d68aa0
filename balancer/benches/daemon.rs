//! What the daemon costs with many VMs, in processor time: `cargo bench -p balancer --bench daemon`.

#[path = "../tests/fakes/mod.rs"]
mod fakes;
#[path = "../tests/process/mod.rs"]
mod process;

use std::time::{Duration, Instant};

use api::units::Bytes;
use fakes::FakeVm;
use process::{Daemon, client, rounds, until};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How many rounds of a second are measured.
const MEASURED: u64 = 20;

fn main() {
    process::serve();
    // Not when tests are run.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    // The fakes live in this process: two descriptors each.
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("the hard limit is allowed");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    for vms in [100, 1000] {
        runtime.block_on(measure(vms));
    }
}

async fn measure(count: usize) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let start = |n| FakeVm::start(path, &format!("vm-{n}"), "256M,min=128M,max=1G", Bytes::mib(150));
    let _vms: Vec<_> = (0..count).map(start).collect();
    let daemon = Daemon::start(path, Bytes::gib(count as u64), Duration::from_secs(1));
    until("all are known", || async {
        let state = client(path).state().await;
        state.is_ok_and(|state| state.vms.iter().filter(|vm| vm.memory.is_some()).count() == count)
    })
    .await;
    let (first, busy, began) = (rounds(path).await, daemon.busy(), Instant::now());
    until("it was measured", || async { rounds(path).await >= first + MEASURED }).await;
    let (share, took) = (daemon.busy() - busy, began.elapsed());
    println!(
        "{count} VMs: {:.1} % of a processor, {} ms from round to round",
        share.as_secs_f64() / took.as_secs_f64() * 100.0,
        took.as_millis() / u128::from(rounds(path).await - first)
    );
}
