//! What is believed about a VM's memory, and whose word it is.
//!
//! A guest may have taken its VMM over, and a VMM that hangs says nothing new. So the kernel's word about the
//! process at the other end of the socket decides what the host holds for a VM. The VM's own count is taken
//! where it differs from the kernel's by no more than a VMM may hold for itself. While the VM is silent, the
//! process is looked at again. Where the kernel says nothing (a process in another PID namespace, `hidepid`),
//! the VM's own count is taken as far as its target, its size or its limits go.
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

use api::limits::{Limits, SMALLEST};
use api::status::{DriverState, Pauser};
use api::units::Bytes;
use tracing::{info, warn};

use super::log_limiter::LogLimiter;
use crate::driver::process::ResidentMemory;
use crate::host::HostReader;
use crate::policy::{Observation, Vcpus, guards};

/// The most that a VMM of ballast's holds beside guest memory.
const VMM_OWN_MOST: Bytes = Bytes::mib(64);

/// How often the limits of a VM's control groups are read: an operator changes them seldom.
const READ_LIMIT_EVERY: Duration = Duration::from_secs(10);

/// What is known of one VM's memory that it did not say itself.
#[derive(Debug, Default)]
pub struct Account {
    /// The process at the other end of its socket.
    process: Option<u32>,
    /// What the host holds for that, where the kernel says so.
    resident_memory: Option<ResidentMemory>,
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
    pub fn look(&mut self, now: Duration, process: Option<u32>, host: &HostReader) {
        if self.process != process {
            *self = Self { process, ..Self::default() };
        }
        self.look_again(now, host);
    }

