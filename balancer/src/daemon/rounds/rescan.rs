//! Keeps the list of managed VMs up to date.

use std::time::Duration;

use api::client::PeerProcess;
use rustix::process::{Resource, getrlimit};
use tracing::{debug, info, warn};

use super::{Daemon, PATIENCE, RESCAN};
use crate::daemon::discovery::DirectoryWatch;
use crate::daemon::managed_vm::ManagedVm;
use crate::driver::Kind;

/// Descriptors that are kept for the daemon's own files, sockets and clients.
const SPARE_DESCRIPTORS: usize = 32;

impl Daemon {
    /// A watch for VMs that come and go; `None`, and a line in the log, if the kernel gives none.
    pub(super) fn watch(&mut self) -> Option<DirectoryWatch> {
        match self.discovery.watch() {
            Ok(watch) => {
                self.watch_log.end();
                Some(watch)
            }
            Err(error) => {
                if self.watch_log.is_due(self.now(), "watch") {
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

    /// Finds out which VMs came and went. With `revive`, those that had ended are tried again.
    pub(super) fn rescan(&mut self, revive: bool) {
        let found = match self.discovery.scan(self.now()) {
            Ok(found) => found,
            Err(error) => {
                if self.read_log.is_due(self.now(), "directory") {
                    warn!("VMs that come or go are not seen: {error}");
                }
                return;
            }
        };
        self.read_log.end();
        let now = self.now();
        for managed in self.managed_vms.values_mut() {
            if found.iter().any(|found| managed.is(found)) {
                managed.has_socket();
            } else {
                let name = managed.name.clone();
                managed.has_no_socket(found.iter().any(|found| found.name == name));
                if managed.name != name {
                    self.shared.history().forget(&name);
                }
            }
            if revive {
                managed.remind_of_socket(now);
            }
        }
        self.drop_those_over();
        self.subscriptions.retain(|id| self.managed_vms.contains_key(&id));
        for found in found {
            match self.managed_vms.values_mut().find(|managed| managed.is(&found)) {
                Some(managed) => {
                    managed.gone &= !revive;
                    managed.configure(found.memory);
                }
                None => {
                    let id = self.next_id;
                    self.next_id += 1;
                    debug!(vm = found.name, "found {}", found.socket.display());
                    let managed = ManagedVm::new(id, found);
                    self.managed_vms.insert(id, managed);
                }
            }
        }
        // Whether they have ended is not left to the next round: others may need their memory.
        self.ask(PATIENCE, |_, managed| managed.lost_socket());
        self.share_descriptors();
    }

    /// Forgets VMs that have ended and have no socket.
    pub(super) fn drop_those_over(&mut self) {
        self.managed_vms.retain(|&id, managed| {
            let stays = !managed.is_over();
            if !stays {
                if managed.vm.is_some() {
                    info!(vm = managed.name, "{} has gone", managed.name);
                }
                self.shared.history().forget(&managed.name);
                self.waiting.remove(&id);
            }
            stays
        });
    }

    /// Forgets VMs without a socket whose process has answered as the VM `id`: it has made another socket.
    pub(super) fn find_moved(&mut self, id: u64) {
        let Some(managed) = self.managed_vms.get(&id).filter(|managed| managed.vm.is_some()) else { return };
        let process = managed.process();
        if matches!(process, PeerProcess::Writer(_)) {
            let others = self.managed_vms.iter_mut().filter(|(other, _)| **other != id);
            others.for_each(|(_, other)| other.has_moved_to(process));
            self.drop_those_over();
        }
    }

    /// Whether the process of the VM `id` answers for another one too.
    pub(super) fn shares_process(&self, id: u64) -> bool {
        let Some(process) = self.managed_vms.get(&id).map(ManagedVm::process) else { return false };
        let mut others = self.managed_vms.iter().filter(|(other, _)| **other != id);
        others.any(|(_, other)| other.vm.is_some() && other.process() == process)
    }

    /// Leaves a VM alone whose process answers for another one already: then both sockets are one VM's. Only
    /// QEMU has several (each `-qmp` is one).
    pub(super) fn find_twin(&mut self, now: Duration, id: u64) {
        let Some(managed) = self.managed_vms.get(&id).filter(|managed| managed.vm.is_some()) else { return };
        let (vmm, process) = (managed.vmm, managed.process());
        if vmm != Kind::Qemu || !matches!(process, PeerProcess::Writer(_)) {
            return;
        }
        let others = self.managed_vms.range(..id);
        let twin = others.map(|(_, other)| other).find(|other| {
            other.vmm == vmm && other.vm.is_some() && !other.gone && other.process() == process
        });
        let Some(twin) = twin.map(|twin| twin.name.clone()) else { return };
        if let Some(managed) = self.managed_vms.get_mut(&id) {
            managed.is_twin_of(now, &twin);
        }
    }

    /// Divides the descriptors that there are: first to asking VMs, then to hearing those that can call.
    fn share_descriptors(&mut self) {
        let limit = getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit).ok());
        let most = limit.unwrap_or(usize::MAX).saturating_sub(SPARE_DESCRIPTORS);
        if self.connections.limit(most, self.managed_vms.len()) {
            let drivers = self.managed_vms.values_mut().filter_map(|managed| managed.driver.as_mut());
            drivers.for_each(|driver| driver.hang_up());
        }
        self.subscribe(most.saturating_sub(self.managed_vms.len()));
    }

    /// Hears `most` of those that can call.
    fn subscribe(&mut self, most: usize) {
        self.subscriptions.keep_at_most(most);
        for (&id, managed) in &self.managed_vms {
            if self.subscriptions.hears(id) {
                continue;
            }
            let Some(events) = managed.driver.as_ref().and_then(|driver| driver.events()) else { continue };
            if self.subscriptions.len() >= most {
                if self.descriptor_log.is_due(self.now(), "descriptors") {
                    warn!(
                        "guests that run short are heard only once a round, not all of them at once: there are \
                         too few descriptors for so many VMs (LimitNOFILE= or `ulimit -n` is the limit)"
                    );
                }
                return;
            }
            self.subscriptions.subscribe(id, events);
        }
        self.descriptor_log.end();
    }
}
