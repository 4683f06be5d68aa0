//! Stock kernels boot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use api::status::DriverState;
use lab::Kernel;

use crate::{BOOT, VmSettings, images};

/// How long a guest takes from its last word to the end of its process.
pub const END: Duration = Duration::from_secs(3);

/// Each kernel in each form that it can be booted in.
fn kernels() -> Vec<(&'static str, Kernel, PathBuf)> {
    let (old, new) = (images(Kernel::V6_1), images(Kernel::V6_12));
    vec![
        ("bzimage-6-1", Kernel::V6_1, old.bzimage),
        ("elf-6-1", Kernel::V6_1, old.elf.expect("6.1 has an ELF")),
        ("bzimage-6-12", Kernel::V6_12, new.bzimage),
    ]
}

/// Boots each kernel; its balloon's driver has found the device before it powers off.
///
/// # Panics
/// Where it does not.
pub fn boot_all(transport: &str, cpus: &str, memory: &str) {
    for (name, kernel, image) in kernels() {
        boot(name, kernel, &image, transport, cpus, memory);
    }
}

/// Boots one kernel, the same way.
///
/// # Panics
/// As [`boot_all`].
pub fn boot(name: &str, kernel: Kernel, image: &Path, transport: &str, cpus: &str, memory: &str) {
    let what = format!("{name} with {cpus} CPUs and {memory} by {transport}");
    println!("booting {what}");
    let mut vm = VmSettings::new(name, &images(kernel), memory, "ballast.console")
        .kernel(image)
        .with(&["--cpus", cpus, "--transport", transport])
        .start();
    let ready = vm.wait_for_line("READY", BOOT * cpus.parse().expect("a number"));
    assert!(ready.contains(&format!("linux={}.", kernel.series())), "{what}: {ready}");
    assert!(ready.contains(&format!("cpus={cpus} ")), "{what}: {ready}");
    vm.wait_for_memory("the balloon's driver", BOOT, |memory| memory.driver == DriverState::Active);
    vm.type_in("end\n");
    assert_eq!(vm.wait_for_end(END), 0, "{what} powers off");
}
