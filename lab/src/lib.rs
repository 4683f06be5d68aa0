//! Emulated hosts whose KVM runs real guests, on any machine.
//!
//! QEMU's software emulation has AMD's SVM with nested paging, and that of Bochs has Intel's VMX with
//! extended page tables. A Debian kernel boots in it as a host and loads its real `kvm_amd` or `kvm_intel`;
//! the first process runs one program and hands its outcome out ([`lab_init`]). Nothing of the real machine
//! is touched: no module, no setting, not even `/dev/kvm`.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use lab::{Emulator, Kernel};
//!
//! # fn main() -> Result<(), lab::Error> {
//! let host = Emulator { guests: vec![Kernel::V6_1], nested_paging: false, ..Emulator::default() };
//! let outcome = host.run(Path::new("/bin/ballast"), &["check"])?;
//! println!("it ended with {}", outcome.code);
//! # Ok(())
//! # }
//! ```

pub mod archive;
mod artifacts;
mod bochs;
mod cache;
mod cores;
mod debian;
mod emulator;
mod ending;
mod error;
mod installed;
mod kernels;
mod keyboard;
mod machine;
mod modules;
mod output;
mod packages;
pub mod progress;
pub mod promtool;
mod qemu;
pub mod schemathesis;

pub use artifacts::{agent, ballast, unit_tests};
pub use bochs::RECORDS;
pub use debian::DebianImage;
pub use emulator::{Attempt, Emulator, Init, Outcome, Terminal, inside, time_is_emulated};
pub use error::Error;
pub use installed::InstalledKernel;
pub use kernels::{GuestImages, Kernel};
pub use lab_init::results::hand_out;
pub use machine::{Execution, Vendor};

/// Set for programs in an emulated host, to the paging that its KVM uses: `nested` or `shadow`.
pub const INSIDE: &str = "BALLAST_LAB";
/// Set beside it to `emulated` where an emulator makes the host's time: its processor may not tell.
pub const TIME: &str = "BALLAST_LAB_TIME";
/// Where an emulated host's first process lies.
pub const INIT: &str = "/lab/init";
