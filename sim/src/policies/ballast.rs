//! Ours: [`balancer::policy`] as the daemon runs it, told what the simulated VMs say.

use std::collections::HashMap;
use std::time::Duration;

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
    let spare = vm.report.map(|report| (now.saturating_sub(report.taken), report.available));
    let silent = spare.is_some_and(|(age, _)| age > Duration::from_secs(5));
    let driver = match (vm.driver, silent) {
        (false, _) => DriverState::Absent,
        (true, true) => DriverState::Silent,
        (true, false) => DriverState::Active,
    };
    let stalls = Stalls { allocation_stalls: vm.report.map(|report| report.stalls), ..Stalls::default() };
    Observation {
        target: vm.target,
        actual: vm.actual,
        host_rss: Some(vm.resident),
        driver,
        spare,
        stalls,
        ..Observation::of(vm.limits)
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
