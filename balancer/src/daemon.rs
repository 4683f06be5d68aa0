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
mod last_resort;
mod listen;
mod log_limiter;
mod managed_vm;
mod metrics;
mod notify;
mod reload;
mod reservation;
mod response_times;
mod rounds;
mod server;
mod shared;
pub mod signals;
mod state;
mod subscriptions;
mod timings;

use std::fs::{self, File, Permissions};
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use api::client::raise_descriptor_limit;
use api::runtime::{self, RuntimeError};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::info;

pub use self::config::{
    Config, ConfigError, DEFAULT_FILE, ForeignVms, LONGEST_INTERVAL, LastResort, Mistake, SHORTEST_INTERVAL,
    Sockets,
};
pub use self::history::{DecisionView, Decisions, Fate, StandingView, Why};
pub use self::reservation::{Process, ReservationRequest, ReservationView};
pub use self::state::{HostView, MemoryView, State, VmView};

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
/// See [`DaemonError`]; all of them before the first round.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), DaemonError> {
    start(config, None, shutdown).await
}

/// As [`run`]; `reread` reads the settings anew at each SIGHUP. Settings that can't be taken over are logged
/// and change nothing.
///
/// # Errors
/// See [`DaemonError`]; all of them before the first round.
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
    let directory = prepare(&config)?;
    let lock = lock(&directory)?;
    let host = HostReader::new(&config.sources).memory()?;
    config.validate_for(host.total)?;
    let shared = Shared::default();
    let (commands, asked) = mpsc::channel(COMMANDS);
    let mut servers = serve(&config, &directory, &Api { shared: shared.clone(), commands }).await?;
    let mut daemon = Daemon::new(config, directory, host, shared, asked, reread);
    daemon.log_settings();

    tokio::pin!(shutdown);
    tokio::select! {
        () = &mut shutdown => {}
        () = daemon.balance() => {}
    }
    daemon.say_stopping();
    daemon.log_who_stays_paused();
    servers.abort_all();
    let _ = fs::remove_file(socket_in(daemon.directory()));
    drop(lock);
    info!("stopped; every VM keeps the memory it has");
    Ok(())
}

/// Makes the directories.
fn prepare(config: &Config) -> Result<PathBuf, DaemonError> {
    let directory = match &config.directory {
        Some(directory) => {
            runtime::create_private(directory)?;
            directory.clone()
        }
        None => runtime::create_directory()?,
    };
    let own = own_directory(&directory);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&own)
        .map_err(|source| DaemonError::Own { path: own.clone(), source })?;
    Ok(directory)
}

/// Takes a lock that the kernel drops when this process ends, however it ends.
fn lock(directory: &Path) -> Result<File, DaemonError> {
    let path = own_directory(directory).join("lock");
    let own = |source| DaemonError::Own { path: path.clone(), source };
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(own)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            let _ = Read::by_ref(&mut file).take(20).read_to_string(&mut pid);
            return Err(DaemonError::AlreadyRunning {
                directory: directory.to_owned(),
                pid: pid.trim().to_owned(),
            });
        }
        Err(error) => return Err(own(error.into())),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(own)?;
    Ok(file)
}

/// Serves the last state. This process holds the lock, so a socket that it finds belongs to a dead daemon.
async fn serve(config: &Config, directory: &Path, api: &Api) -> Result<JoinSet<()>, DaemonError> {
    let path = socket_in(directory);
    let own = |source| DaemonError::Own { path: path.clone(), source };
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(own(error)),
        _ => {}
    }
    let mut servers = JoinSet::new();
    // Before the socket, which would be left behind where this address can't be had.
    if let Some(address) = config.metrics {
        let listener =
            TcpListener::bind(address).await.map_err(|source| DaemonError::Metrics { address, source })?;
        let router = server::public(api.clone());
        servers.spawn(listen::serve(listener, router, listen::ConnectionLimits::PUBLIC));
    }
    let listener = UnixListener::bind(&path).map_err(own)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(own)?;
    let router = server::private(api.clone());
    servers.spawn(listen::serve(listener, router, listen::ConnectionLimits::PRIVATE));
    Ok(servers)
}
