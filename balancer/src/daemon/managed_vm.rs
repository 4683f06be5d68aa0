//! One VM as the daemon knows it: its driver, what it reported, and what was logged about it.

mod presence;
mod view;

use std::path::PathBuf;
use std::time::Duration;

use api::client::PeerProcess;
use api::guest_memory::GuestMemory;
use api::limits::{Limits, Wanted};
use api::status::Pauser;
use api::units::Bytes;
use tracing::{info, warn};

use self::presence::Socket;
use super::account::Account;
use super::discovery::{Found, Incarnation};
use super::last_resort::LastResortState;
use super::log_limiter::LogLimiter;
use super::reservation::Process;
use super::response_times::ResponseTimes;
use super::target_watch::TargetWatch;
use crate::driver::{Driver, Error, Kind, Status};
use crate::host::HostReader;
use crate::policy::guards::Standing;
use crate::policy::reason::{Reason, Rule};
use crate::policy::{Observation, Vcpus, Vm};

/// A guest may claim to use twice what the host holds for it and this much more before its reports are called
/// wrong. The two are not counted at the same moment or in the same way.
const USE_TOLERANCE: Bytes = Bytes::mib(256);

/// What came of a request to a VM.
pub enum RequestOutcome {
    /// How it stands.
    Reported(Result<Box<Status>, Error>),
    /// Whether it took a new target.
    TargetSet(Reason, Result<(), Error>),
    /// Whether it is paused, or runs on.
    PauseSet(Reason, Result<(), Error>),
    /// A client asked for new limits and has its answer.
    LimitsSet,
}

/// The troubles of a VM that are logged.
#[derive(Default)]
struct Logs {
    starts: LogLimiter,
    errors: LogLimiter,
    standing: LogLimiter,
    usage: LogLimiter,
    twin: LogLimiter,
    socket: LogLimiter,
    plug: LogLimiter,
}

/// One VM.
pub struct ManagedVm {
    pub name: String,
    pub vmm: Kind,
    path: PathBuf,
    incarnation: Incarnation,
    socket: Socket,
    /// `None` while a request is under way.
    pub driver: Option<Box<dyn Driver>>,
    /// What the configuration allows it, if its VMM keeps no limits.
    memory: Option<Wanted>,
    /// Its driver has not heard of `memory` yet.
    unconfigured: bool,
    /// What the policy knows of it; `None` until its first answer.
    pub vm: Option<Vm>,
    /// What its administrator set. The policy sees it capped by what the guest has drivers for.
    limits: Option<Limits>,
    /// Its process has ended: nothing listens at the socket.
    pub gone: bool,
    overhead: Bytes,
    account: Account,
    /// It was logged that its memory lies in reserved huge pages.
    told_apart: bool,
    huge_percent: Option<u8>,
    id: u64,
    pid: Option<u32>,
    /// The process that answers.
    process_seen: Option<Process>,
    started: Duration,
    answered: Option<Duration>,
    errs: bool,
    heard: Option<GuestMemory>,
    pub response_times: ResponseTimes,
    logs: Logs,
    pub last_resort: LastResortState,
    pub target_watch: TargetWatch,
    last_reason: Option<Reason>,
    grows: u64,
    shrinks: u64,
    errors: u64,
}

impl ManagedVm {
    /// The VM of a socket that was just found.
    pub fn new(id: u64, found: Found) -> Self {
        let driver = found.driver();
        let Found { name, socket: path, kind: vmm, incarnation, memory } = found;
        Self {
            id,
            name,
            vmm,
            path,
            incarnation,
            socket: Socket::default(),
            driver: Some(driver),
            memory,
            unconfigured: false,
            vm: None,
            limits: None,
            gone: false,
            overhead: Bytes::ZERO,
            account: Account::default(),
            told_apart: false,
            huge_percent: None,
            pid: None,
            process_seen: None,
            started: Duration::ZERO,
            answered: None,
            errs: false,
            heard: None,
            response_times: ResponseTimes::default(),
            logs: Logs::default(),
            last_resort: LastResortState::default(),
            target_watch: TargetWatch::default(),
            last_reason: None,
            grows: 0,
            shrinks: 0,
            errors: 0,
        }
    }

