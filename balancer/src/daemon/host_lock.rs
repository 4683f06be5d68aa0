//! One keeper of a host's memory: whoever balances it is known to all that want to, whatever their directories
//! and users.
//!
//! Two daemons of one host that both give away all of it promise the same memory twice. So each holds a name
//! that all of them know: an abstract Unix socket (unix(7)). It needs no directory that all users could write
//! to, it goes with its process however that ends, and every container that shares the host's network sees it.
//! A container with a network of its own has names of its own: it is not seen, and its memory limit is what
//! keeps it apart.
//!
//! There are some such names, for daemons that share a host on purpose: each has an explicit budget, and all
//! budgets together fit the host. Whoever connects is told the holder's directory and budget; the kernel tells
//! which process it is.

use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::units::Bytes;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::DaemonError;

/// The name that the daemons of one host hold; others only in tests.
pub const HOST_LOCK: &str = "ballast-balancer";

/// How many daemons may share a host.
const PLACES: u8 = 64;

/// How long a holder may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often one that is about to start is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The longest that a holder may say.
const LONGEST: u64 = 8 << 10;

/// What a holder says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keeper {
    /// Whose VMs it looks after.
    directory: PathBuf,
    /// What they may hold, if it shares the host with others.
    budget: Option<Bytes>,
}

/// One that holds a name.
#[derive(Debug)]
struct Holder {
    pid: Option<u32>,
    /// `None` if nobody could be connected to.
    user: Option<u32>,
    /// `None` if it did not say who it is.
    keeper: Option<Keeper>,
}

/// A name that is held; whoever serves it tells others so.
#[derive(Debug)]
pub struct HostLock {
    listener: UnixListener,
    line: Vec<u8>,
}

impl HostLock {
    /// Takes a name for the daemon of `directory`. With `budget` it shares the host, which has `total` memory,
    /// with others that do.
    ///
    /// # Errors
    /// [`DaemonError::HostTaken`] and [`DaemonError::BudgetsTooLarge`].
    pub async fn take(
        name: &str,
        directory: &Path,
        budget: Option<Bytes>,
        total: Bytes,
    ) -> Result<Option<Self>, DaemonError> {
        let keeper = Keeper { directory: directory.to_owned(), budget };
        let (place, socket) = match claim(name) {
            Ok(Some(claimed)) => claimed,
            Ok(None) => return Err(DaemonError::TooManyKeepers { most: PLACES }),
            Err(error) => {
                warn!("whether another balancer shares this host is not known: {error}");
                return Ok(None);
            }
        };
        let mut sum = budget.unwrap_or_default();
        for other in (0..PLACES).filter(|other| *other != place) {
            let Some(holder) = ask(name, other, other < place).await else { continue };
            match (budget, holder.keeper.as_ref().and_then(|keeper| keeper.budget)) {
                (Some(_), Some(theirs)) => sum = sum.saturating_add(theirs),
                // An ordinary user must not be able to keep root's daemon from its work.
                _ if rustix::process::geteuid().is_root() && holder.user != Some(0) => {
                    warn!("{}; it is no user's place to keep root's from starting", holder.describe());
                }
                _ => return Err(DaemonError::HostTaken { who: holder.describe() }),
            }
        }
        if sum > total {
            return Err(DaemonError::BudgetsTooLarge { sum, total });
        }
        Self::serve(socket, &keeper).map(Some).map_err(|source| DaemonError::HostLock { source })
    }

    fn serve(socket: OwnedFd, keeper: &Keeper) -> io::Result<Self> {
        rustix::net::listen(&socket, 16)?;
        let listener = UnixListener::from_std(socket.into())?;
        Ok(Self { listener, line: serde_json::to_vec(keeper)? })
    }

    /// Tells whoever asks, for ever.
    pub async fn tell(self) {
        loop {
            let Ok((stream, _)) = self.listener.accept().await else {
                sleep(PATIENCE).await;
                continue;
            };
            // It fits into an empty buffer: nobody is waited for.
            if let Ok(mut stream) = stream.into_std() {
                let _ = stream.write_all(&self.line);
            }
        }
    }
}

impl Holder {
    fn describe(&self) -> String {
        let process = match (self.pid, self.user) {
            (Some(pid), Some(user)) => format!("process {pid} of user {user}"),
            (None, Some(user)) => format!("a process of user {user} in another PID namespace"),
            (_, None) => "a process that lets nobody connect".to_owned(),
        };
        match &self.keeper {
            Some(Keeper { directory, budget: None }) => {
                format!(
                    "{process} balances this host's memory already, for the VMs in {}",
                    directory.display()
                )
            }
            Some(Keeper { directory, budget: Some(budget) }) => format!(
                "{process} balances {budget} of this host's memory already, for the VMs in {}",
                directory.display()
            ),
            None => format!("{process} holds the name of this host's balancer, and does not say who it is"),
        }
    }
}

