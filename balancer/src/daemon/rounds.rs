//! The rounds: ask every VM, decide, set the targets that change.

mod commands;
mod connections;
mod decide;
mod requests;
mod rescan;
mod startup;
mod urgent;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use api::units::Bytes;
use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout_at};
use tracing::warn;

use self::connections::Connections;
use self::urgent::FollowUp;
use super::command::Command;
use super::config::Config;
use super::discovery::{DirectoryWatch, Discovery};
use super::history::Fate;
use super::log_limiter::LogLimiter;
use super::managed_vm::{ManagedVm, RequestOutcome};
use super::notify::Notify;
use super::own_files::{Look, OwnFiles};
use super::reload::{Reread, reload};
use super::reservation::{Process, Reservations};
use super::shared::Shared;
use super::signals::Inherited;
use super::subscriptions::EventSubscriptions;
use super::{DaemonError, own_directory};
use crate::driver::{Driver, Error};
use crate::host::{Budget, HostMemory, HostReader};
use crate::policy::reason::{Decision, Reason};
use crate::policy::{Balance, DEADBAND, Policy, Pressure, Vm};

/// How often the directory is read even if no change was reported.
const RESCAN: Duration = Duration::from_secs(10);

/// How long a new daemon waits for the first answers of the VMs that it finds.
const FIRST_ANSWERS: Duration = Duration::from_secs(3);

/// Where the daemon's clock starts, so that reports older than the daemon have a time too.
const EPOCH: Duration = Duration::from_secs(24 * 3600);

/// How long a VM may wait for its guest's report in a round. Linux answers well within a millisecond.
const PATIENCE: Duration = Duration::from_millis(100);

/// The daemon at work.
pub struct Daemon {
    config: Config,
    own_files: OwnFiles,
    discovery: Discovery,
    reader: HostReader,
    tick: Duration,
    began: Instant,
    budget: Budget,
    budget_now: Bytes,
    host: HostMemory,
    policy: Policy,
    managed_vms: BTreeMap<u64, ManagedVm>,
    next_id: u64,
    subscriptions: EventSubscriptions,
    follow_up: Option<FollowUp>,
    requests: JoinSet<Done>,
    connections: Connections,
    vms: Vec<Vm>,
    decisions: Vec<Decision>,
    balance: Balance,
    over: LogLimiter,
    read_log: LogLimiter,
    watch_log: LogLimiter,
    descriptor_log: LogLimiter,
    /// A first decision was made.
    decided: bool,
    rounds: u64,
    rounds_over_budget: u64,
    shared: Shared,
    commands: mpsc::Receiver<Command>,
    reservations: Reservations,
    /// Since when guests have been short of what they want.
    waiting: BTreeMap<u64, Duration>,
    pressure: Option<Pressure>,
    notify: Notify,
    reread: Option<Reread>,
}

impl Daemon {
    /// A daemon before its first round.
    pub fn new(
        config: Config,
        own_files: OwnFiles,
        host: HostMemory,
        shared: Shared,
        commands: mpsc::Receiver<Command>,
        reread: Option<Reread>,
    ) -> Self {
        let mut next_id = 0;
        let directory = own_files.directory().to_owned();
        let own = own_directory(&directory);
        let reservations = Reservations::in_directory(&own, EPOCH, || {
            next_id += 1;
            next_id
        });
        next_id += 1;
        Self {
            own_files,
            discovery: Discovery::new(directory, config.vms.clone()),
            reader: HostReader::new(&config.sources),
            tick: config.interval,
            began: Instant::now(),
            budget: config.to_budget(),
            budget_now: Bytes::ZERO,
            host,
            policy: Policy::new(config.to_settings()),
            reservations,
            waiting: BTreeMap::new(),
            pressure: None,
            notify: Notify::from_environment(),
            reread,
            managed_vms: BTreeMap::new(),
            next_id,
            subscriptions: EventSubscriptions::default(),
            follow_up: None,
            requests: JoinSet::new(),
            connections: Connections::default(),
            vms: Vec::new(),
            decisions: Vec::new(),
            balance: Balance::default(),
            over: LogLimiter::default(),
            read_log: LogLimiter::default(),
            watch_log: LogLimiter::default(),
            descriptor_log: LogLimiter::default(),
            decided: false,
            rounds: 0,
            rounds_over_budget: 0,
            shared,
            commands,
            config,
        }
    }

    /// Where the VMs' sockets are.
    fn directory(&self) -> &Path {
        self.discovery.directory()
    }

    /// Gives up what only a daemon that runs has.
    pub fn leave(self) {
        self.own_files.leave();
    }

    /// Tells the service manager that the daemon stops.
    pub fn say_stopping(&self) {
        self.notify.stopping();
    }

