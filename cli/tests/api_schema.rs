//! Both APIs, held against their OpenAPI documents by Schemathesis.

#[path = "../../balancer/tests/fakes/mod.rs"]
mod fakes;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use api::limits::Limits;
use api::units::Bytes;
use fakes::FakeVm;
use lab::schemathesis;
use vmm::api_server::Server;
use vmm::control::Control;

fn document(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources").join(name)
}

#[test]
fn a_vm_answers_as_its_document_says() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("web.sock");
    let server = Server::bind(&socket).unwrap();
    let stop = server.stopper().unwrap();
    // What is mapped is this VM's own bound, of which no document tells.
    let most = Bytes(u64::MAX).page_floor();
    let limits = Limits::new(Bytes::mib(256), Bytes::mib(128), most, 20, 100).unwrap();
    let control = Arc::new(Control::new("web".parse().unwrap(), "2".parse().unwrap(), limits));
    let outcome = thread::scope(|scope| {
        let serving = scope.spawn(|| server.run(&control));
        // Events have no end that a tester could wait for.
        let outcome = schemathesis::check(&document("openapi.yaml"), &socket, &["getMemoryEvents"]);
        stop.write(1).unwrap();
        serving.join().unwrap().unwrap();
        outcome
    });
    println!("{}", outcome.unwrap());
}

/// A `ballast balancer`, stopped with this.
struct Balancer(Child);

impl Drop for Balancer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_balancer_answers_as_its_document_says() {
    let directory = tempfile::tempdir().unwrap();
    let _vms = ["web", "db"]
        .map(|name| FakeVm::start(directory.path(), name, "256M,min=128M,max=1G", Bytes::mib(200)));
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    command
        .args(["balancer", "--budget", "2G", "--beside-others", "--interval", "200ms"])
        .stdin(Stdio::null());
    let _balancer = Balancer(command.env("BALLAST_RUNTIME_DIR", directory.path()).spawn().unwrap());
    let socket = balancer::daemon::socket_in(directory.path());
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no balancer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let check = move || schemathesis::check(&document("balancer-openapi.yaml"), &socket, &[]);
    println!("{}", tokio::task::spawn_blocking(check).await.unwrap().unwrap());
}
