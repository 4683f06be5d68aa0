//! Ours: [`balancer::policy`] as the daemon runs it, told what the simulated VMs say.

use std::collections::HashMap;
use std::time::Duration;

use api::guest_memory::GuestMemory;
use api::status::DriverState;
use api::units::Bytes;

use super::{MemoryPolicy, PolicyInput, VmInput};
use balancer::policy::reason::Decision;
use balancer::policy::{HostObservation, Observation, Policy, Settings, Stalls, Vm};

/// The policy and what it remembers of the VMs.
#[derive(Debug)]
pub struct Ballast {
    policy: Policy,
    tick: Duration,
    vms: Vec<Vm>,
    decisions: Vec<Decision>,
}

impl Default for Ballast {
    fn default() -> Self {
        Self::new(Settings::default())
    }
}

impl Ballast {
    /// The policy with these settings.
    pub fn new(settings: Settings) -> Self {
        Self { tick: settings.tick, policy: Policy::new(settings), vms: Vec::new(), decisions: Vec::new() }
    }
}

fn observed(vm: &VmInput, now: Duration) -> Observation {
    let guest = vm.report.map(|report| GuestMemory {
        age: now.saturating_sub(report.taken),
        spare: report.available,
        ..GuestMemory::default()
    });
    let silent = guest.is_some_and(|said| said.age > Duration::from_secs(5));
    let driver = match (vm.driver, silent) {
        (false, _) => DriverState::Absent,
        (true, true) => DriverState::Silent,
        (true, false) => DriverState::Active,
    };
    let stalls = Stalls { allocation_stalls: vm.report.map(|report| report.stalls), ..Stalls::default() };
    // As the daemon caps them.
    let limits = vm.limits.capped(vm.most.min(vm.allowed.unwrap_or(vm.most)));
    Observation {
        target: vm.target,
        actual: vm.actual,
        unmanaged: vm.unmanaged,
        // Where nobody tells, the daemon takes all that it was given.
        host_rss: Some(if vm.hidden { vm.actual.saturating_add(vm.unmanaged) } else { vm.resident }),
        driver,
        guest,
        stalls,
        ..Observation::of(limits)
    }
}

impl MemoryPolicy for Ballast {
    fn cadence(&self) -> Duration {
        self.tick
    }

    fn decide(&mut self, view: &PolicyInput, targets: &mut Vec<(usize, Bytes)>) {
        let mut known: HashMap<u64, Vm> = self.vms.drain(..).map(|vm| (vm.id, vm)).collect();
        for seen in view.vms {
            let id = seen.id as u64;
            let observed = observed(seen, view.now);
            let mut vm = known.remove(&id).unwrap_or_else(|| Vm::new(id, seen.uptime, observed));
            vm.uptime = seen.uptime;
            vm.answers = seen.answers;
            if seen.answers {
                vm.observed = observed;
            }
            self.vms.push(vm);
        }
        let host = HostObservation::of(view.budget.saturating_sub(view.reserved));
        self.policy.decide(view.now, host, &mut self.vms, &mut self.decisions);
        targets.extend(self.decisions.iter().map(|decision| (decision.vm as usize, decision.reason.new)));
    }
}
