//! All of them under one daemon.

use std::time::Duration;

use api::units::Bytes;
use balancer::daemon::client::Client;
use balancer::daemon::{self, Config, State};
use serde_json::{Value, json};

use crate::cloud_hypervisor::CLOUD_HYPERVISOR;
use crate::firecracker::FIRECRACKER;
use crate::qemu::qemu_answers;
use crate::recorded::Recorded;

/// The first state of a daemon with these settings in which that is `seen`.
async fn state_under(settings: &str, what: &str, seen: impl Fn(&State) -> bool) -> State {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("balancer.toml");
    std::fs::write(&file, settings).unwrap();
    let config = Config { directory: Some(directory.path().to_owned()), ..Config::read(&file).unwrap() };
    let daemon = tokio::spawn(daemon::run(config, std::future::pending()));
    let mut client = Client::new(directory.path(), Duration::from_secs(10));
    let state = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            match client.state().await {
                Ok(state) if seen(&state) => return state,
                _ => {}
            }
        }
    });
    let state = state.await;
    daemon.abort();
    state.unwrap_or_else(|_| panic!("gave up waiting until {what}"))
}

#[tokio::test]
async fn one_daemon_looks_after_vms_of_every_kind() {
    let elsewhere = tempfile::tempdir().unwrap();
    let path = |name: &str| elsewhere.path().join(name);
    let needy = Recorded::http(path("needy.fc"), FIRECRACKER);
    // It uses 724 MiB of the 824 that it has.
    let tight = FIRECRACKER[3].2.replace("419430400", "104857600").replace("314572800", "104857600");
    needy.answer("GET /balloon/statistics", 200, &tight);
    let _mute = Recorded::http(path("mute.ch"), CLOUD_HYPERVISOR);
    let _clash = Recorded::qmp(path("needy.qmp"), &qemu_answers());
    let dir = elsewhere.path().display();
    let text = format!(
        "budget = \"4G\"\ninterval = \"100ms\"\n\
         [[vms]]\ndriver = \"firecracker\"\nsockets = \"{dir}/*.fc\"\nmemory = \"512M,min=256M\"\n\
         [[vms]]\ndriver = \"cloud-hypervisor\"\nsockets = \"{dir}/*.ch\"\nmemory = \"512M,min=256M\"\n\
         [[vms]]\ndriver = \"qemu\"\nsockets = \"{dir}/*.qmp\"\n"
    );
    let state = state_under(&text, "the needy one is given memory", |state| {
        state.vms.len() == 2 && !needy.orders("PATCH /balloon").is_empty() && state.rounds > 10
    });
    let state: Value = serde_json::to_value(state.await).unwrap();
    let granted = needy.orders("PATCH /balloon")[0]["amount_mib"].as_u64().unwrap();
    assert!(granted < 256, "its balloon is made smaller: {granted}");
    // The one whose name was taken is not there; the one that can't report is held and charged.
    let names: Vec<_> = state["vms"].as_array().unwrap().iter().map(|vm| vm["name"].clone()).collect();
    assert_eq!(names, ["mute", "needy"]);
    let mute = &state["vms"][0];
    assert_eq!((&mute["vmm"], &mute["standing"]), (&json!("cloud-hypervisor"), &json!("stale")));
    assert!(mute["memory"]["charge"].as_u64().unwrap() >= Bytes::mib(768).0, "{mute}");
}

#[tokio::test]
async fn two_sockets_of_one_process_are_one_vm() {
    let elsewhere = tempfile::tempdir().unwrap();
    let _sockets = ["web.qmp", "web-operator.qmp"]
        .map(|name| Recorded::qmp(elsewhere.path().join(name), &qemu_answers()));
    let sockets = elsewhere.path().join("*.qmp");
    let text = format!(
        "budget = \"8G\"\ninterval = \"50ms\"\n[[vms]]\ndriver = \"qemu\"\nsockets = \"{}\"\n",
        sockets.display()
    );
    let state = state_under(&text, "the VM is known", |state| {
        state.vms.iter().any(|vm| vm.memory.is_some()) && state.rounds > 5
    });
    let state = state.await;
    let [vm] = state.vms.as_slice() else { panic!("{:?}", state.vms) };
    assert_eq!(state.host.charged, vm.memory.as_ref().unwrap().charge);
}
