//! What is believed about a VM's memory, and whose word it is.
//!
//! A guest may have taken its VMM over, and a VMM that hangs says nothing new. So the kernel's word about the
//! process at the other end of the socket decides what the host holds for a VM. The VM's own count is taken
//! where it differs from the kernel's by no more than a VMM may hold for itself. While the VM is silent, the
//! process is looked at again.
//!
//! Where it is not known which process holds a VM's memory (one in another PID namespace, `hidepid`), its own
//! count is taken as far as its target, its size or its limits go, or else all that it has. It is charged that,
//! and the same counts as gone from the host's free memory: on both sides or on none. Counted on one side alone,
//! its memory would be taken twice from the others.
//!
//! What a VM may have (its limits, its target, its size) is its own word or the configuration's. It is
//! believed up to the host's memory, or up to the limit of the VM's control groups where that is less: beyond
//! it the kernel kills the VM. A VM that claims to have more than the host, to need more, or to have no
//! driver and a `max` beyond the host, is believed nothing. It is left as it is, and is charged what its
//! process holds or what it was granted, whichever is more. That holds for limits of the configuration too:
//! they say what a VM should have, and not what its process has.
//!
//! A VM that says that the balancer paused it touches nothing more. One whose process grows all the same runs,
//! and is charged as one that runs.
//!
//! Reserved huge pages (hugetlb) are a pool of their own: the kernel counts none of it as available, and
//! nobody else can have what a VM gives up of it. A VM whose process holds any is no part of the budget,
//! except for what its process holds beside them.

use std::time::Duration;

use api::client::PeerProcess;
use api::limits::{Limits, SMALLEST};
use api::status::{DriverState, Pauser};
use api::units::Bytes;
use tracing::{info, warn};

use super::log_limiter::LogLimiter;
use super::state::Holder;
use crate::driver::process::ResidentMemory;
use crate::host::HostReader;
use crate::policy::{Observation, Vcpus, guards};

/// The most that a VMM of ballast's holds beside guest memory.
const VMM_OWN_MOST: Bytes = Bytes::mib(64);

/// How often the limits of a VM's control groups are read: an operator changes them seldom.
const READ_LIMIT_EVERY: Duration = Duration::from_secs(10);

/// What the host holds for the process at the other end of a VM's socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Held {
    /// Nobody was connected yet.
    #[default]
    NotMet,
    /// The kernel says so.
    Known(ResidentMemory),
    /// It is not known which process that is.
    Outside,
    /// The kernel shows nothing of that process.
    Hidden,
}

impl Held {
    fn by(process: PeerProcess, host: &HostReader) -> Self {
        match process {
            PeerProcess::NotMet => Self::NotMet,
            PeerProcess::Outside => Self::Outside,
            PeerProcess::Listener(pid) | PeerProcess::Writer(pid) => {
                host.resident_memory(pid).map_or(Self::Hidden, Self::Known)
            }
        }
    }

    const fn known(self) -> Option<ResidentMemory> {
        match self {
            Self::Known(memory) => Some(memory),
            Self::NotMet | Self::Outside | Self::Hidden => None,
        }
    }
}

/// What is known of one VM's memory that it did not say itself.
#[derive(Debug, Default)]
pub struct Account {
    /// The process at the other end of its socket.
    process: PeerProcess,
    /// What the host holds for that.
    held: Held,
    /// It was logged that this is not known.
    said_unknown: bool,
    /// What counts as held is all that it has, as nobody says more.
    assumed: bool,
    /// The part of it that is not the guest's.
    vmm_own: Bytes,
    /// What the balancer last granted it.
    granted: Bytes,
    /// What the control groups of the process allow, where one of them has a limit.
    cgroup_limit: Option<Bytes>,
    /// When that was read.
    limit_read: Option<Duration>,
    /// The least that its process held while it said that the balancer had paused it.
    while_paused: Option<Bytes>,
    /// Its memory lies in the host's reserved huge pages. Once seen, this stays.
    reserved: bool,
    /// What it says that it may have is not believed.
    disbelieved: bool,
    size_log: LogLimiter,
    pause_log: LogLimiter,
}

