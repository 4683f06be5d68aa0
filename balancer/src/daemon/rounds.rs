//! Round after round: ask every VM, decide, tell those whose target changes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use balloon::units::Bytes;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tracing::{debug, info, warn};

use super::calls::Switchboard;
use super::command::{Command, Refusal};
use super::complaint::Complaint;
use super::config::Config;
use super::history::Fate;
use super::roster::{Roster, Watch};
use super::slot::{Outcome, Slot};
use super::state::{HostView, Shared, State};
use crate::driver::{Driver, Error};
use crate::host::{Budget, HostMemory};
use crate::policy::reason::{Decision, Reason};
use crate::policy::{Balance, Host, Policy, STALE_TICKS, Settings, Vm};

/// The directory is read this often even where no change was told.
const RESCAN: Duration = Duration::from_secs(10);

/// Where the daemon's clock starts, so that a report of before its time has a moment too.
const EPOCH: Duration = Duration::from_secs(24 * 3600);

/// How long answers are waited for where a guest can't wait.
const HURRY: Duration = Duration::from_millis(100);

/// While others still pay for what a calling guest is to get, they are looked at this often,
const CHASE_EVERY: Duration = Duration::from_millis(50);

/// and for this long; after that, the rounds have it.
const CHASE_FOR: Duration = Duration::from_secs(2);

/// The daemon at work.
pub struct Daemon {
    roster: Roster,
    meminfo: PathBuf,
    tick: Duration,
    began: Instant,
    budget: Budget,
    host: HostMemory,
    policy: Policy,
    slots: BTreeMap<u64, Slot>,
    next_id: u64,
    switchboard: Switchboard,
    chase: Option<Chase>,
    requests: JoinSet<Done>,
    vms: Vec<Vm>,
    decisions: Vec<Decision>,
    balance: Balance,
    over: Complaint,
    blind: Complaint,
    rounds: u64,
    rounds_over_budget: u64,
    shared: Shared,
    commands: mpsc::Receiver<Command>,
}

impl Daemon {
    /// A daemon that has asked nobody yet.
    pub fn new(
        config: &Config,
        directory: PathBuf,
        host: HostMemory,
        shared: Shared,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        Self {
            roster: Roster::new(directory, config.vms.clone()),
            meminfo: config.meminfo.clone(),
            tick: config.interval,
            began: Instant::now(),
            budget: config.to_budget(),
            host,
            policy: Policy::new(Settings { tick: config.interval, ..Settings::default() }),
            slots: BTreeMap::new(),
            next_id: 0,
            switchboard: Switchboard::default(),
            chase: None,
            requests: JoinSet::new(),
            vms: Vec::new(),
            decisions: Vec::new(),
            balance: Balance::default(),
            over: Complaint::default(),
            blind: Complaint::default(),
            rounds: 0,
            rounds_over_budget: 0,
            shared,
            commands,
        }
    }

    /// Where the VMs' sockets are.
    pub fn directory(&self) -> &Path {
        self.roster.directory()
    }

    /// Says what it is about to do, and what is odd about it.
    pub fn introduce(&mut self) {
        let budget = self.budget.now(self.host, Bytes::ZERO);
        info!(
            "looking after the VMs in {}: budget {budget} of the host's {}, every {} ms",
            self.roster.directory().display(),
            self.host.total,
            self.tick.as_millis()
        );
        if budget > self.host.total {
            warn!("the budget of {budget} is more than the {} that this host has", self.host.total);
        }
        if budget == Bytes::ZERO {
            warn!("the host's reserve leaves nothing to VMs: every VM will be shrunk as far as it goes");
        }
    }

    fn now(&self) -> Duration {
        EPOCH + self.began.elapsed()
    }

