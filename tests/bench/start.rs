//! How soon a stock kernel runs its first program: by ballast's defaults, and under QEMU.

use anyhow::Result;
use api::units::Bytes;
use guests::{Printed, QemuSettings};
use lab::Kernel;

use crate::vm::{Transport, guest};
use crate::{CMDLINE, measure, print, print_heading};

/// What ballast's default command line has beside what every guest here has.
const DEFAULTS: &str = "cryptomgr.notests swiotlb=noforce";

/// All that is measured of a kernel.
pub fn of(kernel: Kernel) -> Result<()> {
    let images = kernel.guest_images()?;
    let directory = tempfile::tempdir()?;
    println!("Debian {} as its bzImage, 256 MiB, 1 vCPU, by ballast's command line", kernel.series());
    print_heading();
    let cache = directory.path().join("kernels");
    let cache = cache.to_str().unwrap_or_default();
    let settings =
        |arguments: &[&str]| guest(&images, "256M", CMDLINE, Transport::Pci, arguments).by_default();
    // Once without looking, which unpacks as well.
    let kept = settings(&["--kernel-cache", cache]);
    kept.start().wait_until_ready();
    print("ballast, cache warm", &measure(|| Box::new(kept.start()))?);
    let unkept = settings(&["--kernel-cache", "off"]);
    print("ballast, no cache", &measure(|| Box::new(unkept.start()))?);
    let packed = settings(&["--no-unpack"]);
    print("ballast, --no-unpack", &measure(|| Box::new(packed.start()))?);
    let words = format!("{DEFAULTS} {CMDLINE}");
    let qemu = QemuSettings::new("bench", &images, Bytes::mib(256), &words, directory.path());
    let qemu = QemuSettings { printed: Printed::No, ..qemu };
    print("QEMU microvm", &measure(|| qemu.start())?);
    let qemu = qemu.q35();
    print("QEMU q35", &measure(|| qemu.start())?);
    Ok(())
}
