//! A guest that sleeps (suspend-to-idle), and what wakes it.

use std::time::Duration;

use api::status::{DriverState, VmState};
use guests::{BOOT, Host, Vm, VmSettings, images, wait_for};
use lab::Kernel;

/// Has Linux wake by the interrupt of its first serial port (Documentation/ABI/testing/sysfs-devices-power).
const WAKEUP: &str = "set:/sys/class/tty/ttyS0/power/wakeup:enabled";
const SLEEP: &str = "set:/sys/power/state:freeze";
/// How long a guest takes to fall asleep, to wake, or to end.
const SOON: Duration = Duration::from_secs(5);

fn wait_for_state(vm: &Vm, state: VmState) {
    wait_for(&format!("{state:?}"), SOON, || (vm.status().state == state).then_some(()));
}

fn sends_to_sleep(vm: &mut Vm) {
    vm.wait_for_memory("the balloon's driver", BOOT, |memory| memory.driver == DriverState::Active);
    assert_eq!(vm.status().state, VmState::Running);
    vm.type_in(&format!("{SLEEP}\n"));
    wait_for_state(vm, VmState::Sleeping);
}

fn wakes(vm: &mut Vm) {
    vm.wait_for_line(&format!("DONE {SLEEP}"), SOON);
    wait_for_state(vm, VmState::Running);
}

#[test]
fn a_key_and_the_power_button_wake_a_guest_whose_terminal_may() {
    Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12).usually(Duration::from_secs(120)).run(|| {
        for kernel in [Kernel::V6_1, Kernel::V6_12] {
            let name = format!("sleeps-{}", kernel.series().replace('.', "-"));
            let mut vm = VmSettings::new(&name, &images(kernel), "256M", "ballast.console").start();
            vm.wait_until_ready();
            vm.step(WAKEUP, BOOT);

            sends_to_sleep(&mut vm);
            vm.type_in("\n");
            wakes(&mut vm);

            sends_to_sleep(&mut vm);
            vm.ask(async |client| client.power_button().await).expect("a press is taken");
            wakes(&mut vm);

            // A press that wakes does not switch off; the next one does.
            vm.step("rest:1ms", BOOT);
            vm.ask(async |client| client.power_button().await).expect("a press is taken");
            vm.wait_for_line("POWER BUTTON", SOON);
            assert_eq!(vm.wait_for_end(SOON), 0);
        }
    });
}