    /// Takes over what the configuration allows it now.
    pub fn configure(&mut self, memory: Option<Wanted>) {
        if memory != self.memory {
            info!(vm = self.name, "{} may have other memory from now on", self.name);
            self.memory = memory;
            self.unconfigured = true;
        }
    }

    /// The process at the other end of its socket.
    pub fn process(&self) -> PeerProcess {
        self.account.process()
    }

    /// Its driver for one request; `None` while another request is under way.
    pub fn take_driver(&mut self) -> Option<Box<dyn Driver>> {
        let mut driver = self.driver.take()?;
        if std::mem::take(&mut self.unconfigured) {
            driver.configure(self.memory);
        }
        Some(driver)
    }

    /// Puts the driver back after a request, and looks at the process that it found.
    pub fn put_back(&mut self, now: Duration, driver: Box<dyn Driver>, host: &HostReader) {
        self.account.look(now, driver.process(), host);
        self.see_process(&*driver);
        self.driver = Some(driver);
    }

    /// Looks again at what the host holds for it if its last request failed or is still open: its guest may
    /// go on touching memory while its API is silent.
    pub fn look_if_silent(&mut self, now: Duration, total: Bytes, host: &HostReader) {
        if self.gone || !(self.errs || self.driver.is_none()) {
            return;
        }
        self.account.look_again(now, host);
        if let Some(vm) = &mut self.vm {
            self.account.renew(&mut vm.observed, total);
        }
    }

    /// What of the host's memory is known to be held for its guest.
    pub fn resident(&self) -> Bytes {
        self.vm.as_ref().map_or(Bytes::ZERO, |vm| self.account.resident(&vm.observed))
    }

    /// The charge of a VM that never gave a usable answer: what the host holds for its process, except
    /// reserved huge pages.
    pub fn unheard(&self) -> Bytes {
        if self.gone || self.vm.is_some() { Bytes::ZERO } else { self.account.ordinary() }
    }

    /// What the host holds for its VMM beside guest memory. For a VM on reserved huge pages that is all of
    /// its process's ordinary memory.
    pub fn overhead(&self) -> Bytes {
        if self.is_reserved() { self.account.ordinary() } else { self.overhead }
    }

    /// Whether it has answered and its memory lies in the host's reserved huge pages. Such a VM is no part of
    /// the budget and is not moved.
    pub fn is_reserved(&self) -> bool {
        self.vm.is_some() && self.account.is_reserved()
    }

    /// Notes that its reservation is for a VM on reserved huge pages.
    pub fn reserves(&mut self) {
        self.account.reserves();
    }

    /// Takes in what came of a request, on a host with `total` memory. If its process is `shared` with another
    /// VM, that runs on by itself.
    pub fn take(&mut self, now: Duration, total: Bytes, outcome: RequestOutcome, shared: bool) {
        match outcome {
            RequestOutcome::Reported(Ok(status)) => self.answered(now, total, &status),
            RequestOutcome::Reported(Err(error)) => self.failed(now, &error, shared),
            RequestOutcome::LimitsSet => {}
            RequestOutcome::PauseSet(reason, Ok(())) => {
                let vcpus =
                    if reason.rule == Rule::Pause { Vcpus::Paused(Pauser::Balancer) } else { Vcpus::Run };
                self.last_reason = Some(reason);
                if let Some(vm) = &mut self.vm {
                    vm.observed.vcpus = vcpus;
                }
            }
            RequestOutcome::PauseSet(reason, Err(error)) => {
                if reason.rule == Rule::Pause && matches!(error, Error::Refused { .. }) {
                    self.last_resort.refused(now);
                }
                self.failed(now, &error, shared);
            }
            RequestOutcome::TargetSet(reason, Ok(())) => self.took(&reason),
            RequestOutcome::TargetSet(reason, Err(error)) => {
                // A refusal changed nothing. After any other error either target may hold: the larger one
                // stays charged until the VM tells.
                if let (Error::Refused { .. }, Some(vm)) = (&error, &mut self.vm) {
                    vm.observed.target = reason.old;
                }
                self.failed(now, &error, shared);
            }
        }
    }

