//! One VM as its API tells it: the words between a VM and whoever looks at it or balances it.

mod devices;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::devices::{
    CONSOLE_PROTOCOL, ConsoleStatus, DiskCount, DiskStatus, NetCount, NetStatus, ResizeRequest,
    VSOCK_PROTOCOL,
};
use crate::agent::AgentStatus;
use crate::guest_memory::GuestMemory;
use crate::limits::Limits;
use crate::report::Report;
use crate::units::Bytes;

/// How long a guest may unplug nothing until its balloon helps.
///
/// A driver answers within milliseconds; one block of 128 MiB that has to be
/// emptied first takes longer.
pub const UNPLUG_PATIENCE: Duration = Duration::from_secs(3);

/// `GET /memory`: everything about one VM's memory at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// What the administrator set.
    pub limits: Limits,
    /// What the guest was last asked to have.
    pub target: Bytes,
    /// What the guest has: what it was given, less what its own kernel does not manage, by its word.
    pub actual: Bytes,
    /// What the guest was given, and could touch: what it started with and what it has plugged, less the
    /// balloon, as its driver says. `None` where the VMM does not tell it apart from `actual`.
    #[serde(default)]
    pub given: Option<Bytes>,
    /// The most that the guest can have, as far as its kernel manages it; `None` where that is not known.
    #[serde(default)]
    pub most: Option<Bytes>,
    /// The guest could not reach the target: it stays at `actual` until a target is set anew.
    #[serde(default)]
    pub settled: bool,
    /// Whether the guest has been at a target since its driver started; `None` where the VMM does
    /// not tell. Before that it is on its way from all of its map to the first target, and has not
    /// touched most of what it gives up; after that it may have touched all that it has.
    #[serde(default)]
    pub followed: Option<bool>,
    /// Who paused the VM; `None` for one that is not paused, or whose VMM does not tell.
    #[serde(default)]
    pub paused_by: Option<Pauser>,
    /// Guest memory that the host really holds (resident pages of the mapping); `None` where it could not be
    /// counted.
    pub host_rss: Option<Bytes>,
    /// How much of that lies in huge pages of the host and is mapped as such, which makes every
    /// walk of the second-level page tables shorter; `None` where it is not known.
    #[serde(default)]
    pub host_huge: Option<Bytes>,
    /// How the guest's balloon driver is doing.
    pub driver: DriverState,
    /// The guest's last report, if it ever sent one.
    pub report: Option<AgedReport>,
    /// The guest's agent, if it was ever heard.
    #[serde(default)]
    pub agent: Option<AgentStatus>,
    /// What the balloon has counted since the VM started.
    pub counters: BalloonCounters,
    /// How the guest's memory is plugged; `None` for a VM that grows by its balloon alone.
    #[serde(default)]
    pub plug: Option<PlugStatus>,
    /// What is kept plugged for a guest that runs out of memory; `None` for a VM that grows by its balloon alone.
    #[serde(default)]
    pub cushion: Option<CushionStatus>,
    /// What the guest took of its balloon rather than run out of memory; `None` where it never did since its
    /// driver started.
    #[serde(default)]
    pub oom_deflate: Option<OomDeflate>,
}

/// How long after its balloon's driver a guest's virtio-mem driver may come until it is called missing.
pub const PLUG_DRIVER_PATIENCE: Duration = Duration::from_secs(60);

impl PlugStatus {
    /// Whether the guest is to plug memory and has no driver for it that is still to come.
    pub fn lacks_driver(&self) -> bool {
        self.lacks_driver_ms.is_some_and(|ms| Duration::from_millis(ms) >= PLUG_DRIVER_PATIENCE)
    }
}

impl MemoryStatus {
    /// A VM with a memory map of `map` that has no devices yet.
    pub fn before_the_start(limits: Limits, map: Bytes) -> Self {
        Self {
            limits,
            target: limits.startup(),
            actual: map,
            given: Some(map),
            most: Some(map),
            settled: false,
            followed: Some(false),
            paused_by: None,
            host_rss: Some(Bytes::ZERO),
            host_huge: None,
            driver: DriverState::Absent,
            report: None,
            agent: None,
            counters: BalloonCounters::default(),
            plug: None,
            cushion: None,
            oom_deflate: None,
        }
    }

