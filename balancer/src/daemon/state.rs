//! What the daemon tells about itself: `GET /state`.

use api::limits::Limits;
use api::status::Pauser;
use api::units::Bytes;
use serde::{Deserialize, Serialize};

use super::reservation::ReservationView;
use crate::driver::Kind;
use crate::policy::guards::Standing;
use crate::policy::host_state::HostState;
use crate::policy::reason::Reason;

/// The host and every VM at the end of a round.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Rounds since the daemon started.
    pub rounds: u64,
    /// The host.
    pub host: HostView,
    /// The VMs, by name.
    pub vms: Vec<VmView>,
    /// Room for VMs that are about to start, by name.
    #[serde(default)]
    pub reservations: Vec<ReservationView>,
}

/// The host's side.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HostView {
    /// `MemTotal`.
    pub total: Bytes,
    /// `MemAvailable`, and what ZFS would give of its cache.
    pub available: Bytes,
    /// What all VMs together may hold.
    pub budget: Bytes,
    /// What they may hold as things stand.
    pub charged: Bytes,
    /// What is left of the budget.
    pub free: Bytes,
    /// How far they are over it.
    pub over: Bytes,
    /// What VMs are entitled to and can't get yet.
    pub unserved: Bytes,
    /// How short the host is.
    pub state: HostState,
    /// Rounds in which VMs were charged more than the budget.
    pub rounds_over_budget: u64,
    /// How much of the last ten seconds some task on the host waited for memory, in percent; absent if the
    /// kernel does not tell.
    #[serde(default)]
    pub pressure_percent: Option<f64>,
}

/// One VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Which VMM it runs in.
    #[serde(default)]
    pub vmm: Kind,
    /// How it stands.
    pub standing: Standing,
    /// Who paused it; absent if it is not paused or its VMM does not tell.
    #[serde(default)]
    pub paused_by: Option<Pauser>,
    /// Its memory; absent if it never answered.
    pub memory: Option<MemoryView>,
    /// What the host holds for the process of a VM that never answered, which is its charge; absent for
    /// others, and if it is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<Bytes>,
    /// Milliseconds since the guest's last report reached the VM.
    pub report_age_ms: Option<u64>,
    /// The last decision about it.
    pub last_reason: Option<Reason>,
    /// Targets raised.
    pub grows: u64,
    /// Targets lowered.
    pub shrinks: u64,
    /// Requests that failed.
    pub errors: u64,
}

/// Whether it is known which process holds a VM's memory, and if not, why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holder {
    /// Nobody was connected to the VM yet.
    #[default]
    NotMet,
    /// The kernel says what the VM's process holds.
    Known,
    /// The process lives in another PID namespace. Its own count, or else all that the VM has, counts as held.
    OtherPidNamespace,
    /// The kernel does not show that process (`hidepid`). As with [`Holder::OtherPidNamespace`].
    Hidden,
}

/// The memory of one VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemoryView {
    /// What the administrator set.
    pub limits: Limits,
    /// What the guest uses, if it ever reported.
    pub used: Option<Bytes>,
    /// Its use with its buffer.
    pub demand: Bytes,
    /// What it may have now.
    pub entitlement: Bytes,
    /// What it is asked to have.
    pub target: Bytes,
    /// What it has.
    pub actual: Bytes,
    /// What it was given beside that and its kernel does not manage, by its guest's word.
    #[serde(default)]
    pub unmanaged: Bytes,
    /// What the host holds of its guest's memory, if that is known.
    pub host_rss: Option<Bytes>,
    /// Whether it is known which process holds that.
    #[serde(default)]
    pub holder: Holder,
    /// The share of that in huge pages of the host, in percent, if that is known.
    #[serde(default)]
    pub huge_percent: Option<u8>,
    /// What the host holds for its VMM beside that, as far as it is counted.
    #[serde(default)]
    pub overhead: Bytes,
    /// What it is charged.
    pub charge: Bytes,
    /// What its control groups allow its process, if one of them has a limit: it is given no more.
    #[serde(default)]
    pub cgroup_limit: Option<Bytes>,
    /// Its memory lies in the host's reserved huge pages (hugetlb): it is no part of the budget, is not moved
    /// and charged nothing; what its process holds of ordinary memory is its `overhead`.
    #[serde(default)]
    pub reserved_huge_pages: bool,
}
