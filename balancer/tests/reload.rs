//! Other settings for a daemon that runs.

mod recorded;

use std::time::Duration;

use api::units::Bytes;
use balancer::daemon::client::Client;
use balancer::daemon::{self, Config};
use recorded::Recorded;
use rustix::process::{Signal, getpid, kill_process};

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the daemon holds to be the smallest and the largest memory of its one VM.
async fn limits(client: &mut Client) -> Option<(Bytes, Bytes)> {
    let state = client.state().await.ok()?;
    let limits = state.vms.first()?.memory.as_ref()?.limits;
    Some((limits.min(), limits.max()))
}

async fn until(client: &mut Client, wanted: Option<(u64, u64)>) {
    let wanted = wanted.map(|(min, max)| (Bytes::mib(min), Bytes::mib(max)));
    let waited = tokio::time::timeout(PATIENCE, async {
        while limits(client).await != wanted {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "gave up waiting for {wanted:?}, there is {:?}", limits(client).await);
}

#[tokio::test]
async fn vms_of_another_vmm_get_what_a_changed_file_allows_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    let _vm = Recorded::http(
        path.join("db.api"),
        &[(
            "GET /api/v1/vm.info",
            200,
            r#"{"config": {"memory": {"size": 536870912, "hotplug_size": 536870912}}, "state": "Running"}"#,
        )],
    );
    let file = path.join("balancer.toml");
    let write = |vms: &str| {
        let text = format!("directory = \"{}\"\nbudget = \"2G\"\ninterval = \"50ms\"\n{vms}", path.display());
        std::fs::write(&file, text).unwrap();
    };
    let section = |memory: &str| {
        format!(
            "[[vms]]\ndriver = \"cloud-hypervisor\"\nsockets = \"{}/*.api\"\nmemory = \"{memory}\"\n",
            path.display()
        )
    };
    write(&section("512M,min=256M"));
    let read = {
        let file = file.clone();
        move || Config::read(&file)
    };
    let daemon = tokio::spawn(daemon::run_with(read().unwrap(), read, std::future::pending::<()>()));
    let mut client = Client::new(&path, PATIENCE);
    until(&mut client, Some((256, 1024))).await;
    // It hears the signal from before its first round on.
    let hang_up = || kill_process(getpid(), Signal::HUP).unwrap();
    write(&section("512M,min=300M,max=800M"));
    hang_up();
    until(&mut client, Some((300, 800))).await;
    let errors: u64 = client.state().await.unwrap().vms.iter().map(|vm| vm.errors).sum();
    assert_eq!(errors, 0, "it was asked all the time, over the same connection");
    write("");
    hang_up();
    until(&mut client, None).await;
    write(&section("600M"));
    hang_up();
    until(&mut client, Some((600, 1024))).await;
    assert!(!daemon.is_finished());
    daemon.abort();
}
