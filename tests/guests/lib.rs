//! Real guests for tests, on hosts that can run them.
//!
//! Where the machine's own KVM can boot a stock kernel, a test runs right there. Everywhere else
//! the lab boots an emulated host, and inside it the very same test program.
//!
//! A test reads:
//! ```no_run
//! use guests::Host;
//! use lab::Kernel;
//!
//! # fn main() {
//! Host::new().guest(Kernel::V6_1).nested_paging(false).run(|| {
//!     // Runs on a host whose KVM works.
//! });
//! # }
//! ```

pub mod checks;
mod daemon;
mod host;
mod lines;
mod qemu;
mod smaps;
mod vm;

pub use daemon::Daemon;
pub use host::{Host, kvm_boots_stock_kernels, leave_the_first_root, unit_tests};
pub use lines::Printed;
pub use qemu::{Qemu, QemuSettings, qemu_with_libraries, with_libraries};
pub use smaps::{Of, sum};
pub use vm::{BOOT, Vm, VmSettings, wait_for, wait_looking_every};

use std::path::PathBuf;

use lab::{GuestImages, Kernel};

/// The `ballast` command where this runs.
///
/// # Panics
/// Where it can't be built; there is nothing to test then.
pub fn ballast() -> PathBuf {
    lab::ballast().unwrap_or_else(|error| panic!("{error}"))
}

/// A kernel's images where this runs.
///
/// # Panics
/// Where they can't be fetched or made.
pub fn images(kernel: Kernel) -> GuestImages {
    kernel.guest_images().unwrap_or_else(|error| panic!("{error}"))
}

/// Waits for an answer.
///
/// # Panics
/// Where the system gives no event loop.
pub fn block_on<T>(answer: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime can be made").block_on(answer)
}