impl Account {
    /// Notes which process it is, and what the kernel says of that.
    pub fn look(&mut self, now: Duration, process: PeerProcess, host: &HostReader) {
        if self.process != process {
            *self = Self { process, ..Self::default() };
        }
        self.look_again(now, host);
    }

    /// The process at the other end of its socket.
    pub const fn process(&self) -> PeerProcess {
        self.process
    }

    /// Looks again at the same process.
    pub fn look_again(&mut self, now: Duration, host: &HostReader) {
        self.held = Held::by(self.process, host);
        self.reserved |= self.held.known().is_some_and(|memory| memory.reserved > Bytes::ZERO);
        if self.limit_read.is_none_or(|then| now.saturating_sub(then) >= READ_LIMIT_EVERY) {
            // What can't be read now is no limit that has gone.
            match self.process.pid().map(|pid| host.cgroup_limit(pid)) {
                Some(Ok(limit)) => (self.cgroup_limit, self.limit_read) = (limit, Some(now)),
                Some(Err(_)) => {}
                None => self.cgroup_limit = None,
            }
        }
    }

    /// Notes that its memory lies in reserved huge pages, though it may not have touched any yet.
    pub fn reserves(&mut self) {
        self.reserved = true;
    }

    /// Whether its memory lies in the host's reserved huge pages.
    pub fn is_reserved(&self) -> bool {
        self.reserved
    }

    /// What the control groups of its process allow, where one of them has a limit.
    pub fn cgroup_limit(&self) -> Option<Bytes> {
        self.cgroup_limit
    }

    /// What of the host's ordinary memory its process holds, where the kernel says so.
    pub fn ordinary(&self) -> Bytes {
        self.held.known().map_or(Bytes::ZERO, |memory| memory.ordinary)
    }

    /// Whether it is known which process holds its memory.
    pub const fn holder(&self) -> Holder {
        match self.held {
            Held::NotMet => Holder::NotMet,
            Held::Known(_) => Holder::Known,
            Held::Outside => Holder::OtherPidNamespace,
            Held::Hidden => Holder::Hidden,
        }
    }

    /// What of `counted` is somebody's count, and not an assumption.
    pub fn told(&self, counted: Option<Bytes>) -> Option<Bytes> {
        counted.filter(|_| !self.assumed)
    }

    /// Notes that it took a target.
    pub fn granted(&mut self, target: Bytes) {
        self.granted = target;
    }

    /// What of a VM's words is believed on a host with `total` memory. `overhead` is what its driver
    /// found that the VMM holds beside guest memory.
    pub fn believe(
        &mut self,
        now: Duration,
        name: &str,
        observed: Observation,
        overhead: Bytes,
        total: Bytes,
    ) -> Observation {
        self.say_if_unknown(name, observed);
        let host_rss = self.host_rss(&observed, overhead);
        self.vmm_own = self.all().saturating_sub(host_rss.unwrap_or_default());
        let vcpus = self.vcpus(now, name, observed.vcpus);
        let observed = Observation { host_rss, vcpus, ..observed };
        let Observation { limits, target, actual, driver, .. } = observed;
        let has = limits.min().max(target).max(actual);
        self.disbelieved = has > total || (limits.max() > total && driver == DriverState::Absent);
        if self.disbelieved {
            let known = self.known(observed, total);
            if self.size_log.is_due(now, "size") {
                warn!(
                    vm = name,
                    "{name} says that it has {}, which is more than the {total} of this host: that is not \
                     believed, and it is charged the {} that the host holds for its process",
                    has.max(limits.max()),
                    known.limits.max()
                );
            }
            return known;
        }
        let most = self.cgroup_limit.unwrap_or(total).min(total);
        if limits.max() <= most {
            if self.size_log.end() {
                info!(vm = name, "the max of {name} is no longer more than it can have");
            }
        } else if let Some(limit) = self.cgroup_limit.filter(|limit| *limit < total) {
            if self.size_log.is_due(now, "cgroup") {
                warn!(
                    vm = name,
                    "the control group of {name} allows it {limit}, and its max is {}: it is given no more than \
                     the control group allows, as the kernel would kill it; raise memory.max or lower max",
                    limits.max()
                );
            }
        } else if self.size_log.is_due(now, "max") {
            warn!(
                vm = name,
                "the max of {} that {name} has is more than this host: it counts as {total}",
                limits.max()
            );
        }
        Observation { limits: limits.capped(most), ..observed }
    }

