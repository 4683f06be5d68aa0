//! What every machine of the lab needs from its kernel: file systems, and an end.

use std::fs;
use std::io;

use rustix::mount::MountFlags;
use rustix::system::{RebootCommand, reboot};

/// Where what goes, in the order in which it must.
const MOUNTS: &[(&str, &str)] = &[
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/tmp"),
    ("tmpfs", "/run"),
    ("debugfs", "/sys/kernel/debug"),
    ("tracefs", "/sys/kernel/tracing"),
];

/// Mounts what programs expect to find.
///
/// # Errors
/// The first one that failed; the rest is mounted all the same.
pub fn mount_all() -> io::Result<()> {
    let failed: Vec<_> = MOUNTS.iter().filter_map(|(kind, place)| mount(kind, place).err()).collect();
    failed.into_iter().next().map_or(Ok(()), Err)
}

/// Mounts a file system that takes no source.
///
/// # Errors
/// A sentence, where the kernel refuses.
pub fn mount(kind: &str, place: &str) -> io::Result<()> {
    // Those below /sys and /proc can't be made and exist already.
    let _ = fs::create_dir_all(place);
    rustix::mount::mount(kind, place, kind, MountFlags::empty(), None)
        .map_err(|error| io::Error::other(format!("{kind} could not be mounted on {place}: {error}")))
}

/// How a machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// ACPI power off.
    PowerOff,
    /// A restart, by the way that the kernel's `reboot=` names.
    Reboot,
    /// A kernel panic.
    Panic,
    /// Nothing: the machine stays up.
    Hang,
}

/// Ends this machine; never returns.
pub fn end(how: End) -> ! {
    rustix::fs::sync();
    // What was printed last is on its way through the serial port yet.
    let _ = rustix::termios::tcdrain(rustix::stdio::stdout());
    let outcome = match how {
        End::PowerOff => reboot(RebootCommand::PowerOff).map_err(io::Error::from),
        End::Reboot => reboot(RebootCommand::Restart).map_err(io::Error::from),
        End::Panic => fs::write("/proc/sysrq-trigger", "c"),
        End::Hang => Ok(()),
    };
    if let Err(error) = outcome {
        println!("guest-init: {how:?} failed: {error}");
    }
    loop {
        std::thread::park();
    }
}
