//! Drivers for virtual machines: one small trait, and one file for each kind of VMM.
//!
//! Every driver reports a VM's memory as [`MemoryStatus`] and leaves out what its VMM can't tell. Answers are
//! not trusted: a guest may have taken over the process at the other end. So every exchange has a time limit,
//! every answer a bound, and text for a log or a terminal is cleaned first.

pub mod ballast;
pub mod cloud_hypervisor;
pub mod firecracker;
mod foreign;
pub(crate) mod process;
pub mod qemu;
mod statistics;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use api::client::{EventSource, PeerProcess};
use api::limits::{Limits, Wanted};
use api::status::MemoryStatus;
use api::units::Bytes;
use serde::{Deserialize, Serialize};

pub use api::client::Error;

/// The guest is asked for a new report if its last one is older than this.
pub const FRESH: Duration = Duration::from_millis(20);

/// Which VMM a VM runs in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// ballast itself.
    #[default]
    Ballast,
    /// QEMU, over QMP.
    Qemu,
    /// Firecracker, over its API.
    Firecracker,
    /// Cloud Hypervisor, over its API.
    CloudHypervisor,
}

impl Kind {
    /// Whether its VMs know who paused them, so that the balancer's pauses differ from an operator's. If they
    /// don't, the balancer only advises to pause them.
    pub const fn knows_who_paused(self) -> bool {
        matches!(self, Self::Ballast)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ballast => "ballast",
            Self::Qemu => "QEMU",
            Self::Firecracker => "Firecracker",
            Self::CloudHypervisor => "Cloud Hypervisor",
        })
    }
}

/// The status of a VM and its VMM at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The VMM's process; another process is another VM. `None` if it is unknown.
    pub pid: Option<u32>,
    /// How long the VM has run; `None` if that is unknown.
    pub uptime: Option<Duration>,
    /// What the host holds for the VMM beside guest memory, if its driver counts that.
    pub overhead: Bytes,
    /// Its memory.
    pub memory: MemoryStatus,
}

/// The outcome of a driver's request.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// A connection to one VM, which makes one request at a time.
pub trait Driver: Send {
    /// The VMM's process by the kernel's word, as of the last connection, even if the VM did not answer on
    /// it.
    fn process(&self) -> PeerProcess;

    /// Gives up the connection, if one is kept between requests.
    fn hang_up(&mut self);

    /// The VM's status. If its guest's last report is not [`FRESH`], the guest is asked for another, and the
    /// VM may wait for that for `patience` (a second at most). Without patience the guest is asked too, for
    /// the next call. VMMs that ask their guests by a clock of their own tell what they have.
    fn report(&mut self, patience: Duration) -> Answer<'_, Box<Status>>;

    /// Asks the guest to have `target`. The next report tells what the VMM really took.
    fn set_target(&mut self, target: Bytes) -> Answer<'_, ()>;

    /// Sets what the administrator allows this VM. The driver of a VMM that keeps no limits keeps them while
    /// it lives.
    fn set_limits(&mut self, limits: Limits) -> Answer<'_, ()>;

    /// Takes over what the configuration allows this VM from now on. It replaces limits that were set at run
    /// time. A VMM that keeps its limits itself is left as it is.
    fn configure(&mut self, _memory: Option<Wanted>) {}

    /// Pauses the VM in the balancer's name, or ends such a pause. Doing it twice does no more than once.
    /// `None` if its VMM does not know who paused.
    fn set_paused(&mut self, _paused: bool) -> Option<Answer<'_, ()>> {
        None
    }

    /// The VM's events, if its VMM has any.
    fn events(&self) -> Option<EventSource> {
        None
    }
}
