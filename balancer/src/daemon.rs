//! The daemon: once a tick it asks every VM, decides, and tells those whose target changes.
//!
//! It keeps nothing that a restart could lose: targets and limits are read from
//! the VMs each round, so that after `kill -9` a new daemon carries on from there.

mod complaint;
mod config;
mod roster;
mod server;
mod slot;
mod state;

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use balloon::runtime::{self, RuntimeError};
use balloon::units::Bytes;
use rustix::fs::{FlockOperation, flock};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tracing::{debug, info, warn};

pub use self::config::{Config, ConfigError, LONGEST_INTERVAL, SHORTEST_INTERVAL};
pub use self::state::{HostView, MemoryView, State, VmView};

use self::complaint::Complaint;
use self::roster::Watch;
use self::slot::{Outcome, Slot};
use self::state::Shared;
use crate::driver::ballast::{self, Client};
use crate::host::{Budget, HostError, HostMemory};
use crate::policy::reason::Decision;
use crate::policy::{Balance, Host, Policy, STALE_TICKS, Settings, Vm};

/// The daemon's own place in the runtime directory, which no VM's socket can be.
const OWN_DIRECTORY: &str = "balancer";

/// The directory is read this often even where no change was told.
const RESCAN: Duration = Duration::from_secs(10);

/// Where the daemon's clock starts, so that a report of before its time has a moment too.
const EPOCH: Duration = Duration::from_secs(24 * 3600);