    /// Round after round, for ever.
    pub async fn balance(&mut self) {
        let mut ticks = interval(self.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rescans = interval(RESCAN);
        let mut watch = None;
        loop {
            if watch.is_none() {
                watch = self.roster.watch().ok();
            }
            tokio::select! {
                biased;
                change = changed(&mut watch) => {
                    if change.is_err() {
                        watch = None;
                        tokio::time::sleep(self.tick).await;
                    }
                    self.rescan(false);
                }
                // A watch on a directory that was removed and made again hears nothing.
                _ = rescans.tick() => {
                    watch = None;
                    self.rescan(true);
                }
                _ = ticks.tick() => self.round().await,
                callers = self.switchboard.next() => self.answer(&callers).await,
                () = due(self.chase) => self.answer(&BTreeSet::new()).await,
                Some(done) = self.requests.join_next() => self.take(done),
                Some(command) = self.commands.recv() => self.obey(command),
            }
        }
    }

    /// Begins what a client asked for.
    fn obey(&mut self, command: Command) {
        match command {
            Command::SetLimits { vm, limits, answer } => {
                let found = self.slots.iter_mut().find(|(_, slot)| slot.name == vm && !slot.gone);
                // Whoever asked may have hung up, here and below.
                let Some((&id, slot)) = found else {
                    let _ = answer.send(Err(Refusal::NoSuchVm(vm)));
                    return;
                };
                let Some(mut driver) = slot.driver.take() else {
                    let _ = answer.send(Err(Refusal::Busy(vm)));
                    return;
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
    }

    /// Finds out who came and who went; with `revive`, tries those again that had ended.
    fn rescan(&mut self, revive: bool) {
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
        self.slots.retain(|_, slot| {
            let stays = found.iter().any(|f| f.name == slot.name && f.incarnation == slot.incarnation);
            if !stays && slot.vm.is_some() {
                info!(vm = slot.name, "{} has gone", slot.name);
            }
            if !stays {
                self.shared.history().forget(&slot.name);
            }
            stays
        });
        self.switchboard.retain(|id| self.slots.contains_key(&id));
        for found in found {
            match self.slots.values_mut().find(|slot| slot.name == found.name) {
                Some(slot) => slot.gone &= !revive,
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

    /// Asks, decides, tells. No VM can make it longer than the tick.
    async fn round(&mut self) {
        self.ask(|_, _| true);
        self.gather(self.tick / 2).await;
        self.read_host();
        self.decide();
        self.tell();
        self.gather(self.tick / 4).await;
        self.rounds += 1;
        self.publish();
    }

    fn ask(&mut self, whom: impl Fn(u64, &Slot) -> bool) {
        for (&id, slot) in &mut self.slots {
            if slot.gone || !whom(id, slot) {
                continue;
            }
            // Without a driver its last request is still under way.
            let Some(mut driver) = slot.driver.take() else { continue };
            self.requests.spawn(async move {
                let outcome = Outcome::Polled(driver.report().await);
                (id, driver, outcome)
            });
        }
    }

    /// A round between the rounds: for guests that call, and then until others have paid what these are
    /// to get. Only VMs that have something new to say are asked.
    async fn answer(&mut self, callers: &BTreeSet<u64>) {
        self.ask(|id, slot| callers.contains(&id) || slot.moves());
        self.gather(HURRY).await;
        self.read_host();
        self.decide();
        self.tell();
        self.gather(HURRY).await;
        self.publish();
        let now = Instant::now();
        let until = match self.chase {
            Some(chase) if callers.is_empty() => chase.until,
            _ => now + CHASE_FOR,
        };
        let goes_on = self.balance.unserved > Bytes::ZERO && now < until;
        self.chase = goes_on.then_some(Chase { next: now + CHASE_EVERY, until });
    }

    /// Takes in answers until all are there or `patience` is over.
    async fn gather(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while let Ok(Some(done)) = timeout_at(deadline, self.requests.join_next()).await {
            self.take(done);
        }
    }

    /// Takes in what one request came to.
    fn take(&mut self, done: Result<Done, JoinError>) {
        // A panic in a request is a bug, and costs that VM its driver.
        let Ok((id, driver, outcome)) = done else { return };
        let now = self.now();
        let Some(slot) = self.slots.get_mut(&id) else { return };
        slot.driver = Some(driver);
        if let Outcome::Told(reason, result) = &outcome {
            remember(&self.shared, &slot.name, *reason, result);
        }
        slot.take(now, outcome);
    }

    fn read_host(&mut self) {
        match HostMemory::read(&self.meminfo) {
            Ok(host) => self.host = host,
            Err(error) => {
                if self.blind.is_due(self.now(), "meminfo") {
                    warn!("{error}; going on with what was read last");
                }
            }
        }
    }

    fn decide(&mut self) {
        let now = self.now();
        let patience = self.tick * STALE_TICKS;
        self.vms.clear();
        self.vms.extend(self.slots.values_mut().filter_map(|slot| slot.lend(now, patience)));
        let resident: Bytes = self.vms.iter().map(|vm| vm.said.host_rss).sum();
        // What VMMs hold beside guest memory can be given to no guest.
        let overhead: Bytes = self.slots.values().map(|slot| slot.overhead).sum();
        let budget = self.budget.now(self.host, resident.saturating_add(overhead));
        let host = Host::of(budget.saturating_sub(overhead));
        let before = self.balance.state;
        self.balance = self.policy.decide(now, host, &mut self.vms, &mut self.decisions);
        for vm in self.vms.drain(..) {
            if let Some(slot) = self.slots.get_mut(&vm.id) {
                slot.settle(now, vm);
            }
        }
        let Balance { charged, over, free, state, .. } = self.balance;
        if state != before {
            info!("the host goes from {before} to {state}: {free} of its {} for VMs is free", host.budget);
        }
        if over > Bytes::ZERO {
            self.rounds_over_budget += 1;
            if self.over.is_due(now, "over") {
                warn!(
                    "OVER BUDGET: VMs may hold {charged}, {over} more than the {} there is; \
                     memory is taken from all that can give some",
                    host.budget
                );
            }
        } else if self.over.end() {
            info!("within the budget again: VMs may hold {charged} of {}", host.budget);
        }
    }

    fn tell(&mut self) {
        for Decision { vm, reason } in self.decisions.drain(..) {
            let Some(slot) = self.slots.get_mut(&vm) else { continue };
            // While an earlier request is under way, the decision is made anew next time.
            let Some(mut driver) = slot.driver.take() else {
                self.shared.history().decided(&slot.name, reason, Fate::Postponed, None);
                continue;
            };
            if let Some(vm) = &mut slot.vm {
                // Until it is known to be done, the larger of both is what it may hold.
                vm.said.target = reason.old.max(reason.new);
            }
            self.requests.spawn(async move {
                let result = driver.set_target(reason.new).await;
                (vm, driver, Outcome::Told(reason, result))
            });
        }
    }

    fn publish(&mut self) {
        let HostMemory { total, available } = self.host;
        let Balance { charged, free, over, unserved, state } = self.balance;
        let host = HostView {
            total,
            available,
            budget: charged.saturating_add(free).saturating_sub(over),
            charged,
            free,
            over,
            unserved,
            state,
            rounds_over_budget: self.rounds_over_budget,
        };
        let mut vms: Vec<_> = self.slots.values().filter(|slot| !slot.gone).map(Slot::view).collect();
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        let mut history = self.shared.history();
        for vm in &vms {
            history.stands(&vm.name, vm.standing);
        }
        drop(history);
        self.shared.set(State { rounds: self.rounds, host, vms });
    }
}

/// A request that is over: whose, the driver that made it, and what came of it.
type Done = (u64, Box<dyn Driver>, Outcome);

/// Keeps what became of a decision, for those who ask why.
fn remember(shared: &Shared, vm: &str, reason: Reason, result: &Result<(), Error>) {
    let (fate, complaint) = match result {
        Ok(()) => (Fate::Taken, None),
        Err(error @ Error::Refused { .. }) => (Fate::Refused, Some(error.to_string())),
        Err(error) => (Fate::Unanswered, Some(error.to_string())),
    };
    shared.history().decided(vm, reason, fate, complaint);
}

/// Short rounds that follow a call.
#[derive(Clone, Copy)]
struct Chase {
    next: Instant,
    until: Instant,
}

/// Waits for the next of them; never, where there is none.
async fn due(chase: Option<Chase>) {
    match chase {
        Some(chase) => tokio::time::sleep_until(chase.next).await,
        None => std::future::pending().await,
    }
}

/// A change in the watched directory; never, where nothing is watched.
async fn changed(watch: &mut Option<Watch>) -> io::Result<()> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}
