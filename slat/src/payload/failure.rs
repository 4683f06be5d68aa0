//! Why a payload gave no measurement.

use std::io;
use std::time::Duration;

use api::units::Bytes;

use super::memory::Backing;
use super::tables;
use crate::counters;

/// Why a payload gave no measurement.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The setup asks for something that can't be.
    #[error("this payload can't be set up so: {0}")]
    Setup(String),
    /// Memory could not be had.
    #[error("no {backing} memory for the guest ({size}): {source}{advice}", backing = backing.name(), advice = advice(*backing))]
    Memory {
        /// The backing asked for.
        backing: Backing,
        /// How much.
        size: Bytes,
        /// The kernel's answer.
        source: io::Error,
    },
    /// /dev/kvm can't be used at all.
    #[error("{0}")]
    NoKvm(String),
    /// KVM refused something.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: kvm_ioctls::Error,
    },
    /// Guest memory could not be written.
    #[error("guest memory could not be set up: {0}")]
    GuestMemory(String),
    /// Statistics could not be read.
    #[error(transparent)]
    Counters(#[from] counters::Error),
    /// Nothing came back in time.
    #[error("the payload did not finish within {} s and was stopped", .0.as_secs_f64())]
    Hung(Duration),
    /// The user asked to stop.
    #[error("stopped before it finished")]
    Interrupted,
    /// The guest died.
    #[error("the guest died of a triple fault")]
    TripleFault,
    /// The host emulates guest code and can't do this instruction.
    #[error(
        "this host emulates ring 0 and its emulator can't run the payload (offset {offset:#x}, bytes {bytes})"
    )]
    Emulator {
        /// Bytes from the start of the payloads' code.
        offset: u64,
        /// The instruction's first bytes.
        bytes: String,
    },
    /// The guest left for a reason that no payload has.
    #[error("the guest left unexpectedly: {0}")]
    Unexpected(String),
    /// The kernel gave no thread for a vCPU.
    #[error("no thread for a vCPU: {0}; raise the limit on processes (ulimit -u) or on memory (ulimit -v)")]
    NoThread(io::Error),
    /// A vCPU's thread died.
    #[error("a vCPU's thread ended without a word")]
    Thread,
}

impl Failure {
    /// Whether this host lacks what the payload takes, which is no fault of the run: huge pages that nobody set
    /// aside, an instruction that the host's emulator can't do, KVM as a whole.
    pub const fn is_lack(&self) -> bool {
        match self {
            Self::Memory { backing, .. } => {
                matches!(backing, Backing::Hugetlb2M | Backing::Hugetlb1G)
            }
            Self::Emulator { .. } | Self::NoKvm(_) => true,
            _ => false,
        }
    }
}

const fn advice(backing: Backing) -> &'static str {
    match backing {
        Backing::Small | Backing::Transparent => "",
        Backing::Hugetlb2M => "; set some aside with `sysctl vm.nr_hugepages=N`",
        Backing::Hugetlb1G => "; set some aside with `hugepagesz=1G hugepages=N` at boot",
    }
}

/// `map_err` with what was asked of KVM.
pub(super) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Failure {
    move |source| Failure::Kvm { what, source }
}

/// `map_err` for guest memory.
pub(super) fn memory_error(error: impl std::fmt::Display) -> Failure {
    Failure::GuestMemory(error.to_string())
}

impl From<tables::Error> for Failure {
    fn from(error: tables::Error) -> Self {
        memory_error(error)
    }
}
