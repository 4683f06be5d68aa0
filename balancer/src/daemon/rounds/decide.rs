//! One decision over all VMs, and what is published of it.

use api::units::Bytes;
use tracing::{info, warn};

use super::Daemon;
use crate::daemon::config::LastResort;
use crate::daemon::managed_vm::ManagedVm;
use crate::daemon::state::{HostView, State};
use crate::host::HostMemory;
use crate::policy::guards::Standing;
use crate::policy::host_state::HostState;
use crate::policy::{Balance, DEADBAND, HostObservation, Pressure, STALE_TICKS};

impl Daemon {
    pub(super) fn decide(&mut self) {
        self.decided = true;
        let now = self.now();
        let patience = self.tick * STALE_TICKS;
        for managed in self.managed_vms.values_mut().filter(|managed| managed.vm.is_some()) {
            if self.reservations.is_for_huge_pages(&managed.name) {
                managed.reserves();
            }
        }
        let managed_vms = &self.managed_vms;
        let has_come = |name: &str| managed_vms.values().any(|managed| managed.goes_by(name));
        self.reservations.expire(now, has_come);
        // What VMMs hold beside guest memory can't be given to guests.
        let overhead: Bytes = self.managed_vms.values().map(ManagedVm::overhead).sum();
        let resident: Bytes = self.managed_vms.values().map(ManagedVm::resident).sum();
        // Until a starting VM answers, its reservation is its charge.
        let unheard = self.managed_vms.values().filter(|managed| !self.reservations.is_for(&managed.name));
        let unheard: Bytes = unheard.map(ManagedVm::unheard).sum();
        self.vms.clear();
        let pauses = self.config.last_resort == LastResort::Pause;
        self.vms
            .extend(self.managed_vms.values_mut().filter_map(|managed| managed.lend(now, patience, pauses)));
        let touched = self.reservations.touched();
        let budget = self.budget.now(self.host, [resident, overhead, touched, unheard].into_iter().sum());
        self.budget_now = budget.saturating_sub(overhead);
        self.reservations.lend(&mut self.vms);
        let HostMemory { swap, .. } = self.host;
        let available = Some(self.host.to_be_had());
        let budget = self.budget_now.saturating_sub(unheard);
        let host = HostObservation { budget, pressure: self.pressure, swap, available };
        let before = self.balance.state;
        self.balance = self.policy.decide(now, host, &mut self.vms, &mut self.decisions);
        self.balance.charged = self.balance.charged.saturating_add(unheard);
        for vm in self.vms.drain(..) {
            if self.reservations.settle(&vm) {
                continue;
            }
            let waits = vm.standing() == Standing::Following
                && vm.demand() > vm.observed.target.saturating_add(DEADBAND);
            if waits {
                self.waiting.entry(vm.id).or_insert(now);
            } else {
                self.waiting.remove(&vm.id);
            }
            if let Some(managed) = self.managed_vms.get_mut(&vm.id) {
                managed.settle(now, vm);
            }
        }
        self.decisions.retain(|decision| !self.reservations.grant(now, decision));
        let Balance { charged, over, free, state, .. } = self.balance;
        if state != before {
            info!(
                "the host goes from {before} to {state}: {free} of its {} for VMs is free",
                self.budget_now
            );
            if before == HostState::Emergency {
                self.managed_vms.values_mut().for_each(|managed| managed.last_resort.calm());
            }
        }
        if over > Bytes::ZERO {
            if self.over.is_due(now, "over") {
                warn!(
                    "OVER BUDGET: VMs may hold {charged}, {over} more than the {} there is; \
                     memory is taken from all that can give some",
                    self.budget_now
                );
            }
        } else if self.over.end() {
            info!("within the budget again: VMs may hold {charged} of {}", self.budget_now);
        }
    }

    pub(super) fn publish(&mut self) {
        let HostMemory { total, available, .. } = self.host;
        let Balance { charged, free, over, unserved, state } = self.balance;
        let host = HostView {
            total,
            available,
            budget: self.budget_now,
            charged,
            free,
            over,
            unserved,
            state,
            rounds_over_budget: self.rounds_over_budget,
            pressure_percent: self.pressure.map(Pressure::as_percent),
        };
        let mut vms: Vec<_> =
            self.managed_vms.values().filter(|managed| !managed.gone).map(ManagedVm::view).collect();
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        let mut history = self.shared.history();
        for vm in &vms {
            history.stands(&vm.name, vm.standing);
        }
        drop(history);
        self.shared.set(State {
            rounds: self.rounds,
            host,
            vms,
            reservations: self.reservations.views(self.now()),
        });
    }
}
