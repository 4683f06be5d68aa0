//! One VM as the daemon tells of it.

use api::units::Bytes;

use super::ManagedVm;
use crate::daemon::state::{MemoryView, VmView};
use crate::policy::Vcpus;
use crate::policy::guards::Standing;

impl ManagedVm {
    /// How it stands, for `GET /state`.
    pub fn view(&self) -> VmView {
        let reserved = self.is_reserved();
        let memory = self.vm.as_ref().zip(self.limits).map(|(vm, limits)| MemoryView {
            limits,
            used: vm.used(),
            demand: vm.demand(),
            entitlement: vm.entitlement(),
            target: vm.observed.target,
            actual: vm.observed.actual,
            unmanaged: vm.observed.unmanaged,
            host_rss: self.account.told(vm.observed.host_rss),
            holder: self.account.holder(),
            huge_percent: self.huge_percent,
            overhead: self.overhead(),
            charge: if reserved { Bytes::ZERO } else { vm.charge() },
            cgroup_limit: self.account.cgroup_limit(),
            reserved_huge_pages: reserved,
        });
        let standing = self.vm.as_ref().map_or(Standing::NotAnswering, |vm| match vm.observed.vcpus {
            _ if !reserved => vm.standing(),
            _ if self.errs => Standing::NotAnswering,
            Vcpus::Paused(_) => Standing::Paused,
            Vcpus::Run | Vcpus::NotYet => Standing::Static,
        });
        VmView {
            name: self.name.clone(),
            vmm: self.vmm,
            standing,
            paused_by: self.vm.as_ref().and_then(|vm| vm.observed.vcpus.paused_by()),
            held: self.vm.is_none().then(|| self.unheard()).filter(|held| *held > Bytes::ZERO),
            memory,
            report_age_ms: self
                .vm
                .as_ref()
                .and_then(|vm| vm.observed.guest)
                .map(|said| said.age.as_millis() as u64),
            last_reason: self.last_reason,
            grows: self.grows,
            shrinks: self.shrinks,
            errors: self.errors,
        }
    }
}