    fn answered(&mut self, now: Duration, total: Bytes, status: &Status) {
        let name = &self.name;
        let Status { pid, uptime, overhead, memory } = status;
        if pid.is_some() {
            if self.pid.is_some() && self.pid != *pid {
                if self.logs.starts.is_due(now, "anew") {
                    info!(vm = name, "{name} was started anew");
                }
                self.vm = None;
                self.target_watch = TargetWatch::default();
            }
            self.pid = *pid;
        }
        if let Some(uptime) = uptime {
            self.started = now.saturating_sub(*uptime);
        }
        self.overhead = *overhead;
        if self.limits.replace(memory.limits) != Some(memory.limits) {
            self.target_watch.forget();
        }
        self.target_watch.look(now, name, memory.target);
        self.huge_percent = memory.huge_percent();
        self.gone = false;
        if self.logs.errors.end() {
            info!(vm = name, "{name} answers again");
        }
        let observed = self.account.believe(now, name, Observation::from(memory), *overhead, total);
        if memory.paused_by == Some(Pauser::Balancer) && observed.vcpus == Vcpus::Run {
            self.last_resort.refused(now);
        }
        if !std::mem::replace(&mut self.told_apart, self.account.is_reserved()) && self.told_apart {
            info!(
                vm = name,
                "{name} lies in the host's reserved huge pages: it is no part of the budget, and not moved"
            );
        }
        match &memory.plug {
            Some(plug) if plug.lacks_driver() => {
                if self.logs.plug.is_due(now, "plug") {
                    warn!(
                        vm = name,
                        "the guest of {name} has no working virtio_mem driver, and is given no more than {}: load \
                         virtio_mem in it (Linux 5.17 or later), or start the VM with --grow balloon",
                        memory.ceiling()
                    );
                }
            }
            _ => {
                if self.logs.plug.end() {
                    info!(vm = name, "the guest of {name} can plug memory now");
                }
            }
        }
        self.heard = observed.guest;
        self.answered = Some(now);
        self.errs = false;
        let uptime = now.saturating_sub(self.started);
        match &mut self.vm {
            Some(vm) => vm.observed = observed,
            None => {
                if self.logs.starts.is_due(now, "found") {
                    info!(vm = name, "found {name}: has {}, limits {}", memory.actual, memory.limits);
                }
                self.vm = Some(Vm::new(self.id, uptime, observed));
            }
        }
    }

    fn failed(&mut self, now: Duration, error: &Error, shared: bool) {
        self.errs = true;
        let name = &self.name;
        let runs_on = !self.gone && !shared && self.process_runs();
        if matches!(error, Error::NoSuchVm { .. }) && !runs_on {
            // A stale socket is tried again and again.
            if self.answered.take().is_some() && self.logs.errors.is_due(now, error.word()) {
                info!(vm = name, "{name} has ended");
            }
            self.forget();
            return;
        }
        self.errors += 1;
        let kind = error.word();
        // One that ends removes its socket first. Of one that does not end, [`Self::remind_of_socket`] tells.
        if self.socket == Socket::There && self.logs.errors.is_due(now, kind) {
            match &self.vm {
                Some(vm) => {
                    let charge = vm.observed.target.max(vm.observed.actual);
                    warn!(vm = name, kind, "{name} is left as it is, charged {charge}: {error}");
                }
                None => match self.account.ordinary() {
                    Bytes::ZERO => {
                        warn!(vm = name, kind, "{name} is left out, and what it holds is unknown: {error}");
                    }
                    held => warn!(
                        vm = name,
                        kind,
                        "{name} is left out, and charged the {held} that the host holds for its process: {error}"
                    ),
                },
            }
        }
    }

    fn took(&mut self, reason: &Reason) {
        let name = &self.name;
        info!(vm = name, rule = ?reason.rule, "{name}: {reason}");
        if let Some(vm) = &mut self.vm {
            vm.observed.target = reason.new;
        }
        self.target_watch.took(reason.new);
        self.account.granted(reason.new);
        self.last_reason = Some(*reason);
        if reason.new > reason.old {
            self.grows += 1;
        } else if reason.new < reason.old {
            self.shrinks += 1;
        }
    }

    /// Whether its guest is on the way to its target.
    pub fn moves(&self) -> bool {
        self.vm.as_ref().is_some_and(|vm| vm.observed.actual != vm.observed.target)
    }

