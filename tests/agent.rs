//! The guest's agent: heard by the VM, and answered by the daemon long before its next round.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use balancer::daemon::client::Client;
use balloon::agent::Version;
use balloon::runtime;
use balloon::units::Bytes;
use lab::{Host, Kernel, Vm, VmSettings, ballast, wait_for};

/// The daemon's rounds are this far apart. What a guest gets sooner, it did not get by a round.
const INTERVAL: Duration = Duration::from_secs(60);
/// How long a guest takes to be granted memory when it calls.
const GRANT: Duration = Duration::from_secs(5);

/// `ballast balancer`, ended with this.
struct Daemon(Child);

impl Daemon {
    fn start() -> Self {
        let interval = format!("{}s", INTERVAL.as_secs());
        let child = Command::new(ballast())
            .args(["balancer", "--interval", &interval, "--budget", "1G"])
            .stdin(Stdio::null())
            .spawn();
        Self(child.expect("the daemon starts"))
    }

    fn wait_for_first_round(&self) {
        let directory = runtime::directory().expect("there is a runtime directory");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        wait_for("the daemon's first round", GRANT, || {
            let mut client = Client::new(&directory, GRANT);
            let state = runtime.block_on(client.state()).ok()?;
            (state.rounds > 0 && !state.vms.is_empty()).then_some(())
        });
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn guest(name: &str, kernel: Kernel) -> Vm {
    let images = kernel.guest_images();
    VmSettings::new(name, &images, "208M,min=160M,max=512M", "ballast.console").agent(&images).start()
}

/// A guest that runs short calls, and has more memory long before the daemon would have looked.
fn calls_and_is_answered(kernel: Kernel) {
    let mut vm = guest("a", kernel);
    vm.wait_until_ready();
    let memory = vm.wait_for_memory("the agent's first word", GRANT, |memory| memory.agent.is_some());
    let agent = memory.agent.expect("it was waited for");
    assert_eq!((agent.version, agent.connected, agent.malformed), (Some(Version::OWN), true, 0));
    assert!(agent.figures.committed > Some(Bytes::ZERO), "{agent:?}");
    assert!(agent.figures.stall_us.is_some(), "the guest's kernel tells its pressure: {agent:?}");
    assert_eq!(agent.distress_age_ms, None);
    vm.wait_for_memory("the first inflation", GRANT * 2, |memory| memory.actual <= Bytes::mib(210));

    let daemon = Daemon::start();
    daemon.wait_for_first_round();
    let before = vm.memory();
    let round = Instant::now();
    vm.type_in("spike:260M:6s\n");
    vm.wait_for_memory("the guest's call", GRANT, |memory| {
        memory.agent.is_some_and(|agent| agent.distress_age_ms.is_some())
    });
    // The target, not what the guest has: when all is gone its driver helps itself to the balloon's pages.
    let granted =
        vm.wait_for_memory("the grant", GRANT, |memory| memory.target > before.target + Bytes::mib(16));
    assert!(round.elapsed() < INTERVAL / 2, "that may have been a round");
    println!(
        "called at {} and has {} {:?} after the spike began",
        before.target,
        granted.target,
        round.elapsed()
    );
    vm.wait_for_line("DONE spike", GRANT * 6);

    vm.type_in("end\n");
    vm.wait_for_line("SUMMARY oom_kills=0", GRANT);
    assert_eq!(vm.wait_for_end(GRANT), 0);
    drop(daemon);
}

#[test]
fn a_guest_of_6_1_calls_and_is_answered_between_the_rounds() {
    Host::new()
        .guest(Kernel::V6_1)
        .usually(Duration::from_secs(90))
        .run(|| calls_and_is_answered(Kernel::V6_1));
}

#[test]
fn a_guest_of_6_12_calls_and_is_answered_between_the_rounds() {
    Host::new()
        .guest(Kernel::V6_12)
        .usually(Duration::from_secs(90))
        .run(|| calls_and_is_answered(Kernel::V6_12));
}

#[test]
fn the_agent_is_small() {
    let path = if lab::inside() { return } else { lab::agent().expect("it builds") };
    let size = std::fs::metadata(&path).expect("it was built").len();
    assert!(Bytes(size) < Bytes::mib(1), "{} has {size} bytes", path.display());
}
