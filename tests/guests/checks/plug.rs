//! Guests that boot with less than they may have and plug the rest (virtio-mem).

use std::time::Duration;

use api::status::{DriverState, MemoryStatus, PlugStatus};
use api::units::Bytes;
use lab::Kernel;

use crate::{Vm, VmSettings, images};

/// How long memory takes to move.
pub const MOVING: Duration = Duration::from_secs(30);
/// What such a guest boots with, where nothing else is said.
pub const STARTUP: Bytes = Bytes::mib(256);

/// A guest whose memory is of the usual kind.
pub fn guest(name: &str, kernel: Kernel, memory: &str) -> Vm {
    guest_on(name, kernel, memory, &[])
}

/// A guest whose memory is of the kind that the arguments say.
pub fn guest_on(name: &str, kernel: Kernel, memory: &str, arguments: &[&str]) -> Vm {
    let mut vm = VmSettings::new(name, &images(kernel), memory, "ballast.console")
        .with(&["--grow", "plug"])
        .with(arguments)
        .start();
    vm.wait_until_ready();
    vm.wait_for_memory("the drivers", MOVING, |memory| {
        memory.report.is_some() && plug(memory).driver == DriverState::Active
    });
    vm
}

/// What it says of plugging.
pub fn plug(memory: &MemoryStatus) -> PlugStatus {
    memory.plug.expect("it plugs")
}

/// Waits until the guest has what it was asked to have.
pub fn settled(vm: &Vm) -> MemoryStatus {
    vm.wait_for_memory("the target", MOVING, |memory| memory.actual == memory.target)
}

/// A guest of this kernel plugs memory, uses it, and gives it back.
pub fn plugs_uses_and_unplugs(kernel: Kernel) {
    let name = kernel.series().replace('.', "-");
    let mut vm = guest(&name, kernel, "256M,min=128M,max=768M");
    // Its cushion is the balloon's as soon as it is plugged, or a moment later.
    assert_eq!(settled(&vm).actual, STARTUP);
    vm.set_target(Bytes::mib(768));
    assert_eq!(plug(&settled(&vm)).plugged, Bytes::mib(512));
    vm.step("grow:560M", MOVING);
    vm.wait_for_memory("its use to show", MOVING, |memory| memory.host_rss.unwrap() > Bytes::mib(560));
    vm.step("release", MOVING);

    vm.set_target(Bytes::mib(200));
    settled(&vm);
    let memory =
        vm.wait_for_memory("the host's memory", MOVING, |memory| memory.host_rss.unwrap() <= Bytes::mib(208));
    let plug = plug(&memory);
    assert_eq!(plug.counters.discard_failures, 0, "{memory:#?}");
    // Its cushion of another 200 MiB stays. So does what a kernel has put where it can't be moved; the balloon makes
    // up for it.
    let cushion = Bytes::mib(200 + 200) - STARTUP;
    assert!(plug.plugged <= cushion + Bytes::mib(128), "{memory:#?}");
    vm.type_in("end\n");
    vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
}