    /// The most that the guest can have with the kernel and the drivers that it has: its limit, or what its
    /// kernel manages, or, in a VM that grows by plugging and whose guest lacks the driver for it, what it
    /// has already.
    pub fn ceiling(&self) -> Bytes {
        let max = self.limits.max().min(self.most.unwrap_or(Bytes(u64::MAX)));
        match &self.plug {
            Some(plug) if plug.driver != DriverState::Active => {
                max.min(plug.boot.saturating_add(plug.plugged))
            }
            _ => max,
        }
    }

    /// What the guest uses and can't give up without pain, as it last said. All of one moment, and no more
    /// than its kernel managed then.
    pub fn used(&self) -> Option<Bytes> {
        Some(self.guest()?.used(self.actual))
    }

    /// What the guest last said of its memory: by its balloon's driver or by an agent that is there,
    /// whichever is newer. Both read the same figures of the guest's kernel.
    pub fn guest(&self) -> Option<GuestMemory> {
        let said = |age_ms, had, managed, spare| GuestMemory {
            age: Duration::from_millis(age_ms),
            had,
            managed,
            spare,
        };
        let report = self.report.as_ref();
        let report = report.and_then(|aged| {
            // A balloon may be in the total, and then nobody but the VMM knows what is managed.
            Some(said(
                aged.age_ms,
                aged.had,
                aged.managed.or(aged.statistics.total),
                aged.statistics.spare()?,
            ))
        });
        let agent = self.agent.as_ref().filter(|agent| agent.connected);
        let agent = agent.and_then(|agent| {
            let AgentStatus { age_ms, had, managed, figures, .. } = *agent;
            Some(said(age_ms, had, managed.or(figures.total), figures.available?))
        });
        report.into_iter().chain(agent).min_by_key(|said| said.age)
    }

    /// What the guest was given and its kernel does not manage, by its own word.
    pub fn unmanaged(&self) -> Bytes {
        self.given.map_or(Bytes::ZERO, |given| given.saturating_sub(self.actual))
    }

    /// The share of what the host holds that lies in huge pages, in percent.
    pub fn huge_percent(&self) -> Option<u8> {
        let huge = u128::from(self.host_huge?.0);
        let whole = u128::from(self.host_rss?.0);
        if whole == 0 {
            return None;
        }
        // The two are counted one after the other.
        Some(u8::try_from(huge * 100 / whole).unwrap_or(100).min(100))
    }
}

/// A report and how long ago it came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgedReport {
    /// Milliseconds since the guest handed it over.
    pub age_ms: u64,
    /// What the guest had when it made the report: what its kernel managed, and the share that every kernel
    /// has for itself. `None` where it is not known.
    #[serde(default)]
    pub had: Option<Bytes>,
    /// What of that its kernel managed: its total less its balloon. `None` where it is not known.
    #[serde(default)]
    pub managed: Option<Bytes>,
    /// What it says.
    pub statistics: Report,
}

/// How far a guest's balloon driver can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverState {
    /// No driver has set the device up: no target can be reached.
    Absent,
    /// Set up, and answers statistics requests (or offers no statistics).
    Active,
    /// Set up, but a statistics request has gone unanswered for too long.
    Silent,
    /// It broke the protocol; the device asked for a reset and waits.
    Broken,
}

/// Memory that is plugged into a guest and unplugged again (virtio-mem).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlugStatus {
    /// How the guest's virtio-mem driver is doing.
    pub driver: DriverState,
    /// Milliseconds for which the guest has had a balloon driver that works and no virtio-mem driver that does;
    /// `None` where it has both, or neither.
    #[serde(default)]
    pub lacks_driver_ms: Option<u64>,
    /// What the guest booted with, which can't be unplugged.
    pub boot: Bytes,
    /// What is plugged and unplugged in.
    pub block: Bytes,
    /// What the guest was last asked to have plugged.
    pub requested: Bytes,
    /// What it has plugged, by the device's own count. More than `requested` is what the guest
    /// has not unplugged yet, or can't.
    pub plugged: Bytes,
    /// What the device has counted since the VM started.
    pub counters: PlugCounters,
}

/// What a guest took back of its balloon rather than run out of memory (virtio: deflate on OOM).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OomDeflate {
    /// What it has of that still, above its target.
    pub taken: Bytes,
    /// What it had when it last took something, all of which it used.
    pub had: Bytes,
    /// Milliseconds since then.
    pub age_ms: u64,
}

