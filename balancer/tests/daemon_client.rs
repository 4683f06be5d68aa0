//! What the daemon tells can be read back, and its absence is said.

mod fakes;

use std::time::Duration;

use api::units::Bytes;
use balancer::daemon::client::{Client, Error};
use balancer::daemon::{self, Config};
use fakes::FakeVm;
use tokio::sync::oneshot;

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn the_state_is_read_back_with_the_reason_of_a_decision() {
    let directory = tempfile::tempdir().unwrap();
    let mut client = Client::new(directory.path(), Duration::from_secs(5));
    assert!(matches!(client.state().await, Err(Error::NotRunning { .. })));

    let _vm = FakeVm::start(directory.path(), "web", "256M,min=128M,max=1G", Bytes::mib(400));
    let config = Config {
        directory: Some(directory.path().to_owned()),
        budget: Some(Bytes::gib(4)),
        interval: Duration::from_millis(100),
        ..Config::default()
    };
    let (stop, stopped) = oneshot::channel();
    let daemon = tokio::spawn(daemon::run(config, async move { drop::<Result<(), _>>(stopped.await) }));
    let reason = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Ok(state) = client.state().await
                && let Some(reason) = state.vms.first().and_then(|vm| vm.last_reason)
            {
                return reason;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let reason = reason.await.expect("gave up waiting for a decision");
    assert!(reason.new > reason.old && reason.to_string().starts_with("grow "), "{reason}");

    drop(stop);
    daemon.await.unwrap().unwrap();
    assert!(matches!(client.state().await, Err(Error::NotRunning { .. })));
}
