//! The daemon where there are few descriptors.

mod fakes;
mod process;

use std::time::Duration;

use api::units::Bytes;
use fakes::FakeVm;
use process::{Daemon, client, rounds, until};

const LIMITS: &str = "256M,min=128M,max=1G";

/// What [`Daemon`] runs in a process of its own; without its word there is nothing to do.
#[test]
fn the_daemon_process() {
    process::serve();
}

#[tokio::test]
async fn at_its_limit_it_hears_all_vms_and_answers_its_clients() {
    for count in [30, 40, 80] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let start = |n| FakeVm::start(path, &format!("vm-{n}"), LIMITS, Bytes::mib(150));
        let vms: Vec<_> = (0..count).map(start).collect();
        let daemon = Daemon::start_with_descriptors(path, Bytes::gib(100), Duration::from_millis(200), 64);
        until("every VM is known", || async {
            let Ok(state) = client(path).state().await else { return false };
            state.vms.iter().filter(|vm| vm.memory.is_some()).count() == count
        })
        .await;
        let last = rounds(path).await + 5;
        until("rounds go on", || async { rounds(path).await >= last }).await;
        let asked: Vec<_> = vms.iter().map(|vm| vm.state().requests).collect();
        until("every VM is asked again", || async {
            vms.iter().zip(&asked).all(|(vm, before)| vm.state().requests > *before)
        })
        .await;
        // Whom it can't hear at once it says: not a word of trouble with a VM.
        let log = daemon.log();
        assert_eq!(log.contains("heard only once a round"), count > 15, "{count}: {log}");
        assert!(!log.contains("left out") && !log.contains("left as it is"), "{count}: {log}");
    }
}
