//! The daemon moves memory between real guests, and survives deaths: its own and a VM's.

use std::time::Duration;

use api::status::Pauser;
use api::units::Bytes;
use guests::{Daemon, Host, Vm, VmSettings, images};
use lab::Kernel;

/// Two guests of this size at most share [`BUDGET`].
const MAX: Bytes = Bytes::mib(448);
const MIN: Bytes = Bytes::mib(160);
const BUDGET: Bytes = Bytes::mib(608);
/// How long memory takes to move from one guest to the other.
const MOVING: Duration = Duration::from_secs(30);

fn guest(name: &str) -> Vm {
    VmSettings::new(name, &images(Kernel::V6_1), "208M,min=160M,max=448M", "ballast.console").start()
}

/// Waits until `vm` has at least `actual`, while all together stay in the budget.
fn wait_until_grown(vm: &Vm, others: &[&Vm], actual: Bytes) {
    vm.wait_for_memory(&format!("{} to have {actual}", vm.name()), MOVING, |memory| {
        let held: Bytes = others.iter().map(|other| other.memory().host_rss.unwrap()).sum();
        assert!(
            held + memory.host_rss.unwrap() <= BUDGET,
            "{} and {held} are over the budget",
            memory.host_rss.unwrap()
        );
        memory.actual >= actual
    });
}

#[test]
fn memory_moves_to_whoever_needs_it_through_deaths() {
    Host::new().guest(Kernel::V6_1).memory(Bytes::gib(3)).usually(Duration::from_secs(180)).run(|| {
        let daemon = Daemon::start(BUDGET);
        let (mut a, mut b) = (guest("a"), guest("b"));
        a.wait_until_ready();
        b.wait_until_ready();
        for vm in [&a, &b] {
            vm.wait_for_memory("the first inflation", MOVING, |memory| memory.actual <= Bytes::mib(240));
        }

        a.step("grow:220M:10s", MOVING);
        wait_until_grown(&a, &[&b], Bytes::mib(300));

        drop(daemon);
        let before = a.memory().target;
        a.step("rest:2s", MOVING);
        assert_eq!(a.memory().target, before, "without a daemon a VM keeps what it has");

        // As if that daemon had paused it with its last breath.
        b.ask(async |client| client.pause_as(Pauser::Balancer).await).expect("it is paused");
        let daemon = Daemon::start(BUDGET);
        a.step("release", MOVING);
        b.wait_for_memory("the next daemon to resume it", MOVING, |memory| memory.paused_by.is_none());
        b.step("grow:220M:10s", MOVING);
        wait_until_grown(&b, &[&a], Bytes::mib(300));
        assert!(a.memory().actual >= MIN, "nobody is shrunk below its minimum");

        a.kill();
        let mut c = guest("c");
        c.wait_until_ready();
        c.step("grow:200M:10s", MOVING);
        wait_until_grown(&c, &[&b], Bytes::mib(260));
        assert!(b.memory().actual <= MAX);

        for vm in [&mut b, &mut c] {
            vm.type_in("end\n");
            vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
            assert_eq!(vm.wait_for_end(MOVING), 0);
        }
        drop(daemon);
    });
}
