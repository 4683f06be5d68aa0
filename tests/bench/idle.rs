//! What a guest that does nothing costs its host, and what it has.

use std::ops::DerefMut;
use std::time::Duration;

use anyhow::{Context, Result};
use api::units::Bytes;
use guests::{Of, Printed, QemuSettings, Vm, sum};
use lab::Kernel;

use crate::vm::{Transport, USUALLY, guest};

/// How long it does nothing before it is looked at.
const REST: &str = "rest:45s";
const CMDLINE: &str = "ballast.console";

pub fn idle() -> Result<()> {
    let images = Kernel::V6_1.guest_images()?;
    println!("45 s idle, Debian 6.1, 1 vCPU, drivers loaded, no balancer");
    println!(
        "                                           the host holds: guest memory   beside it   the guest has available   in all"
    );
    for (memory, arguments) in [
        ("256M", &[][..]),
        ("256M,min=96M,max=4G", &["--grow", "auto"]),
        ("256M,min=96M,max=16G", &["--grow", "auto"]),
        // With more than that at most, it has not enough left to start.
        ("256M,min=96M,max=4G", &["--grow", "balloon"]),
    ] {
        let settings = guest(&images, memory, CMDLINE, Transport::Pci, arguments).by_default();
        print(&format!("ballast {memory} {}", arguments.join(" ")), Box::new(settings.start()))?;
    }
    let directory = tempfile::tempdir()?;
    let qemu = QemuSettings::new("bench", &images, Bytes::mib(256), CMDLINE, directory.path());
    let qemu = QemuSettings { printed: Printed::No, ..qemu };
    print("QEMU microvm, 256M", qemu.start())?;
    let qemu = qemu.q35();
    print("QEMU q35, 256M", qemu.start())?;
    let plugs = [
        "-m",
        "256M,maxmem=4G,slots=1",
        "-object",
        "memory-backend-ram,id=more,size=3840M",
        "-device",
        "virtio-mem-pci,memdev=more,requested-size=0",
    ];
    print("QEMU q35, 256M, can plug to 4G", qemu.with(&plugs).start())
}

fn print(name: &str, mut vm: impl DerefMut<Target = Vm>) -> Result<()> {
    vm.wait_until_ready();
    vm.step(REST, Duration::from_secs(60));
    let smaps = vm.smaps();
    let [held, beside] = [Of::Guest, Of::Rest].map(|of| sum(&smaps, of, &["Rss"]));
    vm.type_in("get:/proc/meminfo\n");
    let [all, available] = ["MemTotal:", "MemAvailable:"].map(|field| {
        let line = vm.wait_for_line(field, USUALLY);
        let amount = line.rsplit_once(':').and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
        amount.map(Bytes::kib).with_context(|| line.clone())
    });
    println!(
        "{name:<50} {:>20} {:>11} {:>25} {:>8}",
        held.to_string(),
        beside.to_string(),
        available?.to_string(),
        all?.to_string()
    );
    Ok(())
}