    /// Logs once that nobody knows which process holds its memory.
    fn say_if_unknown(&mut self, name: &str, observed: Observation) {
        let why = match self.held {
            Held::NotMet | Held::Known(_) => {
                if std::mem::take(&mut self.said_unknown) {
                    info!(vm = name, "it is known again which process holds the memory of {name}");
                }
                return;
            }
            Held::Outside => {
                "its process lives in another PID namespace: run the balancer in that of the host \
                 (containers: --pid=host)"
            }
            Held::Hidden => {
                "the kernel does not show its process to this user: run the balancer as root, or as a member of \
                 the group that /proc's mount option gid= names"
            }
        };
        if std::mem::replace(&mut self.said_unknown, true) {
            return;
        }
        let counted = match observed.host_rss {
            Some(_) => "what it counts itself".to_owned(),
            None => format!("all of the {} that it has", observed.given()),
        };
        warn!(vm = name, "nobody knows what the host holds for {name}, and {counted} counts as that: {why}");
    }

    /// All that the host holds for its process, where the kernel says so.
    fn all(&self) -> Bytes {
        self.held.known().map_or(Bytes::ZERO, ResidentMemory::all)
    }

    /// What counts as held for the guest: the VM's count within what the kernel's leaves open.
    fn host_rss(&mut self, observed: &Observation, overhead: Bytes) -> Option<Bytes> {
        let kernel = self.held.known().map(ResidentMemory::all);
        self.assumed = kernel.is_none() && observed.host_rss.is_none();
        let Some(kernel) = kernel else {
            let most = observed.target.max(observed.given()).max(observed.limits.max());
            return Some(observed.host_rss.unwrap_or(observed.given()).min(most));
        };
        let least = kernel.saturating_sub(overhead.max(VMM_OWN_MOST));
        Some(observed.host_rss.map_or(kernel.saturating_sub(overhead), |told| told.clamp(least, kernel)))
    }

    /// What its vCPUs do: a VM whose process grows is not paused, whatever it says.
    fn vcpus(&mut self, now: Duration, name: &str, told: Vcpus) -> Vcpus {
        if told != Vcpus::Paused(Pauser::Balancer) {
            self.while_paused = None;
            self.pause_log.end();
            return told;
        }
        let all = self.all();
        let least = self.while_paused.map_or(all, |least| least.min(all));
        self.while_paused = Some(least);
        if all <= guards::one_step_beyond(least) {
            return told;
        }
        if self.pause_log.is_due(now, "grows") {
            warn!(
                vm = name,
                "{name} says that the balancer paused it, but what the host holds for it grew from {least} to \
                 {all}: it is charged as a VM that runs"
            );
        }
        Vcpus::Run
    }

    /// What is known of a VM that is believed nothing: what its process holds, and what it was granted.
    fn known(&self, observed: Observation, total: Bytes) -> Observation {
        let size = self.all().max(self.granted).page_ceil();
        let Ok(limits) = Limits::fixed(size.min(total.page_floor()).max(SMALLEST)) else { return observed };
        let Observation { since, vcpus, pausable, .. } = observed;
        // Of what nobody knows it is assumed that it holds what it was granted.
        let held = self.held.known().map_or(size, ResidentMemory::all);
        Observation { host_rss: Some(held), since, vcpus, pausable, ..Observation::of(limits) }
    }

    /// Brings up to date what a silent VM said last.
    pub fn renew(&self, observed: &mut Observation, total: Bytes) {
        let Some(kernel) = self.held.known().map(ResidentMemory::all) else { return };
        if self.disbelieved {
            *observed = self.known(*observed, total);
        } else {
            observed.host_rss = Some(kernel.saturating_sub(self.vmm_own));
        }
    }

    /// What of the host's ordinary memory is known to be held for a guest that was `observed` so.
    pub fn resident(&self, observed: &Observation) -> Bytes {
        if self.reserved { Bytes::ZERO } else { observed.host_rss.unwrap_or_default() }
    }
}

#[cfg(test)]
mod tests;
