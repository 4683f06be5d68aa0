//! Carries out decisions.

use std::collections::BTreeSet;

use api::status::Pauser;
use tracing::warn;

use super::Daemon;
use crate::daemon::config::LastResort;
use crate::daemon::history::Fate;
use crate::daemon::managed_vm::{ManagedVm, RequestOutcome};
use crate::policy::reason::{Decision, Reason, Rule};
use crate::policy::{Vcpus, Vm};

impl Daemon {
    /// Sends decisions to their VMs; returns the VMs.
    pub(super) fn tell(&mut self) -> BTreeSet<u64> {
        let mut told = BTreeSet::new();
        let now = self.now();
        for Decision { vm, reason } in self.decisions.drain(..) {
            let Some(managed) = self.managed_vms.get_mut(&vm) else { continue };
            if reason.rule.keeps_target() && !is_carried_out(&reason, managed, self.config.last_resort) {
                managed.last_resort.advise(now, &managed.name, managed.vmm, &reason);
                self.shared.history().decided(&managed.name, reason, Fate::Advised, None);
                continue;
            }
            // While an earlier request is under way, or somebody else sets its target too, the decision has to be
            // made again in a later round.
            let may_order = reason.rule.keeps_target() || managed.target_watch.may_order(now);
            let Some(mut driver) = may_order.then(|| managed.take_driver()).flatten() else {
                self.shared.history().decided(&managed.name, reason, Fate::Postponed, None);
                continue;
            };
            let connections = self.connections.clone();
            told.insert(vm);
            managed.response_times.asked(now);
            if reason.rule.keeps_target() {
                warn!(vm = managed.name, rule = ?reason.rule, "{}: {reason}", managed.name);
                if let (Rule::Resume, Some(vm)) = (reason.rule, &mut managed.vm) {
                    // It is charged as a running VM from now on, as it may run before the answer comes.
                    vm.observed.vcpus = Vcpus::Run;
                }
                self.requests.spawn(async move {
                    let turn = connections.turn().await;
                    let result = match driver.set_paused(reason.rule == Rule::Pause) {
                        Some(result) => Some(result.await),
                        None => None,
                    };
                    turn.end(&mut *driver);
                    let outcome = result
                        .map_or(RequestOutcome::LimitsSet, |result| RequestOutcome::PauseSet(reason, result));
                    (vm, driver, outcome)
                });
                continue;
            }
            if let Some(vm) = &mut managed.vm {
                // Until the answer comes it may hold the larger of both.
                vm.observed.target = reason.old.max(reason.new);
            }
            self.requests.spawn(async move {
                let turn = connections.turn().await;
                let result = driver.set_target(reason.new).await;
                turn.end(&mut *driver);
                (vm, driver, RequestOutcome::TargetSet(reason, result))
            });
        }
        told
    }

    /// Logs the VMs that the balancer paused and that stay paused when it stops. There was no room for them a
    /// moment ago; the next daemon resumes them.
    pub fn log_who_stays_paused(&self) {
        for managed in self
            .managed_vms
            .values()
            .filter(|managed| paused_by(managed.vm.as_ref()) == Some(Pauser::Balancer))
        {
            let name = &managed.name;
            warn!(
                vm = name,
                "{name} stays PAUSED, as there is no room for it: the next balancer resumes it when there is, \
                 `ballast resume {name}` does so at once"
            );
        }
    }
}

fn paused_by(vm: Option<&Vm>) -> Option<Pauser> {
    vm.and_then(|vm| vm.observed.vcpus.paused_by())
}

/// Whether the balancer carries out a last resort itself: a pause if it is set to and the VM allows it, and
/// always the end of its own pause.
fn is_carried_out(reason: &Reason, managed: &ManagedVm, set: LastResort) -> bool {
    match reason.rule {
        Rule::Pause => set == LastResort::Pause && managed.vm.as_ref().is_some_and(|vm| vm.observed.pausable),
        Rule::Resume => paused_by(managed.vm.as_ref()) == Some(Pauser::Balancer),
        _ => false,
    }
}
