//! How the balancer speaks to virtual machines: one small trait, and one file for each kind of VMM.
//!
//! Every driver gives a VM's memory in ballast's own words ([`MemoryStatus`]),
//! whatever its VMM calls them, and says by leaving things out what that VMM
//! can't tell. What comes back is not trusted: a guest may have taken over the
//! process at the other end. So every exchange has a time limit, every answer a
//! bound, and text that ends up in a log or on a terminal is cleaned first.

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

use api::client::EventSource;
use api::limits::{Limits, Wanted};
use api::status::MemoryStatus;
use api::units::Bytes;
use serde::{Deserialize, Serialize};

pub use api::client::Error;

/// A guest's report that is older than this is news of the past: the guest is asked for another.
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
    /// Whether its VMs know who paused them, so that the balancer's pauses can be told from an
    /// operator's. Where they don't, the balancer advises to pause and pauses nobody.
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

/// What a VM and its VMM say at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The VMM's process; another one is another VM. `None` where that is unknown.
    pub pid: Option<u32>,
    /// How long the VM has run; `None` where that is unknown.
    pub uptime: Option<Duration>,
    /// What the host holds for the VMM beside guest memory, where that is worth counting.
    pub overhead: Bytes,
    /// Its memory.
    pub memory: MemoryStatus,
}

/// What a driver's request comes to.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// A way to one VM. Whoever holds it makes one request at a time.
pub trait Driver: Send {
    /// The VMM's process by the kernel's word, as of the last connection, whether the VM answered on it or
    /// not. `None` before the first, and where the process lives in another PID namespace.
    fn process(&self) -> Option<u32>;

    /// How the VM stands. Where its guest's last report is not [`FRESH`], the guest is asked for another,
    /// and the VM may wait for it, for `patience` (a second at most). Without patience the guest is asked
    /// all the same, for the sake of the next call. VMMs that don't let themselves be told when to ask
    /// their guests tell what they have.
    fn report(&mut self, patience: Duration) -> Answer<'_, Box<Status>>;

    /// Asks the guest to have `target`. What the VMM really took is in the next report.
    fn set_target(&mut self, target: Bytes) -> Answer<'_, ()>;

    /// Sets what the administrator allows this VM. A VMM that keeps no limits
    /// has them kept by its driver, for as long as that lives.
    fn set_limits(&mut self, limits: Limits) -> Answer<'_, ()>;

    /// Takes over what the configuration allows this VM from now on, which goes before limits that
    /// were set at run time. A VMM that keeps its limits itself is left as it is.
    fn configure(&mut self, _memory: Option<Wanted>) {}

    /// Pauses the VM in the balancer's name, or lets it run on where that pause is still the
    /// balancer's; done twice it is done once. `None` where its VMM does not know who paused.
    fn set_paused(&mut self, _paused: bool) -> Option<Answer<'_, ()>> {
        None
    }

    /// A way to hear what the VM says unasked, where its VMM has one.
    fn events(&self) -> Option<EventSource> {
        None
    }
}
