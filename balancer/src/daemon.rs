//! The daemon: once a tick it asks every VM, decides, and tells those whose target changes.
//!
//! It keeps nothing that a restart could lose: targets and limits are read from the VMs each round, so that
//! after `kill -9` a new daemon carries on from there. Only the room that it has promised to VMs without a
//! socket is on file. A VM knows itself that the balancer paused it, and stays paused while no daemon runs.

mod account;
mod api_error;
pub mod client;
mod command;
mod config;
mod discovery;
mod history;
mod host_lock;
mod last_resort;
mod listen;
mod log_limiter;
mod managed_vm;
mod metrics;
mod notify;
mod own_files;
mod reload;
mod reservation;
mod response_times;
mod rounds;
mod server;
mod shared;
pub mod signals;
mod state;
mod subscriptions;
mod target_watch;
mod timings;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use api::client::raise_descriptor_limit;
use api::runtime::RuntimeError;
use api::units::Bytes;
use tokio::net::TcpListener;
use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::info;

pub use self::config::{
    Config, ConfigError, DEFAULT_FILE, ForeignVms, LONGEST_INTERVAL, LastResort, Mistake, SHORTEST_INTERVAL,
    Sockets,
};
pub use self::history::{DecisionView, Decisions, Fate, StandingView, Why};
pub use self::host_lock::HOST_LOCK;
pub use self::reservation::{Process, ReservationRequest, ReservationView};
pub use self::state::{Holder, HostView, MemoryView, State, VmView};

use self::host_lock::HostLock;
use self::own_files::{OwnFiles, RenewedListener};
use self::reload::Reread;
use self::rounds::Daemon;
use self::server::Api;
use self::shared::Shared;
use self::signals::Inherited;
use crate::host::{HostError, HostReader};

/// The daemon's directory within the runtime directory; no VM's socket has this name.
const OWN_DIRECTORY: &str = "balancer";

/// How many commands may wait for the end of a round. Further clients wait longer.
const COMMANDS: usize = 1024;

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
    /// Another daemon runs: two would undo each other's work.
    #[error("a balancer already looks after the VMs in {} (process {pid}): stop it first", .directory.display())]
    AlreadyRunning {
        /// Which VMs.
        directory: PathBuf,
        /// Which process.
        pid: String,
    },
    /// Another daemon of this host may promise the same memory.
    #[error(
        "{who}: two would promise the same memory twice; stop that one, or give each a budget of its own that the \
         others leave alone (--beside-others --budget SIZE)"
    )]
    HostTaken {
        /// Which, and for which VMs.
        who: String,
    },
    /// Daemons that share a host would give away more than there is.
    #[error(
        "the budgets of the balancers that share this host add up to {sum}, and it has {total}: name a smaller one"
    )]
    BudgetsTooLarge {
        /// All of them.
        sum: Bytes,
        /// The host's memory.
        total: Bytes,
    },
    /// No more can share a host.
    #[error("{most} balancers share this host already, which is the most: stop one that nobody needs")]
    TooManyKeepers {
        /// How many may.
        most: u8,
    },
    /// The name by which the daemons of a host know each other.
    #[error("cannot tell other balancers of this one: {source}")]
    HostLock {
        /// What the kernel said.
        source: io::Error,
    },
    /// Another daemon has taken this one's place while it ran.
    #[error(
        "another balancer (process {pid}) has taken over the VMs in {} after this one's files were removed: this \
         one ends, and every VM keeps the memory it has", .directory.display()
    )]
    Displaced {
        /// Which VMs.
        directory: PathBuf,
        /// Which process.
        pid: String,
    },
    /// Its directory has gone and can't be made anew.
    #[error(
        "{} was removed while this balancer ran, and can't be made anew ({why}): this one ends, as nobody could \
         reach it; start it again once the directory can be made", .directory.display()
    )]
    Homeless {
        /// The directory.
        directory: PathBuf,
        /// Why not.
        why: String,
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

fn own_directory(directory: &Path) -> PathBuf {
    directory.join(OWN_DIRECTORY)
}

/// The socket of the daemon for the VMs in `directory`; `resources/balancer-openapi.yaml` describes what it
/// answers.
pub fn socket_in(directory: &Path) -> PathBuf {
    own_directory(directory).join("balancer.sock")
}

/// Balances the VMs of one directory until `shutdown` ends. VMs keep what they have then.
///
/// Needs a tokio runtime with I/O and time; one thread is enough.
///
/// # Errors
/// See [`DaemonError`]; but for [`DaemonError::Displaced`] and [`DaemonError::Homeless`] all of them before the
/// first round.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), DaemonError> {
    start(config, None, shutdown).await
}

/// As [`run`]; `reread` reads the settings anew at each SIGHUP. Settings that can't be taken over are logged
/// and change nothing.
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    config: Config,
    reread: impl FnMut() -> Result<Config, ConfigError> + Send + 'static,
    shutdown: impl Future<Output = ()>,
) -> Result<(), DaemonError> {
    start(config, Some(Box::new(reread)), shutdown).await
}

async fn start(
    config: Config,
    reread: Option<Reread>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), DaemonError> {
    config.validate()?;
    // Whoever finds its socket may send one, which must not end it, though the rounds take them up later.
    let _hangup = reread.is_some().then(|| Inherited::take(SignalKind::hangup()));
    raise_descriptor_limit();
    let host = HostReader::new(&config.sources).memory()?;
    config.validate_for(host.total)?;
    let (own_files, listener) = OwnFiles::make(config.directory.as_deref())?;
    let host_lock = match &config.host_lock {
        Some(name) => {
            let budget = config.budget.filter(|_| config.beside_others);
            HostLock::take(name, own_files.directory(), budget, host.total).await
        }
        None => Ok(None),
    };
    let host_lock = match host_lock {
        Ok(host_lock) => host_lock,
        Err(error) => {
            own_files.leave();
            return Err(error);
        }
    };
    let shared = Shared::default();
    let (commands, asked) = mpsc::channel(COMMANDS);
    let servers = serve(&config, listener, &Api { shared: shared.clone(), commands }).await;
    let mut servers = match servers {
        Ok(servers) => servers,
        Err(error) => {
            own_files.leave();
            return Err(error);
        }
    };
    if let Some(host_lock) = host_lock {
        servers.spawn(host_lock.tell());
    }
    let mut daemon = Daemon::new(config, own_files, host, shared, asked, reread);
    daemon.log_settings();

    tokio::pin!(shutdown);
    let ended = tokio::select! {
        () = &mut shutdown => Ok(()),
        error = daemon.balance() => Err(error),
    };
    daemon.say_stopping();
    daemon.log_who_stays_paused();
    servers.abort_all();
    daemon.leave();
    if ended.is_ok() {
        info!("stopped; every VM keeps the memory it has");
    }
    ended
}

/// Serves the last state.
async fn serve(config: &Config, listener: RenewedListener, api: &Api) -> Result<JoinSet<()>, DaemonError> {
    let mut servers = JoinSet::new();
    if let Some(address) = config.metrics {
        let listener =
            TcpListener::bind(address).await.map_err(|source| DaemonError::Metrics { address, source })?;
        let router = server::public(api.clone());
        servers.spawn(listen::serve(listener, router, listen::ConnectionLimits::PUBLIC));
    }
    let router = server::private(api.clone());
    servers.spawn(listen::serve(listener, router, listen::ConnectionLimits::PRIVATE));
    Ok(servers)
}
