//! What is believed of whom about a VM's memory.
//!
//! A guest may have taken its VMM over, and a VMM that hangs says nothing new. So what the host holds for
//! a VM is the kernel's word about the process at the other end of its socket: a VM's own count is taken
//! up to that, and while the VM is silent the process is looked at anew. Where the kernel does not tell (a
//! process in another PID namespace, `hidepid`), a ballast VM's own count is taken as far as its target,
//! its size or its limits go; of other VMMs, which don't count, nothing is taken for held.
//!
//! What a VM may have (its limits, its target, its size) is its own word or the configuration's, and is
//! believed as far as the host's memory goes. A `max` beyond that counts as all of the host. Who says that
//! it has more, or must, or that nothing can be taken from what it may have, is believed nothing: it is
//! left as it is and charged what the kernel says that its process holds, or what it was granted here
//! where that is more. That holds for limits of the configuration too: they say what a VM should have,
//! and not what its process has.
//!
//! Reserved huge pages (hugetlb) are a pool of their own: the kernel counts none of it as available, and
//! nobody else can have what a VM gives up of it. A VM whose process holds any is no part of the budget, but
//! for what its process holds beside them.

use std::time::Duration;

use api::limits::{Limits, SMALLEST};
use api::status::DriverState;
use api::units::Bytes;
use tracing::{info, warn};

use super::log_limiter::LogLimiter;
use crate::driver::Kind;
use crate::driver::process::ResidentMemory;
use crate::policy::Observation;

/// What is known of one VM's memory that it did not say itself.
#[derive(Debug, Default)]
pub struct Account {
    /// The process at the other end of its socket.
    process: Option<u32>,
    /// What the host holds for that, where the kernel says so.
    resident_memory: Option<ResidentMemory>,
    /// What of it is not the guest's.
    vmm_own: Bytes,
    /// What the balancer last granted it.
    granted: Bytes,
    /// Its memory lies in the host's reserved huge pages. Once seen this stays.
    reserved: bool,
    /// It is not believed what it says it may have.
    disbelieved: bool,
    size_log: LogLimiter,
}

impl Account {
    /// Notes which process it is, and what the host holds for that, as `resident_memory` tells of a process.
    pub fn look(
        &mut self,
        process: Option<u32>,
        resident_memory: impl FnOnce(u32) -> Option<ResidentMemory>,
    ) {
        if self.process != process {
            *self = Self { process, ..Self::default() };
        }
        self.look_again(resident_memory);
    }

    /// Looks again at the same process.
    pub fn look_again(&mut self, resident_memory: impl FnOnce(u32) -> Option<ResidentMemory>) {
        self.resident_memory = self.process.and_then(resident_memory);
        self.reserved |=
            self.resident_memory.is_some_and(|resident_memory| resident_memory.reserved > Bytes::ZERO);
    }

    /// Notes that its memory lies in reserved huge pages, though it may not have touched any yet.
    pub fn reserves(&mut self) {
        self.reserved = true;
    }

    /// Whether its memory lies in the host's reserved huge pages.
    pub fn is_reserved(&self) -> bool {
        self.reserved
    }

    /// What of the host's ordinary memory its process holds, where the kernel says so.
    pub fn ordinary(&self) -> Bytes {
        self.resident_memory.map_or(Bytes::ZERO, |resident_memory| resident_memory.ordinary)
    }

    /// Notes that it took a target.
    pub fn granted(&mut self, target: Bytes) {
        self.granted = target;
    }

    /// What of a VM's words is believed on a host with `total` memory.
    pub fn believe(&mut self, now: Duration, name: &str, observed: Observation, total: Bytes) -> Observation {
        let most = observed.target.max(observed.actual).max(observed.limits.max());
        let word = observed.host_rss.min(most);
        let host_rss =
            self.resident_memory.map_or(word, |resident_memory| observed.host_rss.min(resident_memory.all()));
        self.vmm_own = self
            .resident_memory
            .map_or(Bytes::ZERO, |resident_memory| resident_memory.all().saturating_sub(host_rss));
        let Observation { limits, target, actual, driver, .. } = observed;
        let has = limits.min().max(target).max(actual);
        self.disbelieved = has > total || (limits.max() > total && driver == DriverState::Absent);
        if self.disbelieved {
            let observed = self.known(observed, total);
            if self.size_log.is_due(now, "size") {
                warn!(
                    vm = name,
                    "{name} says that it has {}, which is more than the {total} of this host: that is not \
                     believed, and it is charged the {} that the host holds for its process",
                    has.max(limits.max()),
                    observed.limits.max()
                );
            }
            return observed;
        }
        if limits.max() <= total {
            if self.size_log.end() {
                info!(vm = name, "{name} says no longer that it has more than this host");
            }
        } else if self.size_log.is_due(now, "max") {
            warn!(
                vm = name,
                "the max of {} that {name} has is more than this host: it counts as {total}",
                limits.max()
            );
        }
        Observation { host_rss, limits: limits.capped(total), ..observed }
    }

    /// What is known of a VM that is believed nothing: what its process holds, and what it was granted.
    fn known(&self, observed: Observation, total: Bytes) -> Observation {
        let held = self.resident_memory.map_or(Bytes::ZERO, ResidentMemory::all);
        let size = held.max(self.granted).page_ceil();
        let Ok(limits) = Limits::fixed(size.min(total.page_floor()).max(SMALLEST)) else { return observed };
        let Observation { since, vcpus, pausable, .. } = observed;
        Observation { host_rss: held, since, vcpus, pausable, ..Observation::of(limits) }
    }

    /// Brings up to date what a silent VM said last.
    pub fn renew(&self, observed: &mut Observation, total: Bytes) {
        let Some(resident_memory) = self.resident_memory else { return };
        if self.disbelieved {
            *observed = self.known(*observed, total);
        } else {
            observed.host_rss = resident_memory.all().saturating_sub(self.vmm_own);
        }
    }