/// Memory that is plugged beyond a guest's target and held by its balloon. It costs the host nothing, and a guest
/// that runs out of memory has it at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CushionStatus {
    /// How much there shall be.
    pub size: Bytes,
    /// How much the balloon holds now, which the guest can take at once. It may be more than there shall be: what the
    /// target has fallen by is unplugged later.
    pub held: Bytes,
}

/// What the virtio-mem device has counted since the VM started; monotonic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlugCounters {
    /// Memory plugged by the guest, in bytes.
    pub plugged: Bytes,
    /// Memory unplugged by the guest, in bytes.
    pub unplugged: Bytes,
    /// Unplugged memory given back to the host, in bytes.
    pub discarded: Bytes,
    /// Discards the host refused.
    pub discard_failures: u64,
    /// Requests that the host could not carry out.
    pub refused: u64,
    /// Malformed descriptor chains handed back to the guest.
    pub malformed: u64,
}

/// What the balloon device has counted since the VM started; monotonic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BalloonCounters {
    /// Pages taken from the guest, in bytes.
    pub inflated: Bytes,
    /// Pages given back to the guest, in bytes.
    pub deflated: Bytes,
    /// Of those, what the guest took rather than run out of memory.
    pub oom_deflated: Bytes,
    /// Free pages reported by the guest, in bytes.
    pub reported: Bytes,
    /// Memory given back to the host, in bytes.
    pub discarded: Bytes,
    /// Ranges those discards were merged into.
    pub discard_ranges: u64,
    /// System calls they took.
    pub discard_calls: u64,
    /// Discards the host refused.
    pub discard_failures: u64,
    /// Blocks of 2 MiB that went back in one go, so that no huge page was split.
    pub huge_pages_whole: u64,
    /// Blocks of 2 MiB of which only a part went back, so that a huge page there was split.
    pub huge_pages_broken: u64,
    /// Malformed descriptor chains handed back to the guest.
    pub malformed: u64,
    /// Requests for statistics sent to the guest.
    pub statistics_requests: u64,
    /// Reports received.
    pub reports: u64,
}

/// `PUT /memory/target`: what the guest should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetRequest {
    /// Wanted memory; must lie in the limits.
    pub target: Bytes,
}

/// Who paused a VM, and so who may let it run on: the balancer only what it paused itself, an
/// operator any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pauser {
    /// Somebody who steers this VM by hand or by a program of their own.
    #[default]
    Operator,
    /// The balancer, as memory ran out.
    Balancer,
    /// The VM itself, as the host could not do what its guest asked of a disk.
    Disk,
}

/// The body of `POST /vm/pause` and `POST /vm/resume`: in whose name. No body is an operator's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PauseRequest {
    /// Who asks.
    pub by: Pauser,
}

/// Where a VM stands in its life. Written as the field `state`, beside `paused_by` where it is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum VmState {
    /// Set up, its vCPUs have not run yet.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its guest has fallen asleep (suspend-to-idle), as it says: its vCPUs run when something wakes it.
    Sleeping,
    /// Its vCPUs stand still; its memory stays.
    Paused {
        /// Who paused it.
        #[serde(rename = "paused_by", default)]
        by: Pauser,
    },
    /// It has ended; the process is about to.
    Stopped,
}

impl VmState {
    /// Who paused it; `None` where it is not paused.
    pub const fn paused_by(self) -> Option<Pauser> {
        match self {
            Self::Paused { by } => Some(by),
            Self::Created | Self::Running | Self::Sleeping | Self::Stopped => None,
        }
    }
}

/// A directory of the host that a guest mounts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareStatus {
    /// What it is called in its VM.
    pub id: String,
    /// The directory, as it was named.
    pub path: String,
    /// What the guest mounts it by.
    pub tag: String,
    /// Whether the guest may not write.
    pub readonly: bool,
    /// Whether the process that does the work is there; without it the guest waits in vain.
    pub serves: bool,
}

