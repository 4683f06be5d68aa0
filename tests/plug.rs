//! Guests that boot with less than they may have and plug the rest (virtio-mem).

use std::time::Duration;

use balloon::status::{DriverState, MemoryStatus, PlugStatus};
use balloon::units::Bytes;
use lab::{Host, Kernel, Vm, VmSettings};

/// How long memory takes to move.
const MOVING: Duration = Duration::from_secs(30);
const STARTUP: Bytes = Bytes::mib(256);

fn guest(name: &str, kernel: Kernel, memory: &str) -> Vm {
    let mut vm = VmSettings::new(name, &kernel.guest_images(), memory, "ballast.console")
        .with(&["--grow", "plug"])
        .start();
    vm.wait_until_ready();
    vm.wait_for_memory("the drivers", MOVING, |memory| {
        memory.report.is_some() && plug(memory).driver == DriverState::Active
    });
    vm
}

fn plug(memory: &MemoryStatus) -> PlugStatus {
    memory.plug.expect("it plugs")
}

/// Waits until the guest has what it was asked to have.
fn settled(vm: &Vm) -> MemoryStatus {
    vm.wait_for_memory("the target", MOVING, |memory| memory.actual == memory.target)
}

#[test]
fn a_guest_plugs_uses_and_unplugs() {
    Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12).usually(Duration::from_secs(90)).run(|| {
        for kernel in [Kernel::V6_1, Kernel::V6_12] {
            let name = kernel.series().replace('.', "-");
            let mut vm = guest(&name, kernel, "256M,min=128M,max=768M");
            assert_eq!(vm.memory().actual, STARTUP);
            vm.set_target(Bytes::mib(768));
            assert_eq!(plug(&settled(&vm)).plugged, Bytes::mib(512));
            vm.step("grow:560M", MOVING);
            vm.wait_for_memory("its use to show", MOVING, |memory| memory.host_rss > Bytes::mib(560));
            vm.step("release", MOVING);

            vm.set_target(Bytes::mib(200));
            settled(&vm);
            let memory =
                vm.wait_for_memory("the host's memory", MOVING, |memory| memory.host_rss <= Bytes::mib(208));
            let plug = plug(&memory);
            assert_eq!((plug.requested, plug.counters.discard_failures), (Bytes::ZERO, 0), "{memory:#?}");
            // What a kernel has put where it can't be moved stays, and the balloon makes up for it.
            assert!(plug.plugged <= Bytes::mib(128), "{memory:#?}");
            vm.type_in("end\n");
            vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
        }
    });
}