    fn now(&self) -> Duration {
        EPOCH + self.began.elapsed()
    }

    /// Makes rounds until there is no place for this daemon any more, and says why.
    pub async fn balance(&mut self) -> DaemonError {
        let mut ticks = rhythm(self.tick);
        let mut hangup = self.reread.is_some().then(|| Inherited::take(SignalKind::hangup()).ok()).flatten();
        let mut rescans = rhythm(RESCAN);
        // The first scan is made below, before anything else.
        rescans.reset();
        let (mut watch, mut anew, mut revive, mut look) = (None, true, true, false);
        loop {
            if std::mem::take(&mut look) {
                match self.own_files.look() {
                    Ok(Look::Same) => {}
                    Ok(Look::MadeAnew) => {
                        self.reservations.keep(self.now());
                        anew = true;
                    }
                    Err(error) => return error,
                }
            }
            if std::mem::take(&mut anew) {
                // In this order, so that no change between the two is missed.
                watch = self.watch();
                self.rescan(std::mem::take(&mut revive));
            }
            let gives_up = self.next_to_give_up();
            tokio::select! {
                // Rounds and clients' commands come first, however many guests are in distress.
                biased;
                planned = ticks.tick() => {
                    if planned.elapsed() > self.tick / 10 {
                        self.shared.timings().late.fetch_add(1, Ordering::Relaxed);
                    }
                    self.round().await;
                }
                change = changed(&mut watch) => match change {
                    Ok(()) => {
                        self.rescan(false);
                        look = true;
                    }
                    // The next rescan makes another.
                    Err(_) => watch = None,
                },
                // A watch on a directory that was removed and made again hears nothing.
                _ = rescans.tick() => (anew, revive, look) = (true, true, true),
                () = heard(&mut hangup) => {
                    self.reload();
                    (ticks, anew) = (rhythm(self.tick), true);
                }
                // Before the first decision it is unknown what there is.
                Some(command) = self.commands.recv(), if self.decided => {
                    if self.start_commands(command) {
                        ticks.reset_immediately();
                    }
                }
                urgent = self.subscriptions.next() => self.answer(&urgent).await,
                () = due(gives_up) => self.give_up(),
                () = due(self.follow_up.map(FollowUp::next)) => self.answer(&BTreeSet::new()).await,
                Some(done) = self.requests.join_next() => self.take(finished(done)),
            }
        }
    }

    /// Takes over new settings, all or none.
    fn reload(&mut self) {
        let Some(reread) = &mut self.reread else { return };
        self.notify.reloading();
        if let Some(config) = reload(&self.config, self.host.total, reread) {
            self.tick = config.interval;
            self.budget = config.to_budget();
            self.policy.set_settings(config.to_settings());
            if config.vms != self.config.vms {
                self.discovery = Discovery::new(self.directory().to_owned(), config.vms.clone());
                self.rescan(true);
            }
            self.config = config;
            self.log_settings();
        }
        self.notify.reloaded();
    }

    /// Asks, decides, tells. No VM makes it longer than the tick. VMs that are often slow are asked at its
    /// end, and their answers are there for the next round.
    async fn round(&mut self) {
        let began = Instant::now();
        let asked = self.ask(PATIENCE, |_, managed| !managed.response_times.is_slow());
        self.gather(asked, self.tick / 2).await;
        self.drop_those_over();
        self.read_host();
        if self.knows_enough() {
            let deciding = Instant::now();
            self.decide();
            self.shared.timings().policy.observe(deciding.elapsed());
            // Counted here only, as a share of the rounds: the urgent ones between them don't count.
            self.rounds_over_budget += u64::from(self.balance.over > Bytes::ZERO);
            let told = self.tell();
            self.gather(told, self.tick / 4).await;
        }
        self.ask(PATIENCE, |_, managed| managed.response_times.is_slow());
        self.rounds += 1;
        self.shared.timings().round.observe(began.elapsed());
        self.publish();
        let (vms, Balance { charged, .. }, budget) = (self.managed_vms.len(), self.balance, self.budget_now);
        self.notify.round(|| format!("{vms} VMs may hold {charged} of {budget}"));
    }

    /// Whether every VM that was there at the start has answered, and what was promised before is known. Before
    /// that, its memory would count as free. No VM delays the others for long.
    fn knows_enough(&self) -> bool {
        let are_heard =
            || self.began.elapsed() >= FIRST_ANSWERS || self.managed_vms.values().all(ManagedVm::is_heard);
        self.decided || (self.reservations.are_known(self.now()) && are_heard())
    }

