use std::fs;

use super::*;
use crate::host::Sources;
use crate::policy::guards::Standing;

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
        account.look(NOW, PeerProcess::Writer(1), &self.reader());
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
}

#[test]
fn a_vm_of_which_nobody_knows_what_the_host_holds_is_charged_what_counts_as_gone() {
    let kernel = Kernel::silent();
    for (process, holder) in
        [(PeerProcess::Writer(1), Holder::Hidden), (PeerProcess::Outside, Holder::OtherPidNamespace)]
    {
        let mut account = Account::default();
        assert_eq!(account.holder(), Holder::NotMet);
        account.look(NOW, process, &kernel.reader());
        assert_eq!(account.holder(), holder);
        let has = Bytes::mib(300);
        let grown = Observation { target: Bytes::mib(400), actual: has, ..observed(WIDE, None) };
        let believed = believe(&mut account, grown);
        assert_eq!((believed.host_rss, account.resident(&believed)), (Some(has), has));
        assert_eq!(guards::charge(Standing::Following, &believed), Bytes::mib(400), "and what it may touch");
        assert_eq!(account.told(believed.host_rss), None, "nobody has counted that");
        let counted = believe(&mut account, Observation { host_rss: Some(Bytes::mib(200)), ..grown });
        assert_eq!(account.told(counted.host_rss), Some(Bytes::mib(200)));
        assert_eq!(account.ordinary(), Bytes::ZERO);
    }
}

#[test]
fn a_vm_with_more_than_the_host_is_charged_what_its_process_holds() {
    let full = Observation { actual: Bytes::gib(1 << 20), ..observed(WIDE, Some(Bytes::ZERO)) };
    let driverless = Observation { driver: DriverState::Absent, ..observed("1G,max=9G", Some(Bytes::ZERO)) };
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
    account.look(NOW, PeerProcess::Writer(2), &kernel.reader());
    let believed = believe(&mut account, observed("1024G", Some(Bytes::gib(1024))));
    assert_eq!((believed.limits.max(), believed.host_rss), (SMALLEST, Some(Bytes::ZERO)));
}

#[test]
fn reserved_huge_pages_are_no_ordinary_memory() {
    let kernel = Kernel::says(10);
    let mut account = kernel.account();
    assert!(!account.is_reserved());
    kernel.holds(10, 512);
    account.look(NOW, PeerProcess::Writer(1), &kernel.reader());
    assert!(account.is_reserved());
    let believed = believe(&mut account, observed("1G", Some(Bytes::mib(512))));
    assert_eq!(believed.host_rss, Some(Bytes::mib(512)));
    assert_eq!(account.resident(&believed), Bytes::ZERO);
    assert_eq!(account.ordinary(), Bytes::mib(10));
    kernel.holds(10, 0);
    account.look_again(NOW, &kernel.reader());
    assert!(account.is_reserved(), "also after it gave all of them back");
    account.look(NOW, PeerProcess::Writer(2), &kernel.reader());
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
fn a_limit_that_can_not_be_read_for_a_while_stands() {
    let kernel = Kernel::says(100);
    kernel.limits("536870912\n");
    let mut account = kernel.account();
    let allowed = account.cgroup_limit();
    assert!(allowed.is_some());
    let max = kernel.0.path().join("groups/vms.slice/web.service/memory.max");
    // A directory is there and can't be read, whoever tries it.
    fs::remove_file(&max).unwrap();
    fs::create_dir(&max).unwrap();
    account.look_again(READ_LIMIT_EVERY, &kernel.reader());
    assert_eq!(account.cgroup_limit(), allowed);
    let groups = kernel.0.path().join("1/cgroup");
    fs::rename(&groups, kernel.0.path().join("aside")).unwrap();
    account.look_again(READ_LIMIT_EVERY * 2, &kernel.reader());
    assert_eq!(account.cgroup_limit(), allowed);
    // It is read again as soon as it can be.
    fs::rename(kernel.0.path().join("aside"), &groups).unwrap();
    fs::remove_dir(&max).unwrap();
    kernel.limits("max\n");
    account.look_again(READ_LIMIT_EVERY * 2, &kernel.reader());
    assert_eq!(account.cgroup_limit(), None);
}

#[test]
fn a_vm_whose_process_grows_is_not_paused() {
    let kernel = Kernel::says(300);
    let mut account = kernel.account();
    let told =
        |by, host_rss| Observation { vcpus: Vcpus::Paused(by), ..observed(WIDE, Some(Bytes::mib(host_rss))) };
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