    /// Hands the VM over for a round's decision, with the present age of its reports. With `pauses`, the
    /// balancer may pause it if its VMM knows who paused.
    ///
    /// `None` if there is nothing to decide: it never answered, or lies in reserved huge pages.
    pub fn lend(&mut self, now: Duration, patience: Duration, pauses: bool) -> Option<Vm> {
        if self.is_reserved() {
            return None;
        }
        let mut vm = self.vm.take()?;
        let silent = self.answered.map_or(Duration::MAX, |answered| now.saturating_sub(answered));
        vm.uptime = now.saturating_sub(self.started);
        vm.answers = !self.errs && silent <= patience;
        vm.observed.since = silent;
        vm.observed.pausable = pauses && self.vmm.knows_who_paused() && self.last_resort.may_pause(now);
        vm.observed.guest =
            self.heard.map(|said| GuestMemory { age: said.age.saturating_add(silent), ..said });
        Some(vm)
    }

    /// Takes the VM back, and logs what the round found wrong with its guest.
    pub fn settle(&mut self, now: Duration, vm: Vm) {
        let name = &self.name;
        let trouble = match vm.standing() {
            Standing::Stale => Some("stale"),
            Standing::NoDriver => Some("no-driver"),
            Standing::Stuck => Some("stuck"),
            // These are logged elsewhere, or need no line.
            Standing::Following
            | Standing::Static
            | Standing::Booting
            | Standing::Leaving
            | Standing::NotAnswering
            | Standing::Paused => None,
        };
        match trouble {
            None => {
                if vm.standing() == Standing::Following && self.logs.standing.end() {
                    info!(vm = name, "{name} reports and follows again");
                }
            }
            Some(kind) if self.logs.standing.is_due(now, kind) => match (vm.standing(), vm.observed.guest) {
                (Standing::NoDriver, _) => warn!(
                    vm = name,
                    "no balloon driver runs in {name}: it is charged its full {}",
                    vm.charge()
                ),
                (Standing::Stuck, _) => warn!(
                    vm = name,
                    "{name} does not give up what it was asked for: it keeps {} and is left alone for a while",
                    vm.observed.actual
                ),
                (_, Some(GuestMemory { age, .. })) => warn!(
                    vm = name,
                    "no reports from {name} since {} s ago: it is not shrunk until its guest reports again",
                    age.as_secs()
                ),
                (_, None) => {
                    warn!(vm = name, "no reports from {name} ever: it is not shrunk until its guest reports")
                }
            },
            Some(_) => {}
        }
        self.check_use(now, &vm);
        self.last_resort.remind(now, &self.name, &vm);
        self.vm = Some(vm);
    }

    /// The host holds what a guest has touched. A guest that claims to use far more lies: that is logged, and
    /// costs others no more than its limits and weight allow.
    fn check_use(&mut self, now: Duration, vm: &Vm) {
        let name = &self.name;
        let most = |held: Bytes| held.saturating_add(held).saturating_add(USE_TOLERANCE);
        match vm.used().zip(vm.observed.host_rss) {
            Some((used, held)) if held > Bytes::ZERO && used > most(held) => {
                if self.logs.usage.is_due(now, "use") {
                    warn!(
                        vm = name,
                        "{name} says that it uses {used}, but the host holds {held} for it: \
                         its reports are wrong, or its memory is swapped out"
                    );
                }
            }
            _ => drop(self.logs.usage.end()),
        }
    }

    /// Whether it has answered in any way, even with an error.
    pub fn is_heard(&self) -> bool {
        self.gone || self.errs || self.vm.is_some()
    }

    /// What it keeps at present, however much others need.
    pub fn floor(&self) -> Bytes {
        if self.is_reserved() {
            return Bytes::ZERO;
        }
        self.vm.as_ref().map_or(self.unheard(), |vm| match vm.standing() {
            Standing::Following | Standing::Booting => vm.observed.limits.min(),
            Standing::Static
            | Standing::Leaving
            | Standing::NoDriver
            | Standing::NotAnswering
            | Standing::Stale
            | Standing::Stuck => vm.charge(),
            // A VM that starts takes no room from one that waits to be resumed.
            Standing::Paused if vm.is_paused_by_balancer() => vm.charge().saturating_add(vm.untouched()),
            Standing::Paused => vm.charge(),
        })
    }
}