/// Why the daemon can't start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The settings make no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no directory in which to look for VMs.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The host's memory is unknown.
    #[error(transparent)]
    Host(#[from] HostError),
    /// One is enough; two would undo each other's work.
    #[error("a balancer already looks after the VMs in {} (process {pid}): stop it first", .directory.display())]
    AlreadyRunning {
        /// Which VMs.
        directory: PathBuf,
        /// Which process.
        pid: String,
    },
    /// A file, directory, socket or watch of its own.
    #[error("cannot use {}: {source}", .path.display())]
    Own {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The address for metrics.
    #[error("cannot serve metrics on {address}: {source}")]
    Metrics {
        /// Which.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Where the daemon that looks after the VMs in `directory` is asked for `/state` and `/metrics`.
pub fn socket_in(directory: &Path) -> PathBuf {
    directory.join(OWN_DIRECTORY).join("balancer.sock")
}

/// Ends when the process is asked to: SIGTERM, or Ctrl-C on the terminal.
///
/// # Errors
/// Where the kernel allows no handlers.
pub fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Balances the VMs of one directory until `shutdown` ends. VMs keep what they have then.
///
/// Needs a tokio runtime with I/O and time; one thread is enough.
///
/// # Errors
/// See [`DaemonError`]; all of them before the first round.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), DaemonError> {
    config.validate()?;
    let directory = prepare(&config)?;
    let lock = lock(&directory)?;
    let host = HostMemory::read(&config.meminfo)?;
    let shared = Shared::default();
    let mut servers = serve(&config, &directory, &shared).await?;
    let mut daemon = Daemon::new(&config, directory, host, shared);
    daemon.introduce();

    tokio::pin!(shutdown);
    tokio::select! {
        () = &mut shutdown => {}
        () = daemon.balance() => {}
    }
    servers.abort_all();
    let _ = fs::remove_file(socket_in(&daemon.directory));
    drop(lock);
    info!("stopped; every VM keeps the memory it has");
    Ok(())
}

/// Makes the directories.
fn prepare(config: &Config) -> Result<PathBuf, DaemonError> {
    let directory = match &config.directory {
        Some(directory) => directory.clone(),
        None => runtime::create_directory()?,
    };
    let own = directory.join(OWN_DIRECTORY);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&own)
        .map_err(|source| DaemonError::Own { path: own.clone(), source })?;
    Ok(directory)
}

/// Holds a lock that the kernel drops when this process ends in whatever way.
fn lock(directory: &Path) -> Result<File, DaemonError> {
    let path = directory.join(OWN_DIRECTORY).join("lock");
    let own = |source| DaemonError::Own { path: path.clone(), source };
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(own)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut pid = String::new();
        let _ = Read::by_ref(&mut file).take(20).read_to_string(&mut pid);
        return Err(DaemonError::AlreadyRunning {
            directory: directory.to_owned(),
            pid: pid.trim().to_owned(),
        });
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(own)?;
    Ok(file)
}

/// Serves the last state. The lock is held, so that a socket found there is a dead daemon's.
async fn serve(config: &Config, directory: &Path, shared: &Shared) -> Result<JoinSet<()>, DaemonError> {
    let path = socket_in(directory);
    let own = |source| DaemonError::Own { path: path.clone(), source };
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(own(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(own)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(own)?;
    let mut servers = JoinSet::new();
    let router = server::private(shared.clone());
    servers.spawn(async move { drop(axum::serve(listener, router).await) });
    if let Some(address) = config.metrics {
        let listener =
            TcpListener::bind(address).await.map_err(|source| DaemonError::Metrics { address, source })?;
        let router = server::public(shared.clone());
        servers.spawn(async move { drop(axum::serve(listener, router).await) });
    }
    Ok(servers)
}

struct Daemon {
    directory: PathBuf,
    meminfo: PathBuf,
    tick: Duration,
    began: Instant,
    budget: Budget,
    host: HostMemory,
    policy: Policy,
    slots: BTreeMap<u64, Slot>,
    next_id: u64,
    requests: JoinSet<(u64, Client, Outcome)>,
    vms: Vec<Vm>,
    decisions: Vec<Decision>,
    balance: Balance,
    over: Complaint,
    blind: Complaint,
    rounds: u64,
    rounds_over_budget: u64,
    shared: Shared,
}

impl Daemon {
    fn new(config: &Config, directory: PathBuf, host: HostMemory, shared: Shared) -> Self {
        Self {
            directory,
            meminfo: config.meminfo.clone(),
            tick: config.interval,
            began: Instant::now(),
            budget: config.to_budget(),
            host,
            policy: Policy::new(Settings { tick: config.interval, ..Settings::default() }),
            slots: BTreeMap::new(),
            next_id: 0,
            requests: JoinSet::new(),
            vms: Vec::new(),
            decisions: Vec::new(),
            balance: Balance::default(),
            over: Complaint::default(),
            blind: Complaint::default(),
            rounds: 0,
            rounds_over_budget: 0,
            shared,
        }
    }

    fn introduce(&mut self) {
        let budget = self.budget.now(self.host, Bytes::ZERO);
        info!(
            "looking after the VMs in {}: budget {budget} of the host's {}, every {} ms",
            self.directory.display(),
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
    async fn balance(&mut self) {
        let mut ticks = interval(self.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rescans = interval(RESCAN);
        let mut watch = None;
        loop {
            if watch.is_none() {
                watch = Watch::new(&self.directory).ok();
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
            }
        }
    }

    /// Finds out who came and who went; with `revive`, tries those again that had ended.
    fn rescan(&mut self, revive: bool) {
        let found = match roster::scan(&self.directory) {
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
            stays
        });
        for found in found {
            match self.slots.values_mut().find(|slot| slot.name == found.name) {
                Some(slot) => slot.gone &= !revive,
                None => {
                    let id = self.next_id;
                    self.next_id += 1;
                    let timeout = ballast::DEFAULT_TIMEOUT;
                    let slot = Slot::new(id, found.name, found.socket, found.incarnation, timeout);
                    debug!(vm = slot.name, "found a socket");
                    self.slots.insert(id, slot);
                }
            }
        }
    }

    /// Asks, decides, tells. No VM can make it longer than the tick.
    async fn round(&mut self) {
        self.ask();
        self.gather(self.tick / 2).await;
        self.read_host();
        self.decide();
        self.tell();
        self.gather(self.tick / 4).await;
        self.rounds += 1;
        self.publish();
    }

    fn ask(&mut self) {
        for (&id, slot) in &mut self.slots {
            if slot.gone {
                continue;
            }
            // Without a client its last request is still under way.
            let Some(mut client) = slot.client.take() else { continue };
            let introduce = slot.introduce;
            self.requests.spawn(async move {
                let outcome = slot::poll(&mut client, introduce).await;
                (id, client, outcome)
            });
        }
    }

    /// Takes in answers until all are there or `patience` is over.
    async fn gather(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while let Ok(Some(done)) = timeout_at(deadline, self.requests.join_next()).await {
            // A panic in a request is a bug, and costs that VM its client.
            let Ok((id, client, outcome)) = done else { continue };
            let now = self.now();
            if let Some(slot) = self.slots.get_mut(&id) {
                slot.client = Some(client);
                slot.take(now, outcome);
            }
        }
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
        let host = Host { budget: self.budget.now(self.host, resident) };
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
            let Some(mut client) = slot.client.take() else { continue };
            if let Some(vm) = &mut slot.vm {
                // Until it is known to be done, the larger of both is what it may hold.
                vm.said.target = reason.old.max(reason.new);
            }
            self.requests.spawn(async move {
                let result = client.set_target(reason.new).await;
                (vm, client, Outcome::Told(reason, result))
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
        self.shared.set(State { rounds: self.rounds, host, vms });
    }
}

/// A change in the watched directory; never, where nothing is watched.
async fn changed(watch: &mut Option<Watch>) -> io::Result<()> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}
