//! The lab: hosts that can run real KVM guests, on any machine.
//!
//! Where the machine's own KVM can boot a stock kernel, a test runs right
//! there. Everywhere else the lab boots an emulated host: QEMU's software
//! emulation of an AMD processor with SVM and nested paging, a Debian kernel
//! with its real `kvm_amd`, and inside it the very same test program.
//!
//! A test reads:
//! ```no_run
//! use lab::{Host, Kernel};
//!
//! # fn main() {
//! Host::new().guest(Kernel::V6_1).nested_paging(false).run(|| {
//!     // Runs on a host whose KVM works.
//! });
//! # }
//! ```

mod archive;
mod artifacts;
mod cache;
mod cores;
mod daemon;
pub mod emulator;
mod host;
mod kernels;
mod modules;
mod output;
mod packages;
pub mod promtool;
mod qemu;
pub mod schemathesis;
mod vm;

pub use artifacts::{agent, ballast};
pub use daemon::Daemon;
pub use emulator::{Emulator, Outcome, Results};
pub use host::{Host, inside, kvm_boots_stock_kernels};
pub use kernels::{GuestImages, Kernel};
pub use qemu::{Qemu, QemuSettings, qemu_with_libraries};
pub use vm::{BOOT, Of, Vm, VmSettings, sum, wait_for, wait_looking_every};
