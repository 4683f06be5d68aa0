//! Whether a VM is still there: by its socket, by what answers, and by its process.
//!
//! A socket may be removed under a VMM that runs on. Its guest goes on holding what it has and may touch what it
//! was granted, so it is charged as before until its process has ended.

use std::time::Duration;

use api::client::PeerProcess;
use api::units::Bytes;
use tracing::warn;

use super::ManagedVm;
use crate::daemon::account::Account;
use crate::daemon::discovery::{Found, Incarnation};
use crate::daemon::reservation::Process;
use crate::daemon::target_watch::TargetWatch;
use crate::driver::Driver;
use crate::policy::Vm;

/// What has become of a VM's socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Socket {
    /// It is where it was found.
    #[default]
    There,
    /// It was removed. A connection that was made before may still answer.
    Removed,
    /// Another VM's socket has its place: this VM can't be asked any more.
    Replaced,
}

impl ManagedVm {
    /// Whether this is still the VM that was found.
    pub fn is(&self, found: &Found) -> bool {
        self.socket != Socket::Replaced
            && self.name == found.name
            && self.incarnation == found.incarnation
            && self.vmm == found.kind
    }

    /// Whether it can be found by this name: no other VM may be started with it.
    pub fn goes_by(&self, name: &str) -> bool {
        self.socket == Socket::There && self.name == name && self.vm.is_some()
    }

    /// Notes that its socket was found.
    pub fn has_socket(&mut self) {
        self.socket = Socket::There;
    }

    /// Notes that its socket was not found, and whether another VM's has its place. Its name is the other's then.
    pub fn has_no_socket(&mut self, is_replaced: bool) {
        let runs = self.process_runs();
        match (self.process_seen, self.socket) {
            (_, Socket::Replaced) => {}
            // It is there: the configuration does not name it any more.
            _ if Incarnation::of(&self.path) == Some(self.incarnation) => {
                (self.socket, self.gone) = (Socket::Removed, true);
            }
            (Some(process), _) if is_replaced && runs => {
                self.name = format!("{}-{}", self.name, process.pid);
                (self.socket, self.errs) = (Socket::Replaced, true);
                if let Some(driver) = &mut self.driver {
                    driver.hang_up();
                }
            }
            _ => {
                self.socket = Socket::Removed;
                // The connection that it may still have tells whether it is there, or its process does.
                self.gone |= is_replaced || (self.vm.is_none() && !runs);
            }
        }
    }

    /// Whether it may have ended, which only asking it tells.
    pub fn lost_socket(&self) -> bool {
        self.socket == Socket::Removed && !self.gone
    }

    /// Whether it can be asked.
    pub fn can_be_asked(&self) -> bool {
        !self.gone && self.socket != Socket::Replaced
    }

    /// Whether it has ended, and no socket is left that another VM could come to have.
    pub fn is_over(&self) -> bool {
        match self.socket {
            Socket::There => false,
            Socket::Removed => self.gone,
            Socket::Replaced => self.gone || !self.process_runs(),
        }
    }

    /// Forgets it if it has no socket and `process` is its own, which answers at another one now.
    pub fn has_moved_to(&mut self, process: PeerProcess) {
        if self.socket != Socket::There && self.process() == process {
            self.forget();
        }
    }

    /// Notes which process answers.
    pub(super) fn see_process(&mut self, driver: &dyn Driver) {
        // Who only made the socket listen may be a service manager.
        let PeerProcess::Writer(pid) = driver.process() else { return };
        if self.process_seen.is_none_or(|process| process.pid != pid) {
            self.process_seen = Process::numbered(pid);
        }
    }

    /// Whether the process runs that answered for it, as far as is known.
    pub(super) fn process_runs(&self) -> bool {
        self.process_seen.is_some_and(|process| process.pid != std::process::id() && process.runs())
    }

    /// Says from time to time that it can't be found any more.
    pub fn remind_of_socket(&mut self, now: Duration) {
        if self.socket == Socket::There || self.gone {
            self.logs.socket.end();
            return;
        }
        if !self.logs.socket.is_due(now, "socket") {
            return;
        }
        let name = &self.name;
        let charge = self.vm.as_ref().map_or(self.account.ordinary(), Vm::charge);
        if self.socket == Socket::Removed {
            warn!(
                vm = name,
                "the socket of {name} was removed while its VMM runs: it stays charged {charge}, but a new balancer \
                 will not find it; have its VMM make the socket again, or start the VM anew"
            );
        } else {
            warn!(
                vm = name,
                "another VM's socket has replaced that of a VM whose process runs on: this one is called {name} now, \
                 and stays charged {charge} until its process ends"
            );
        }
    }

    /// Its process answers for the VM called `other` too: it is left alone, and tried again now and then.
    pub fn is_twin_of(&mut self, now: Duration, other: &str) {
        let name = &self.name;
        if self.logs.twin.is_due(now, "twin") {
            warn!(
                vm = name,
                "one process answers at the sockets of {name} and of {other}: that counts as one VM, called {other}; \
                 name one socket of each VM in the configuration"
            );
        }
        // It may serve one client at a time, and be somebody else's.
        if let Some(driver) = &mut self.driver {
            driver.hang_up();
        }
        self.forget();
    }

    /// Forgets all that it said.
    pub(super) fn forget(&mut self) {
        self.gone = true;
        self.vm = None;
        self.pid = None;
        self.process_seen = None;
        self.overhead = Bytes::ZERO;
        self.account = Account::default();
        self.target_watch = TargetWatch::default();
    }
}
