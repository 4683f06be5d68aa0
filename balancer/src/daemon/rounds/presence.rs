//! Who is there: slots for VMs that come, and none for those that went.

use tracing::{debug, info, warn};

use super::{Daemon, RESCAN};
use crate::daemon::roster::Watch;
use crate::daemon::slot::Slot;

impl Daemon {
    /// Word of VMs that come and go; `None` where the kernel gives none, which is said.
    pub(super) fn watch(&mut self) -> Option<Watch> {
        match self.roster.watch() {
            Ok(watch) => {
                self.deaf.end();
                Some(watch)
            }
            Err(error) => {
                if self.deaf.is_due(self.now(), "watch") {
                    warn!(
                        "VMs that come or go are seen only every {} s, as the kernel tells of no changes: {error} \
                         (where that is too many: fs.inotify.max_user_instances is the limit)",
                        RESCAN.as_secs()
                    );
                }
                None
            }
        }
    }

    /// Finds out who came and who went; with `revive`, tries those again that had ended.
    pub(super) fn rescan(&mut self, revive: bool) {
        let found = match self.roster.scan(self.now()) {
            Ok(found) => found,
            Err(error) => {
                if self.blind.is_due(self.now(), "directory") {
                    warn!("VMs that come or go are not seen: {error}");
                }
                return;
            }
        };
        self.blind.end();
        self.slots.retain(|&id, slot| {
            let stays = found.iter().any(|found| slot.is(found));
            if !stays && slot.vm.is_some() {
                info!(vm = slot.name, "{} has gone", slot.name);
            }
            if !stays {
                self.shared.history().forget(&slot.name);
                self.waiting.remove(&id);
            }
            stays
        });
        self.switchboard.retain(|id| self.slots.contains_key(&id));
        for found in found {
            match self.slots.values_mut().find(|slot| slot.name == found.name) {
                Some(slot) => {
                    slot.gone &= !revive;
                    slot.configure(found.memory);
                }
                None => {
                    let id = self.next_id;
                    self.next_id += 1;
                    debug!(vm = found.name, "found {}", found.socket.display());
                    let slot = Slot::new(id, found);
                    if let Some(calls) = slot.driver.as_ref().and_then(|driver| driver.calls()) {
                        self.switchboard.connect(id, calls);
                    }
                    self.slots.insert(id, slot);
                }
            }
        }
    }
}