    /// What of the host's ordinary memory is known to be held for a guest that `observed` this.
    pub fn resident(&self, vmm: Kind, observed: &Observation) -> Bytes {
        if self.reserved {
            return Bytes::ZERO;
        }
        if self.resident_memory.is_some() || vmm == Kind::Ballast { observed.host_rss } else { Bytes::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTAL: Bytes = Bytes::gib(8);
    const NOW: Duration = Duration::ZERO;

    fn resident_memory(mib: u64) -> Option<ResidentMemory> {
        Some(ResidentMemory { ordinary: Bytes::mib(mib), reserved: Bytes::ZERO })
    }

    /// An account of a process that holds so much; `None` where the kernel does not say.
    fn account(held: Option<u64>) -> Account {
        let mut account = Account::default();
        account.look(Some(1), |_| held.and_then(resident_memory));
        account
    }

    fn observed(limits: &str, host_rss: Bytes) -> Observation {
        Observation { host_rss, driver: DriverState::Active, ..Observation::of(limits.parse().unwrap()) }
    }

    #[test]
    fn what_is_held_is_the_kernels_word() {
        let mut account = account(Some(110));
        let honest = observed("256M,min=128M,max=1G", Bytes::mib(100));
        let mut believed = account.believe(NOW, "web", honest, TOTAL);
        assert_eq!(believed, honest);
        // It is silent, and its guest touches more.
        account.look_again(|_| resident_memory(160));
        account.renew(&mut believed, TOTAL);
        assert_eq!(believed.host_rss, Bytes::mib(150), "less what is not the guest's");
        assert_eq!(account.resident(Kind::Ballast, &believed), Bytes::mib(150));

        let liar = observed("256M,min=128M,max=1G", Bytes::gib(1024));
        assert_eq!(account.believe(NOW, "web", liar, TOTAL).host_rss, Bytes::mib(160));
    }

    #[test]
    fn who_the_kernel_says_nothing_of_is_believed_what_its_limits_allow() {
        let mut account = account(None);
        let liar = observed("256M,min=128M,max=1G", Bytes::gib(1024));
        let mut believed = account.believe(NOW, "web", liar, TOTAL);
        assert_eq!(believed.host_rss, Bytes::gib(1));
        account.renew(&mut believed, TOTAL);
        assert_eq!(account.resident(Kind::Ballast, &believed), Bytes::gib(1));
        // Its driver took it for all that the VM has: right for what it may hold, and no more.
        assert_eq!(account.resident(Kind::Qemu, &believed), Bytes::ZERO);
    }

    #[test]
    fn who_has_more_than_the_host_is_charged_what_its_process_holds() {
        let full =
            Observation { actual: Bytes::gib(1 << 20), ..observed("256M,min=128M,max=1G", Bytes::ZERO) };
        let driverless = Observation { driver: DriverState::Absent, ..observed("1G,max=9G", Bytes::ZERO) };
        for liar in [observed("1024G", Bytes::gib(1024)), full, driverless] {
            let mut account = account(Some(300));
            let mut believed = account.believe(NOW, "web", liar, TOTAL);
            assert_eq!(believed.limits, Limits::fixed(Bytes::mib(300)).unwrap(), "{liar:?}");
            assert_eq!((believed.actual, believed.host_rss), (Bytes::mib(300), Bytes::mib(300)));
            account.look_again(|_| resident_memory(10 << 10));
            account.renew(&mut believed, TOTAL);
            assert_eq!(believed.limits.max(), TOTAL, "never more than there is");
        }
        let mut account = account(Some(300));
        account.granted(Bytes::mib(700));
        let believed = account.believe(NOW, "web", observed("1024G", Bytes::ZERO), TOTAL);
        assert_eq!((believed.limits.min(), believed.host_rss), (Bytes::mib(700), Bytes::mib(300)));
        // Another process was granted nothing.
        account.look(Some(2), |_| None);
        let believed = account.believe(NOW, "web", observed("1024G", Bytes::gib(1024)), TOTAL);
        assert_eq!((believed.limits.max(), believed.host_rss), (SMALLEST, Bytes::ZERO));
    }

    #[test]
    fn reserved_huge_pages_are_no_ordinary_memory() {
        let resident_memory =
            |reserved| Some(ResidentMemory { ordinary: Bytes::mib(10), reserved: Bytes::mib(reserved) });
        let mut account = Account::default();
        account.look(Some(1), |_| resident_memory(0));
        assert!(!account.is_reserved());
        account.look(Some(1), |_| resident_memory(512));
        assert!(account.is_reserved());
        let believed = account.believe(NOW, "web", observed("1G", Bytes::mib(512)), TOTAL);
        assert_eq!(believed.host_rss, Bytes::mib(512));
        assert_eq!(account.resident(Kind::Ballast, &believed), Bytes::ZERO);
        assert_eq!(account.ordinary(), Bytes::mib(10));
        account.look_again(|_| resident_memory(0));
        assert!(account.is_reserved(), "also after it gave all of them back");
        account.look(Some(2), |_| resident_memory(0));
        assert!(!account.is_reserved(), "another process");
    }

    #[test]
    fn a_max_beyond_the_host_is_all_of_the_host() {
        let mut account = account(Some(300));
        let believed = account.believe(NOW, "web", observed("1G,min=512M,max=64G", Bytes::mib(290)), TOTAL);
        assert_eq!((believed.limits.min(), believed.limits.max()), (Bytes::mib(512), TOTAL));
        assert_eq!((believed.target, believed.host_rss), (Bytes::gib(1), Bytes::mib(290)));
    }
}