/// `GET /vm`: what this VM is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name, which is also its socket's.
    pub name: String,
    /// The process that is it.
    pub pid: u32,
    /// Where it stands.
    #[serde(flatten)]
    pub state: VmState,
    /// Its vCPUs.
    pub cpus: u8,
    /// Milliseconds since it started.
    pub uptime_ms: u64,
    /// ballast's version.
    pub version: String,
    /// What has become of its console's output; `None` for a VM without one, or one that does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleStatus>,
    /// Its disks; none for a VM of an older version.
    #[serde(default)]
    pub disks: Vec<DiskStatus>,
    /// Its network cards; none for a VM of an older version.
    #[serde(default)]
    pub nets: Vec<NetStatus>,
    /// Its shared directories; none for a VM of an older version.
    #[serde(default)]
    pub shares: Vec<ShareStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> MemoryStatus {
        MemoryStatus {
            target: Bytes::mib(300),
            most: None,
            followed: Some(true),
            host_rss: Some(Bytes::mib(200)),
            driver: DriverState::Active,
            ..MemoryStatus::before_the_start("256M,max=1G".parse().unwrap(), Bytes::mib(300))
        }
    }

    #[test]
    fn used_is_what_the_guest_has_less_what_it_could_spare() {
        let mut status = status();
        assert_eq!(status.used(), None);
        // The guest's total still holds the balloon.
        let mut statistics =
            Report { total: Some(Bytes::mib(500)), available: Some(Bytes::mib(180)), ..Report::default() };
        let aged = |statistics| AgedReport { age_ms: 1, had: None, managed: None, statistics };
        status.report = Some(aged(statistics.clone()));
        assert_eq!(status.used(), Some(Bytes::mib(120)));
        statistics.available = Some(Bytes(u64::MAX));
        status.report = Some(aged(statistics));
        assert_eq!(status.used(), Some(Bytes::ZERO), "a liar can't make it wrap");
        assert_eq!(status.huge_percent(), None);
        for (huge, percent) in [(0, 0), (50, 25), (200, 100), (300, 100)] {
            status.host_huge = Some(Bytes::mib(huge));
            assert_eq!(status.huge_percent(), Some(percent));
        }
        for unknown in [Some(Bytes::ZERO), None] {
            status.host_rss = unknown;
            assert_eq!(status.huge_percent(), None);
        }
    }

    #[test]
    fn the_state_is_one_word_and_who_paused_stands_beside_it() {
        let mut vm = VmStatus {
            name: "web".to_owned(),
            pid: 1,
            state: VmState::Running,
            cpus: 1,
            uptime_ms: 1,
            version: "0".to_owned(),
            console: Some(ConsoleStatus::default()),
            nets: vec![NetStatus::default()],
            shares: vec![ShareStatus::default()],
            disks: vec![DiskStatus { failure: Some("full".to_owned()), ..DiskStatus::default() }],
        };
        let json = serde_json::to_value(&vm).unwrap();
        assert_eq!((json["state"].as_str(), json.get("paused_by")), (Some("running"), None));
        assert_eq!(serde_json::from_value::<VmStatus>(json).unwrap(), vm);
        vm.state = VmState::Paused { by: Pauser::Balancer };
        let mut json = serde_json::to_value(&vm).unwrap();
        assert_eq!((json["state"].as_str(), json["paused_by"].as_str()), (Some("paused"), Some("balancer")));
        assert_eq!(serde_json::from_value::<VmStatus>(json.clone()).unwrap(), vm);
        json.as_object_mut().unwrap().remove("paused_by");
        let told_by_an_older_one: VmStatus = serde_json::from_value(json).unwrap();
        assert_eq!(told_by_an_older_one.state.paused_by(), Some(Pauser::Operator));
    }

    #[test]
    fn a_guest_without_the_driver_grows_no_further() {
        let plug = PlugStatus {
            driver: DriverState::Active,
            lacks_driver_ms: None,
            boot: Bytes::mib(256),
            block: Bytes::mib(2),
            requested: Bytes::mib(300),
            plugged: Bytes::mib(64),
            counters: PlugCounters::default(),
        };
        let mut status = status();
        assert_eq!(status.ceiling(), Bytes::gib(1));
        status.plug = Some(plug);
        assert_eq!(status.ceiling(), Bytes::gib(1));
        status.plug = Some(PlugStatus { driver: DriverState::Absent, ..plug });
        assert_eq!(status.ceiling(), Bytes::mib(320));
    }
}
