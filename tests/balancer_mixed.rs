//! One daemon balances ballast's guests and QEMU's together.

use std::path::Path;
use std::time::Duration;

use api::units::Bytes;
use balancer::daemon::State;
use balancer::driver::Kind;
use guests::{Daemon, Host, Printed, Qemu, QemuSettings, Vm, VmSettings, images, wait_for};
use lab::Kernel;

/// Four guests share this. Two could have all they want at a time, and QEMU's own memory is in it.
const BUDGET: Bytes = Bytes::mib(1280);
const MAX: Bytes = Bytes::mib(448);
const MIN: Bytes = Bytes::mib(160);
/// How long memory takes to move from one guest to another.
const MOVING: Duration = Duration::from_secs(60);

fn start_daemon(directory: &Path) -> Daemon {
    let file = directory.join("balancer.toml");
    let text = format!(
        "budget = \"{}M\"\ninterval = \"1s\"\n[[vms]]\ndriver = \"qemu\"\nsockets = \"{}/*.qmp\"\n\
         memory = \"208M,min=160M\"\n",
        BUDGET.0 >> 20,
        directory.display()
    );
    std::fs::write(&file, text).expect("a file can be written");
    Daemon::with(Printed::Yes, &["--config", &file.to_string_lossy()])
}

/// What a VM has, while all together stay in the budget.
fn actual(state: &State, name: &str) -> Option<Bytes> {
    let memory = |name: &str| state.vms.iter().find(|vm| vm.name == name)?.memory.as_ref();
    let held: Bytes =
        state.vms.iter().filter_map(|vm| vm.memory.as_ref()).map(|m| m.host_rss.unwrap() + m.overhead).sum();
    assert!(held <= BUDGET, "the host holds {held}, which is over the budget");
    Some(memory(name)?.actual)
}

fn wait_until(daemon: &Daemon, name: &str, what: &str, fits: impl Fn(Bytes) -> bool) {
    wait_for(&format!("{name} to {what}"), MOVING, || {
        let state = daemon.state()?;
        actual(&state, name).filter(|&actual| fits(actual))
    });
}

#[test]
fn memory_moves_between_guests_of_ballast_and_of_qemu() {
    Host::new().guest(Kernel::V6_1).qemu().memory(Bytes::gib(4)).usually(Duration::from_secs(400)).run(
        || {
            let directory = tempfile::tempdir().expect("a directory can be made");
            let images = images(Kernel::V6_1);
            let ours = |name: &str| -> Vm {
                let mut vm =
                    VmSettings::new(name, &images, "208M,min=160M,max=448M", "ballast.console").start();
                vm.wait_until_ready();
                vm
            };
            let theirs = |name: &str| -> Qemu {
                QemuSettings::new(name, &images, MAX, "ballast.console", directory.path()).start()
            };
            // One after the other: QEMU's guests have all their memory until somebody takes it.
            let daemon = start_daemon(directory.path());
            let mut qemu = [theirs("qemu-a"), theirs("qemu-b")];
            for vm in &mut qemu {
                vm.wait_until_ready();
            }
            // Each waits for room, which others make no faster than the emulated processor lets them.
            let mut own = [ours("own-a"), ours("own-b")];
            let first = wait_for("all four to be seen", MOVING, || {
                daemon.state().filter(|state| state.vms.len() == 4)
            });
            // One that is met while its QEMU loads may not answer at once.
            let errors: Vec<u64> = first.vms.iter().map(|vm| vm.errors).collect();
            let kinds: Vec<Kind> = first.vms.iter().map(|vm| vm.vmm).collect();
            assert_eq!(kinds, [Kind::Ballast, Kind::Ballast, Kind::Qemu, Kind::Qemu]);
            let overhead = wait_for("QEMU's own memory to be counted", MOVING, || {
                daemon
                    .state()?
                    .vms
                    .iter()
                    .filter_map(|vm| vm.memory.as_ref())
                    .map(|memory| memory.overhead)
                    .max()
            });
            assert!(overhead > Bytes::mib(8), "{overhead}");

            // Spikes in one of each: the two that are idle pay, whosever they are.
            own[0].step("grow:240M:10s", MOVING);
            wait_until(&daemon, "own-a", "have what it needs", |actual| actual >= Bytes::mib(320));
            qemu[0].step("grow:240M:10s", MOVING);
            wait_until(&daemon, "qemu-a", "have what it needs", |actual| actual >= Bytes::mib(320));
            own[0].step("release", MOVING);
            qemu[0].step("release", MOVING);

            // And the other way round.
            qemu[1].step("grow:240M:10s", MOVING);
            wait_until(&daemon, "qemu-b", "have what it needs", |actual| actual >= Bytes::mib(320));
            own[1].step("grow:240M:10s", MOVING);
            wait_until(&daemon, "own-b", "have what it needs", |actual| actual >= Bytes::mib(320));

            let last = daemon.state().expect("the daemon lives");
            for (vm, &errors) in last.vms.iter().zip(&errors) {
                let memory = vm.memory.as_ref().expect("it answers");
                println!("{}: {} of {}, charged {}", vm.name, memory.actual, memory.limits, memory.charge);
                assert!(memory.actual >= MIN && memory.actual <= MAX, "{}: {}", vm.name, memory.actual);
                assert_eq!(vm.errors, errors, "{} answered all the time", vm.name);
            }
            assert!(
                last.vms.iter().any(|vm| vm.vmm == Kind::Qemu && vm.grows > 0),
                "QEMU's guests were given some"
            );
            assert!(last.vms.iter().any(|vm| vm.vmm == Kind::Qemu && vm.shrinks > 0), "and gave some");

            for vm in &mut own {
                vm.type_in("end\n");
                vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
            }
            for vm in &mut qemu {
                vm.type_in("end\n");
                vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
            }
            drop(daemon);
        },
    );
}