    /// Looks again at the same process.
    pub fn look_again(&mut self, now: Duration, host: &HostReader) {
        self.resident_memory = self.process.and_then(|pid| host.resident_memory(pid));
        self.reserved |= self.resident_memory.is_some_and(|memory| memory.reserved > Bytes::ZERO);
        if self.limit_read.is_none_or(|then| now.saturating_sub(then) >= READ_LIMIT_EVERY) {
            self.cgroup_limit = self.process.and_then(|pid| host.cgroup_limit(pid));
            self.limit_read = Some(now);
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
        self.resident_memory.map_or(Bytes::ZERO, |memory| memory.ordinary)
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

    /// All that the host holds for its process, where the kernel says so.
    fn all(&self) -> Bytes {
        self.resident_memory.map_or(Bytes::ZERO, ResidentMemory::all)
    }

    /// What the host holds for the guest: the VM's count within what the kernel's leaves open.
    fn host_rss(&self, observed: &Observation, overhead: Bytes) -> Option<Bytes> {
        let Some(kernel) = self.resident_memory.map(ResidentMemory::all) else {
            let most = observed.target.max(observed.given()).max(observed.limits.max());
            return observed.host_rss.map(|told| told.min(most));
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
        Observation { host_rss: Some(self.all()), since, vcpus, pausable, ..Observation::of(limits) }
    }

    /// Brings up to date what a silent VM said last.
    pub fn renew(&self, observed: &mut Observation, total: Bytes) {
        let Some(kernel) = self.resident_memory.map(ResidentMemory::all) else { return };
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
mod tests {
    use std::fs;

    use super::*;
    use crate::host::Sources;

    const TOTAL: Bytes = Bytes::gib(8);
    const NOW: Duration = Duration::ZERO;

    /// What the kernel says of processes 1 and 2.
    struct Kernel(tempfile::TempDir);

    impl Kernel {
        /// One that says nothing.
        fn silent() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        /// One by which process 1 holds so much.
        fn says(mib: u64) -> Self {
            let kernel = Self::silent();
            kernel.holds(mib, 0);
            kernel
        }

        fn holds(&self, ordinary_mib: u64, reserved_mib: u64) {
            let kib = |mib| mib << 10;
            let (ordinary, reserved) = (kib(ordinary_mib), kib(reserved_mib));
            self.write("1/status", &format!("VmRSS: {ordinary} kB\nHugetlbPages: {reserved} kB\n"));
        }

        fn limits(&self, bytes: &str) {
            self.write("1/cgroup", "0::/vms.slice/web.service\n");
            self.write("groups/vms.slice/web.service/memory.max", bytes);
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn reader(&self) -> HostReader {
            let (processes, groups) = (self.0.path().to_owned(), self.0.path().join("groups"));
            HostReader::new(&Sources { processes, groups, ..Sources::default() })
        }

        /// An account of process 1.
        fn account(&self) -> Account {
            let mut account = Account::default();
            account.look(NOW, Some(1), &self.reader());
            account
        }
    }

    fn observed(limits: &str, host_rss: Option<Bytes>) -> Observation {
        Observation { host_rss, driver: DriverState::Active, ..Observation::of(limits.parse().unwrap()) }
    }

    fn believe(account: &mut Account, observed: Observation) -> Observation {
        account.believe(NOW, "web", observed, Bytes::ZERO, TOTAL)
    }

    const WIDE: &str = "256M,min=128M,max=1G";

    #[test]
    fn the_kernel_says_what_is_held() {
        let kernel = Kernel::says(110);
        let mut account = kernel.account();
        let honest = observed(WIDE, Some(Bytes::mib(100)));
        let mut believed = believe(&mut account, honest);
        assert_eq!(believed, honest);
        // It is silent, and its guest touches more.
        kernel.holds(160, 0);
        account.look_again(NOW, &kernel.reader());
        account.renew(&mut believed, TOTAL);
        assert_eq!(believed.host_rss, Some(Bytes::mib(150)), "less what is not the guest's");
        assert_eq!(account.resident(&believed), Bytes::mib(150));
        let told = |account: &mut Account, told| believe(account, observed(WIDE, told)).host_rss;
        assert_eq!(told(&mut account, Some(Bytes::gib(1024))), Some(Bytes::mib(160)));
        // Nor can it say much less.
        assert_eq!(told(&mut account, Some(Bytes::ZERO)), Some(Bytes::mib(160 - 64)));
        assert_eq!(told(&mut account, Some(Bytes::mib(97))), Some(Bytes::mib(97)));
        assert_eq!(told(&mut account, None), Some(Bytes::mib(160)), "a VM that can't count");
        // What a driver found beside guest memory is not the guest's, however much it is.
        let foreign = observed(WIDE, Some(Bytes::mib(60)));
        let believed = account.believe(NOW, "web", foreign, Bytes::mib(100), TOTAL);
        assert_eq!(believed.host_rss, Some(Bytes::mib(60)));
    }

    #[test]
    fn where_the_kernel_says_nothing_a_vm_is_believed_what_its_limits_allow() {
        let kernel = Kernel::silent();
        let mut account = kernel.account();
        let mut believed = believe(&mut account, observed(WIDE, Some(Bytes::gib(1024))));
        assert_eq!(believed.host_rss, Some(Bytes::gib(1)));
        account.renew(&mut believed, TOTAL);
        assert_eq!(account.resident(&believed), Bytes::gib(1));
        let believed = believe(&mut account, observed(WIDE, None));
        assert_eq!((believed.host_rss, account.resident(&believed)), (None, Bytes::ZERO));
    }

    #[test]
    fn a_vm_with_more_than_the_host_is_charged_what_its_process_holds() {
        let full = Observation { actual: Bytes::gib(1 << 20), ..observed(WIDE, Some(Bytes::ZERO)) };
        let driverless =
            Observation { driver: DriverState::Absent, ..observed("1G,max=9G", Some(Bytes::ZERO)) };
        for liar in [observed("1024G", Some(Bytes::gib(1024))), full, driverless] {
            let kernel = Kernel::says(300);
            let mut account = kernel.account();
            let mut believed = believe(&mut account, liar);
            assert_eq!(believed.limits, Limits::fixed(Bytes::mib(300)).unwrap(), "{liar:?}");
            assert_eq!((believed.actual, believed.host_rss), (Bytes::mib(300), Some(Bytes::mib(300))));
            kernel.holds(10 << 10, 0);
            account.look_again(NOW, &kernel.reader());
            account.renew(&mut believed, TOTAL);
            assert_eq!(believed.limits.max(), TOTAL, "never more than there is");
        }
        let kernel = Kernel::says(300);
        let mut account = kernel.account();
        account.granted(Bytes::mib(700));
        let believed = believe(&mut account, observed("1024G", Some(Bytes::ZERO)));
        assert_eq!((believed.limits.min(), believed.host_rss), (Bytes::mib(700), Some(Bytes::mib(300))));
        // Another process was granted nothing.
        account.look(NOW, Some(2), &kernel.reader());
        let believed = believe(&mut account, observed("1024G", Some(Bytes::gib(1024))));
        assert_eq!((believed.limits.max(), believed.host_rss), (SMALLEST, Some(Bytes::ZERO)));
    }

    #[test]
    fn reserved_huge_pages_are_no_ordinary_memory() {
        let kernel = Kernel::says(10);
        let mut account = kernel.account();
        assert!(!account.is_reserved());
        kernel.holds(10, 512);
        account.look(NOW, Some(1), &kernel.reader());
        assert!(account.is_reserved());
        let believed = believe(&mut account, observed("1G", Some(Bytes::mib(512))));
        assert_eq!(believed.host_rss, Some(Bytes::mib(512)));
        assert_eq!(account.resident(&believed), Bytes::ZERO);
        assert_eq!(account.ordinary(), Bytes::mib(10));
        kernel.holds(10, 0);
        account.look_again(NOW, &kernel.reader());
        assert!(account.is_reserved(), "also after it gave all of them back");
        account.look(NOW, Some(2), &kernel.reader());
        assert!(!account.is_reserved(), "another process");
    }

    #[test]
    fn a_max_beyond_the_host_is_all_of_the_host() {
        let mut account = Kernel::says(300).account();
        let believed = believe(&mut account, observed("1G,min=512M,max=64G", Some(Bytes::mib(290))));
        assert_eq!((believed.limits.min(), believed.limits.max()), (Bytes::mib(512), TOTAL));
        assert_eq!((believed.target, believed.host_rss), (Bytes::gib(1), Some(Bytes::mib(290))));
    }

    #[test]
    fn a_vm_gets_no_more_than_its_control_group_allows() {
        let kernel = Kernel::says(100);
        kernel.limits("536870912\n");
        let allowed = Bytes::mib(512).saturating_sub(Bytes::mib(512).percent(3));
        let mut account = kernel.account();
        assert_eq!(account.cgroup_limit(), Some(allowed));
        let believed = believe(&mut account, observed(WIDE, Some(Bytes::mib(100))));
        assert_eq!(believed.limits.max(), allowed.page_floor());
        // An operator raises it: that is seen with time.
        kernel.limits("max\n");
        account.look_again(READ_LIMIT_EVERY / 2, &kernel.reader());
        assert_eq!(account.cgroup_limit(), Some(allowed));
        account.look_again(READ_LIMIT_EVERY, &kernel.reader());
        let believed = believe(&mut account, observed(WIDE, Some(Bytes::mib(100))));
        assert_eq!(believed.limits.max(), Bytes::gib(1));
    }

    #[test]
    fn a_vm_whose_process_grows_is_not_paused() {
        let kernel = Kernel::says(300);
        let mut account = kernel.account();
        let told = |by, host_rss| Observation {
            vcpus: Vcpus::Paused(by),
            ..observed(WIDE, Some(Bytes::mib(host_rss)))
        };
        let paused = Vcpus::Paused(Pauser::Balancer);
        assert_eq!(believe(&mut account, told(Pauser::Balancer, 290)).vcpus, paused);
        for (held, believed) in
            [(420, paused), (440, Vcpus::Run), (300, paused), (200, paused), (440, Vcpus::Run)]
        {
            kernel.holds(held, 0);
            account.look_again(NOW, &kernel.reader());
            assert_eq!(believe(&mut account, told(Pauser::Balancer, 290)).vcpus, believed, "{held}");
        }
        // An operator's pause is charged in full in any case.
        let operators = told(Pauser::Operator, 290);
        assert_eq!(believe(&mut account, operators).vcpus, operators.vcpus);
        assert_eq!(believe(&mut account, told(Pauser::Balancer, 290)).vcpus, paused, "that is another pause");
    }
}
