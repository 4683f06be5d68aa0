//! What the drivers of other VMMs have in common. Those VMMs tell little, so a driver keeps for its VM what
//! its VMM does not tell.

use std::future::Future;
use std::io;
use std::thread::Builder;
use std::time::{Duration, Instant};

use api::client::PeerProcess;
use api::guest_memory::Had;
use api::limits::{Limits, Wanted};
use api::status::{AgedReport, BalloonCounters, DriverState, MemoryStatus};
use api::units::Bytes;
use tokio::sync::oneshot;

use super::statistics::Age;
use super::{Answer, Driver, Error, Status, process};

/// How often memory of a VMM beside guest memory is measured: it changes little, and measuring takes time in
/// proportion to the guest's size.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// A report may have been made so long before its VMM had it, or was asked for it.
const UNSEEN: Duration = Duration::from_secs(2);

/// A mapping of at least this size is guest memory: nothing else in a VMM comes near.
const GUEST_MEMORY: Bytes = Bytes::mib(64);

/// What differs from one VMM to another.
pub trait ForeignDriver: Send {
    /// The VMM's process, as [`Driver::process`].
    fn process(&self) -> PeerProcess;

    /// As [`Driver::hang_up`].
    fn hang_up(&mut self);

    /// What is kept for the VM.
    fn vm(&mut self) -> &mut ForeignVm;

    /// Asks how the VM stands.
    fn look(&mut self) -> impl Future<Output = Result<ForeignStatus, Error>> + Send;

    /// Asks the guest to have `target`.
    fn ask_for(&mut self, target: Bytes) -> impl Future<Output = Result<(), Error>> + Send;
}

impl<V: ForeignDriver> Driver for V {
    fn process(&self) -> PeerProcess {
        ForeignDriver::process(self)
    }

    fn hang_up(&mut self) {
        ForeignDriver::hang_up(self);
    }

    /// `patience` has no effect: QEMU and Firecracker ask their guests at intervals of whole seconds, Cloud
    /// Hypervisor at each request.
    fn report(&mut self, _patience: Duration) -> Answer<'_, Box<Status>> {
        Box::pin(async move {
            let status = self.look().await?;
            Ok(self.vm().status(status).await)
        })
    }

    /// Those VMMs count from all of the guest's memory, and know nothing of what its kernel manages.
    fn set_target(&mut self, target: Bytes) -> Answer<'_, ()> {
        let target = target.saturating_add(self.vm().unmanaged.all);
        Box::pin(self.ask_for(target))
    }

    fn set_limits(&mut self, limits: Limits) -> Answer<'_, ()> {
        self.vm().wanted = Some(limits.into());
        Box::pin(std::future::ready(Ok(())))
    }

    fn configure(&mut self, memory: Option<Wanted>) {
        self.vm().wanted = memory;
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
    /// How old its reports are.
    pub age: Age,
    /// The limits from the configuration or set at run time. Without any, its memory stays as it is.
    wanted: Option<Wanted>,
    process: PeerProcess,
    /// What the host holds for the VMM beside guest memory, and when that was measured.
    vmm_own: Option<(Bytes, Instant)>,
    unmanaged: Unmanaged,
}

/// What of its memory a guest's kernel does not manage, by its reports.
#[derive(Debug, Default)]
struct Unmanaged {
    all: Bytes,
    /// What its VMM last said that it has, and since when it has said so.
    steady: Option<(Bytes, Instant)>,
}

impl Unmanaged {
    /// Takes in a report, if it is of what the VMM says that the guest has now: those VMMs tell the two by
    /// different clocks.
    fn look(&mut self, status: &ForeignStatus, now: Instant) {
        let ForeignStatus { has, actual, driver, ref report, .. } = *status;
        if driver == DriverState::Absent {
            *self = Self::default();
            return;
        }
        let since = match self.steady {
            Some((before, since)) if before == actual => since,
            _ => now,
        };
        self.steady = Some((actual, since));
        let Some(total) = report.as_ref().and_then(|aged| {
            let made = Duration::from_millis(aged.age_ms).saturating_add(UNSEEN);
            let is_of_now = made < now.saturating_duration_since(since);
            aged.statistics.total.filter(|_| is_of_now)
        }) else {
            return;
        };
        // A total of more than it has left holds the balloon as well, which the guest may then take back.
        let managed = if total > actual { total.saturating_sub(has.saturating_sub(actual)) } else { total };
        self.all = Had::of(has, actual, managed).unmanaged;
    }
}

impl ForeignVm {
    /// For a VM with these limits, whose process is not known yet.
    pub fn new(wanted: Option<Wanted>) -> Self {
        Self {
            age: Age::default(),
            wanted,
            process: PeerProcess::NotMet,
            vmm_own: None,
            unmanaged: Unmanaged::default(),
        }
    }

