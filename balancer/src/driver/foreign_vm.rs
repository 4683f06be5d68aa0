//! What a driver adds to the little that another VMM tells, and keeps for it.

use std::time::{Duration, Instant};

use api::limits::{Limits, Wanted};
use api::status::{AgedReport, BalloonCounters, DriverState, MemoryStatus};
use api::units::Bytes;
use tokio::task::spawn_blocking;

use super::statistics::Age;
use super::{Status, process};

/// How often what a VMM holds beside guest memory is looked at: it changes little,
/// and the look takes as long as the guest is large.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// A mapping of at least this size is guest memory: nothing else in a VMM comes near.
const GUEST_MEMORY: Bytes = Bytes::mib(64);

/// The limits that the configuration, or somebody at run time, set for a VM.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConfiguredLimits(Option<Wanted>);

impl ConfiguredLimits {
    /// As the configuration says; without anything said, the VM's memory stays as it is.
    pub fn new(wanted: Option<Wanted>) -> Self {
        Self(wanted)
    }

    /// Goes before the configuration from now on.
    pub fn set(&mut self, limits: Limits) {
        self.0 = Some(limits.into());
    }

    /// The limits of the VM, which has this much memory at most.
    pub fn of_vm(&self, has: Bytes) -> Limits {
        self.0.unwrap_or(Wanted::fixed(has)).of_vm(has)
    }
}

/// What the host holds for a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmmMemory {
    /// Of its guest's memory.
    pub guest: Bytes,
    /// Beside that.
    pub vmm_own: Bytes,
}

/// The process of a VMM.
#[derive(Clone, Copy, Debug)]
pub struct VmmProcess {
    pid: u32,
    vmm_own: Bytes,
    looked: Option<Instant>,
}

impl VmmProcess {
    /// A process that nobody has looked at yet.
    pub fn new(pid: u32) -> Self {
        Self { pid, vmm_own: Bytes::ZERO, looked: None }
    }

    /// Which one.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How long it has run.
    pub fn age(&self) -> Option<Duration> {
        process::age(self.pid)
    }

    /// What the host holds for it, when its guest `has` this much memory at most.
    /// `None` where the kernel does not say.
    pub async fn held(&mut self, has: Bytes) -> Option<VmmMemory> {
        if self.looked.is_none_or(|looked| looked.elapsed() >= LOOK_AGAIN) {
            let pid = self.pid;
            let look = spawn_blocking(move || process::vmm_own(pid, has.min(GUEST_MEMORY)));
            // Another user's mappings can't be read; then all of it counts as the guest's.
            self.vmm_own = look.await.ok().flatten().unwrap_or_default();
            self.looked = Some(Instant::now());
        }
        let all = process::resident(self.pid)?;
        Some(VmmMemory { guest: all.saturating_sub(self.vmm_own), vmm_own: self.vmm_own.min(all) })
    }
}

/// What a VMM told in its own words.
#[derive(Clone, Debug)]
pub struct ForeignStatus {
    /// What the guest can have at most.
    pub has: Bytes,
    /// What it was last asked to have.
    pub target: Bytes,
    /// What it has.
    pub actual: Bytes,
    /// How its balloon driver is doing.
    pub driver: DriverState,
    /// Its last report.
    pub report: Option<AgedReport>,
}

/// What is kept for a VM from one request to the next.
pub struct ForeignVm {
    /// Its limits.
    pub limits: ConfiguredLimits,
    /// How old its reports are.
    pub age: Age,
    process: Option<VmmProcess>,
}

impl ForeignVm {
    /// For a VM with these limits, whose process nobody has seen yet.
    pub fn new(limits: Option<Wanted>) -> Self {
        Self { limits: ConfiguredLimits::new(limits), age: Age::default(), process: None }
    }

    /// The process at the other end, where that is known.
    pub fn pid(&self) -> Option<u32> {
        self.process.map(|process| process.pid())
    }

    /// Notes which process is at the other end. True where it is another than before,
    /// about which nothing is known yet.
    pub fn meet(&mut self, pid: Option<u32>) -> bool {
        if self.pid() == pid {
            return false;
        }
        self.process = pid.map(VmmProcess::new);
        self.age.forget();
        true
    }

    /// What a VMM told in ballast's words, with the limits that are kept for it and what the kernel
    /// says of its process.
    pub async fn status(&mut self, status: ForeignStatus) -> Box<Status> {
        let ForeignStatus { has, target, actual, driver, report } = status;
        let held = match &mut self.process {
            Some(process) => process.held(has).await,
            None => None,
        };
        let memory = MemoryStatus {
            limits: self.limits.of_vm(has),
            target,
            actual,
            settled: false,
            followed: None,
            paused_by: None,
            host_rss: held.map(|held| held.guest),
            host_huge: None,
            driver,
            report,
            agent: None,
            counters: BalloonCounters::default(),
            plug: None,
        };
        let pid = self.pid();
        let uptime = self.process.and_then(|process| process.age());
        Box::new(Status { pid, uptime, overhead: held.unwrap_or_default().vmm_own, memory })
    }
}
