//! What clients of the daemon's socket ask for, begun between two rounds.

use tokio::time::Instant;
use tracing::info;

use super::{Daemon, EPOCH};
use crate::daemon::COMMANDS;
use crate::daemon::command::Command;
use crate::daemon::refusal::Refusal;
use crate::daemon::reservation::Taken;
use crate::daemon::slot::{Outcome, Slot};

impl Daemon {
    /// Begins what clients asked for by now. True where a round should follow at once: one for all of them.
    pub(super) fn obey_all(&mut self, first: Command) -> bool {
        let mut due = self.obey(first);
        // However fast they ask, there is an end.
        for _ in 1..COMMANDS {
            let Ok(command) = self.commands.try_recv() else { break };
            due |= self.obey(command);
        }
        due
    }

    /// When the patience of the next that waits for room ends, which may be long before the next round.
    pub(super) fn next_to_give_up(&self) -> Option<Instant> {
        let until = self.reservations.next_to_give_up()?;
        Some(self.began + until.saturating_sub(EPOCH))
    }

    /// Tells those who have waited long enough that there is no room yet.
    pub(super) fn give_up(&mut self) {
        self.reservations.expire(self.now(), |_| false);
        self.publish();
    }

    /// Begins what a client asked for. True where a round should follow at once.
    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Reserve { wanted, answer } => {
                if self.slots.values().any(|slot| slot.name == wanted.name && slot.vm.is_some()) {
                    // Whoever asked may have hung up, here and below.
                    let _ = answer.send(Err(Refusal::RunsAlready(wanted.name)));
                    return false;
                }
                let by_vms = self.slots.values().map(Slot::floor).sum();
                let taken = Taken { budget: self.budget_now, by_vms };
                let id = self.next_id;
                self.next_id += 1;
                self.reservations.admit(id, self.now(), &wanted, taken, answer);
                return true;
            }
            Command::Release { name, answer } => {
                let released = self.reservations.release(self.now(), &name);
                let _ = answer.send(if released { Ok(()) } else { Err(Refusal::NoReservation(name)) });
                return released;
            }
            Command::SetLimits { vm, limits, answer } => {
                let found = self.slots.iter_mut().find(|(_, slot)| slot.name == vm && !slot.gone);
                let Some((&id, slot)) = found else {
                    let _ = answer.send(Err(Refusal::NoSuchVm(vm)));
                    return false;
                };
                let Some(mut driver) = slot.take_driver() else {
                    let _ = answer.send(Err(Refusal::Busy(vm)));
                    return false;
                };
                self.requests.spawn(async move {
                    let result = driver.set_limits(limits).await;
                    if result.is_ok() {
                        info!(vm, "{vm} has new limits: {limits}");
                    }
                    let _ = answer.send(result.map_err(Refusal::from));
                    (id, driver, Outcome::Asked)
                });
            }
        }
        false
    }
}
