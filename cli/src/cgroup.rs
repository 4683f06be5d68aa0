//! What the control groups of this process leave to a VM that is started in it.

use std::path::Path;

use api::limits::Limits;
use api::units::Bytes;
use balancer::host::cgroup::Groups;
use vmm::config::Backing;

/// The tightest limit at any level, less what the VM's process itself takes; `None` where there is none.
pub fn limit() -> Option<Bytes> {
    Groups::of(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup")).limit()
}

/// What is to be said of a VM with `limits` where its groups have `limit`; `None` where it fits.
pub fn warning(limits: Limits, backing: Backing, limit: Option<Bytes>) -> Option<String> {
    // Reserved huge pages count for hugetlb's own limits, and not for these.
    let limit = limit.filter(|limit| *limit < limits.max() && backing != Backing::HugePages2M)?;
    Some(format!(
        "the control groups of this VM allow it {limit} (memory.max or memory.high, less a margin for the process \
         itself), and its max is {}: the kernel will slow it down or kill it before it has that much; raise the \
         limit, or give the VM a smaller max",
        limits.max()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_vm_that_may_outgrow_its_group_is_warned_of() {
        let limits: Limits = "256M,max=1G".parse().expect("limits");
        let of = |limit, backing| warning(limits, backing, limit);
        assert_eq!(of(None, Backing::Anonymous), None);
        assert_eq!(of(Some(Bytes::gib(1)), Backing::Memfd), None);
        assert_eq!(of(Some(Bytes::mib(970)), Backing::HugePages2M), None);
        let said = of(Some(Bytes::mib(970)), Backing::Anonymous).expect("it may be killed");
        assert!(said.contains("970") && said.contains("1 GiB"), "{said}");
    }
}