/// An abstract address of a name's `place`.
fn address(name: &str, place: u8) -> Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new_abstract_name(format!("{name}/{place}").as_bytes())
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// The first place that is free, taken; `None` where all are taken.
fn claim(name: &str) -> io::Result<Option<(u8, OwnedFd)>> {
    let socket = socket()?;
    for place in 0..PLACES {
        match rustix::net::bind(&socket, &address(name, place)?) {
            Ok(()) => return Ok(Some((place, socket))),
            Err(Errno::ADDRINUSE) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(None)
}

/// Who holds a place, if somebody does. One that came `before` may be about to start: it is waited for. One that
/// comes after waits for this one.
async fn ask(name: &str, place: u8, before: bool) -> Option<Holder> {
    let mut holder = Holder { pid: None, user: None, keeper: None };
    let asked = timeout(PATIENCE, async {
        loop {
            let mut stream = connect(name, place, before).await?;
            let by = stream.peer_cred().ok()?;
            holder.pid = by.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
            holder.user = Some(by.uid());
            let mut line = Vec::new();
            let read = (&mut stream).take(LONGEST).read_to_end(&mut line).await;
            if read.is_ok() && !line.is_empty() {
                return Some(serde_json::from_slice(&line).ok());
            }
            // It has ended since, and its place is free; or it is about to say so again.
            sleep(LOOK_AGAIN).await;
        }
    });
    match asked.await {
        Ok(None) => None,
        Ok(Some(keeper)) => Some(Holder { keeper, ..holder }),
        Err(_) => Some(holder),
    }
}

/// A connection to whoever holds a place, if somebody does.
async fn connect(name: &str, place: u8, before: bool) -> Option<UnixStream> {
    let address = address(name, place).ok()?;
    loop {
        let socket = socket().ok()?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return UnixStream::from_std(StdStream::from(socket)).ok(),
            // Somebody is there, and many ask.
            Err(Errno::AGAIN) => {}
            Err(_) if !before || rustix::net::bind(&socket, &address).is_ok() => return None,
            Err(_) => {}
        }
        sleep(LOOK_AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;

    const TOTAL: Bytes = Bytes::gib(8);

    /// A host of its own.
    struct Host {
        name: String,
        keepers: JoinSet<()>,
    }

    impl Host {
        fn new(test: &str) -> Self {
            Self { name: format!("ballast-test-{}-{test}", std::process::id()), keepers: JoinSet::new() }
        }

        async fn start(&mut self, directory: &str, budget: Option<Bytes>) -> Result<(), DaemonError> {
            let taken = HostLock::take(&self.name, Path::new(directory), budget, TOTAL).await?;
            self.keepers.spawn(taken.expect("names can be held").tell());
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_second_daemon_is_told_of_the_first() {
        let mut host = Host::new("second");
        host.start("/run/ballast", None).await.unwrap();
        for budget in [None, Some(Bytes::gib(1))] {
            let error = host.start("/run/user/1000/ballast", budget).await.unwrap_err().to_string();
            for word in [&format!("process {}", std::process::id()), "/run/ballast", "--beside-others"] {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
        host.keepers.shutdown().await;
        host.start("/run/user/1000/ballast", None).await.expect("the first has gone");
    }

    #[tokio::test]
    async fn daemons_with_budgets_that_fit_share_a_host() {
        let mut host = Host::new("share");
        host.start("/a", Some(Bytes::gib(3))).await.unwrap();
        host.start("/b", Some(Bytes::gib(4))).await.unwrap();
        let error = host.start("/c", Some(Bytes::gib(2))).await.unwrap_err().to_string();
        assert!(error.contains("9 GiB") && error.contains("8 GiB"), "{error}");
        host.start("/c", Some(Bytes::gib(1))).await.unwrap();
        let error = host.start("/d", None).await.unwrap_err().to_string();
        assert!(error.contains("/a") && error.contains("3 GiB"), "{error}");
    }

    #[tokio::test]
    async fn of_two_that_start_at_once_one_runs() {
        for round in 0..20 {
            let name = format!("ballast-test-{}-race-{round}", std::process::id());
            let start = async |directory| {
                let taken = HostLock::take(&name, Path::new(directory), None, TOTAL).await;
                let Ok(Some(lock)) = taken else { return false };
                // As a daemon that goes on.
                tokio::spawn(lock.tell());
                true
            };
            let (first, second) = tokio::join!(start("/a"), start("/b"));
            assert!(first != second, "{first} and {second}");
        }
    }

    #[tokio::test]
    async fn one_that_ends_while_it_is_asked_holds_nothing() {
        let mut host = Host::new("ends");
        let (_, socket) = claim(&host.name).unwrap().unwrap();
        rustix::net::listen(&socket, 1).unwrap();
        let listener = UnixListener::from_std(socket.into()).unwrap();
        let ends = async move {
            let (asking, _) = listener.accept().await.unwrap();
            drop((asking, listener));
        };
        let (started, ()) = tokio::join!(host.start("/a", None), ends);
        started.expect("the other one has ended");
    }

    #[tokio::test]
    async fn one_that_says_nothing_is_named_by_its_process() {
        let mut host = Host::new("mute");
        let (_, socket) = claim(&host.name).unwrap().unwrap();
        rustix::net::listen(&socket, 1).unwrap();
        let error = host.start("/a", None).await.unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains("does not say who it is"), "{error}");
    }
}