    /// Asks VMs how they stand; returns those that were asked.
    fn ask(&mut self, patience: Duration, whom: impl Fn(u64, &ManagedVm) -> bool) -> BTreeSet<u64> {
        let mut asked = BTreeSet::new();
        let now = self.now();
        for (&id, managed) in &mut self.managed_vms {
            if !managed.can_be_asked() || !whom(id, managed) {
                continue;
            }
            // Without a driver, its last request is still under way.
            let Some(mut driver) = managed.take_driver() else { continue };
            managed.response_times.asked(now);
            let connections = self.connections.clone();
            self.requests.spawn(async move {
                let turn = connections.turn().await;
                let outcome = RequestOutcome::Reported(driver.report(patience).await);
                turn.end(&mut *driver);
                (id, driver, outcome)
            });
            asked.insert(id);
        }
        asked
    }

    /// Takes in answers until the `awaited` ones have come or `patience` is over. It does not wait for VMs
    /// with an older open request or that are often slow.
    async fn gather(&mut self, mut awaited: BTreeSet<u64>, patience: Duration) {
        let deadline = Instant::now() + patience;
        awaited
            .retain(|id| self.managed_vms.get(id).is_some_and(|managed| !managed.response_times.is_slow()));
        while !awaited.is_empty()
            && let Ok(Some(done)) = timeout_at(deadline, self.requests.join_next()).await
        {
            let done = finished(done);
            awaited.remove(&done.0);
            self.take(done);
        }
    }

    /// Takes in what one request came to.
    fn take(&mut self, (id, driver, outcome): Done) {
        let now = self.now();
        let Some(managed) = self.managed_vms.get_mut(&id) else { return };
        managed.put_back(now, driver, &self.reader);
        managed.response_times.answered(now);
        // Its turn to be asked came while another request was open.
        let owes = managed.response_times.is_slow() && !matches!(outcome, RequestOutcome::Reported(_));
        if let RequestOutcome::PauseSet(reason, result) = &outcome {
            remember(&self.shared, &managed.name, *reason, result);
        }
        if let RequestOutcome::TargetSet(reason, result) = &outcome {
            remember(&self.shared, &managed.name, *reason, result);
            let served = result.is_ok() && reason.new.saturating_add(DEADBAND) >= reason.demand;
            if let Some(since) = served.then(|| self.waiting.remove(&id)).flatten() {
                self.shared.timings().grant.observe(now.saturating_sub(since));
            }
        }
        let shared = self.shares_process(id);
        let Some(managed) = self.managed_vms.get_mut(&id) else { return };
        managed.take(now, self.host.total, outcome, shared);
        self.find_twin(now, id);
        self.find_moved(id);
        let Some(managed) = self.managed_vms.get(&id) else { return };
        if managed.gone {
            self.waiting.remove(&id);
            self.drop_those_over();
        }
        if owes {
            self.ask(PATIENCE, |asked, _| asked == id);
        }
    }

    fn read_host(&mut self) {
        let now = self.now();
        self.reservations.look(now, Process::held);
        for managed in self.managed_vms.values_mut() {
            managed.look_if_silent(now, self.host.total, &self.reader);
        }
        self.pressure = self.reader.pressure();
        match self.reader.memory() {
            Ok(host) => self.host = host,
            Err(error) => {
                if self.read_log.is_due(self.now(), "meminfo") {
                    warn!("{error}; going on with what was read last");
                }
            }
        }
    }
}

/// A finished request: the VM, the driver, and what came of it.
type Done = (u64, Box<dyn Driver>, RequestOutcome);

/// What a request came to. A panic in one ends the daemon even if panics unwind: the VM's driver is lost with
/// the request, and the next daemon asks that VM again.
fn finished(done: Result<Done, JoinError>) -> Done {
    match done {
        Ok(done) => done,
        Err(error) => resume_unwind(error.into_panic()),
    }
}

/// Keeps what became of a decision, to answer why.
fn remember(shared: &Shared, vm: &str, reason: Reason, result: &Result<(), Error>) {
    let (fate, error) = match result {
        Ok(()) => (Fate::Taken, None),
        Err(error @ Error::Refused { .. }) => (Fate::Refused, Some(error.to_string())),
        Err(error) => (Fate::Unanswered, Some(error.to_string())),
    };
    shared.history().decided(vm, reason, fate, error);
}

/// Waits until then, or for ever if there is no such time.
async fn due(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// A steady interval; a late tick is not made up for.
fn rhythm(tick: Duration) -> Interval {
    let mut ticks = interval(tick);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Waits for the signal, or for ever if there is none.
async fn heard(signal: &mut Option<Inherited>) {
    match signal {
        Some(signal) => signal.received().await,
        None => std::future::pending().await,
    }
}

/// Waits for a change in a watched directory, or for ever if none is watched.
async fn changed(watch: &mut Option<DirectoryWatch>) -> io::Result<()> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
