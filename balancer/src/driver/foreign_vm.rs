//! What a driver adds to the little that another VMM tells, and keeps for it.

use std::io;
use std::thread::Builder;
use std::time::{Duration, Instant};

use api::limits::{Limits, Wanted};
use api::status::{AgedReport, BalloonCounters, DriverState, MemoryStatus};
use api::units::Bytes;
use tokio::sync::oneshot;

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
            // Where there is no thread for it, what was seen last stays until the next look.
            if let Ok(looked) = in_thread(move || process::vmm_own(pid, has.min(GUEST_MEMORY))) {
                // Another user's mappings can't be read; then all of it counts as the guest's.
                self.vmm_own = looked.await.ok().flatten().unwrap_or_default();
            }
            self.looked = Some(Instant::now());
        }
        let all = process::resident(self.pid)?;
        Some(VmmMemory { guest: all.saturating_sub(self.vmm_own), vmm_own: self.vmm_own.min(all) })
    }
}

/// Does what blocks in a thread of its own. tokio's would panic where the kernel gives none.
fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (sender, receiver) = oneshot::channel();
    // Nobody may be left to hear it.
    Builder::new().name("look".to_owned()).spawn(move || drop(sender.send(work())))?;
    Ok(receiver)
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Resource, Rlimit, setrlimit};

    use super::*;

    #[tokio::test]
    #[ignore = "the next test runs it, in a process of its own"]
    async fn looked_at_without_a_thread() {
        let own = std::process::id();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
        let size: u64 = size.trim().trim_end_matches(" kB").parse().unwrap();
        // Room for some heap, and not for a stack.
        let limit = Some((size + 1024) << 10);
        setrlimit(Resource::As, Rlimit { current: limit, maximum: limit }).unwrap();
        assert!(Builder::new().spawn(|| ()).is_err(), "there are threads to be had");
        let held = VmmProcess::new(own).held(Bytes::gib(1)).await.unwrap();
        assert!(held.guest > Bytes::mib(1) && held.vmm_own == Bytes::ZERO);
    }

    #[test]
    fn no_thread_to_be_had_ends_nothing() {
        let test = "driver::foreign_vm::tests::looked_at_without_a_thread";
        let mut alone = Command::new(std::env::current_exe().unwrap());
        let output = alone.args(["--ignored", "--exact", test, "--test-threads=1"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
    }
}
