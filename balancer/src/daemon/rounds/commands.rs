//! Commands of clients, started between two rounds.

use tokio::time::Instant;
use tracing::info;

use super::{Daemon, EPOCH};
use crate::daemon::COMMANDS;
use crate::daemon::api_error::ApiError;
use crate::daemon::command::Command;
use crate::daemon::managed_vm::{ManagedVm, RequestOutcome};
use crate::daemon::reservation::Taken;

impl Daemon {
    /// Starts all commands that have come. True if a round should follow at once, one for all of them.
    pub(super) fn start_commands(&mut self, first: Command) -> bool {
        let mut due = self.start_command(first);
        // However fast commands come, this ends.
        for _ in 1..COMMANDS {
            let Ok(command) = self.commands.try_recv() else { break };
            due |= self.start_command(command);
        }
        due
    }

    /// When the next client that waits for room has waited long enough, which may be long before the next
    /// round.
    pub(super) fn next_to_give_up(&self) -> Option<Instant> {
        let until = self.reservations.next_to_give_up()?;
        Some(self.began + until.saturating_sub(EPOCH))
    }

    /// Tells clients that have waited long enough that there is no room yet.
    pub(super) fn give_up(&mut self) {
        self.reservations.expire(self.now(), |_| false);
        self.publish();
    }

    /// Starts one command. True if a round should follow at once.
    fn start_command(&mut self, command: Command) -> bool {
        // Its client knows by now that it failed.
        if command.is_abandoned() {
            return false;
        }
        match command {
            Command::Reserve { request, answer } => {
                if self.managed_vms.values().any(|managed| managed.goes_by(&request.name)) {
                    // The client may have hung up, here and below.
                    let _ = answer.send(Err(ApiError::RunsAlready(request.name)));
                    return false;
                }
                let by_vms = self.managed_vms.values().map(ManagedVm::floor).sum();
                let taken = Taken { budget: self.budget_now, by_vms };
                let id = self.next_id;
                self.next_id += 1;
                self.reservations.admit(id, self.now(), &request, taken, answer);
                return true;
            }
            Command::Release { name, answer } => {
                let released = self.reservations.release(self.now(), &name);
                let _ = answer.send(if released { Ok(()) } else { Err(ApiError::NoReservation(name)) });
                return released;
            }
            Command::SetLimits { vm, limits, answer } => {
                let found =
                    self.managed_vms.iter_mut().find(|(_, managed)| managed.name == vm && !managed.gone);
                let Some((&id, managed)) = found else {
                    let _ = answer.send(Err(ApiError::NoSuchVm(vm)));
                    return false;
                };
                let Some(mut driver) = managed.take_driver() else {
                    let _ = answer.send(Err(ApiError::Busy(vm)));
                    return false;
                };
                let connections = self.connections.clone();
                self.requests.spawn(async move {
                    let turn = connections.turn().await;
                    let result = driver.set_limits(limits).await;
                    turn.end(&mut *driver);
                    if result.is_ok() {
                        info!(vm, "{vm} has new limits: {limits}");
                    }
                    let _ = answer.send(result.map_err(ApiError::from));
                    (id, driver, RequestOutcome::LimitsSet)
                });
            }
        }
        false
    }
}