    /// The limits of the VM, which has this much memory at most.
    pub fn limits(&self, has: Bytes) -> Limits {
        self.wanted.unwrap_or(Wanted::fixed(has)).of_vm(has)
    }

    /// Notes which process has answered. True if it is a new one, about which nothing is known yet.
    pub fn meet(&mut self, process: PeerProcess) -> bool {
        if self.process == process {
            return false;
        }
        (self.process, self.vmm_own) = (process, None);
        self.age.forget();
        self.unmanaged = Unmanaged::default();
        true
    }

    /// What the host holds for the VMM beside the memory of its guest, which `has` so much at most.
    async fn vmm_own(&mut self, pid: u32, has: Bytes) -> Bytes {
        match self.vmm_own {
            Some((own, looked)) if looked.elapsed() < LOOK_AGAIN => own,
            _ => {
                // Another user's mappings can't be read, and there may be no thread to be had: then all memory
                // counts as the guest's.
                let own = match in_thread(move || process::vmm_own(pid, has.min(GUEST_MEMORY))) {
                    Ok(looked) => looked.await.ok().flatten().unwrap_or_default(),
                    Err(_) => Bytes::ZERO,
                };
                self.vmm_own = Some((own, Instant::now()));
                own
            }
        }
    }

    /// A VMM's answer as a [`Status`], with the limits that are kept for it. What the host holds for the guest
    /// is left to whoever keeps the account of that, as no VMM counts it.
    async fn status(&mut self, status: ForeignStatus) -> Box<Status> {
        self.unmanaged.look(&status, Instant::now());
        let unmanaged = self.unmanaged.all;
        let ForeignStatus { has, target, actual, driver, report } = status;
        let pid = self.process.pid();
        let overhead = match pid {
            Some(pid) => self.vmm_own(pid, has).await,
            None => Bytes::ZERO,
        };
        let memory = MemoryStatus {
            limits: self.limits(has),
            target: target.saturating_sub(unmanaged),
            actual: actual.saturating_sub(unmanaged),
            given: Some(actual),
            most: Some(has.saturating_sub(unmanaged)),
            settled: false,
            followed: None,
            paused_by: None,
            host_rss: None,
            host_huge: None,
            driver,
            report,
            agent: None,
            counters: BalloonCounters::default(),
            plug: None,
        };
        Box::new(Status { pid, uptime: pid.and_then(process::age), overhead, memory })
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Resource, Rlimit, setrlimit};

    use super::*;

    /// A VM of 512 MiB whose guest has so many MiB and manages so many.
    fn status(actual: u64, total: u64) -> ForeignStatus {
        let report = api::report::Report { total: Some(Bytes::mib(total)), ..Default::default() };
        ForeignStatus {
            has: Bytes::mib(512),
            target: Bytes::mib(actual),
            actual: Bytes::mib(actual),
            driver: DriverState::Active,
            report: Some(super::super::statistics::aged(Duration::ZERO, report)),
        }
    }

    #[test]
    fn what_a_guest_does_not_manage_is_seen_while_its_balloon_rests() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut unmanaged = Unmanaged::default();
        // mem=256M, with the balloon in the total and without it.
        for (second, actual, total) in [(0, 512, 219), (3, 512, 219), (10, 448, 219), (13, 448, 155)] {
            unmanaged.look(&status(actual, total), at(second));
        }
        let seen = unmanaged.all;
        assert!((Bytes::mib(230)..Bytes::mib(260)).contains(&seen), "{seen}");
        // Its balloon goes, and the report is of before: that tells nothing.
        unmanaged.look(&status(512, 155), at(14));
        assert_eq!(unmanaged.all, seen);
        unmanaged.look(&status(512, 471), at(17));
        assert_eq!(unmanaged.all, Bytes::ZERO, "another kernel");
        unmanaged.look(&status(512, 219), at(18));
        let gone = ForeignStatus { driver: DriverState::Absent, report: None, ..status(512, 219) };
        unmanaged.look(&gone, at(19));
        assert_eq!(unmanaged.all, Bytes::ZERO);
    }

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
        assert_eq!(ForeignVm::new(None).vmm_own(own, Bytes::gib(1)).await, Bytes::ZERO);
    }

    #[test]
    fn no_thread_to_be_had_ends_nothing() {
        let test = "driver::foreign::tests::looked_at_without_a_thread";
        let mut alone = Command::new(std::env::current_exe().unwrap());
        let output = alone.args(["--ignored", "--exact", test, "--test-threads=1"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
    }
}
