//! The daemon's own directory, lock and socket, which are to stay its own while it runs.
//!
//! Somebody may remove or replace any of them under it: a clean-up of the runtime directory, an `rm` by hand. So
//! it compares device and inode of each with its own from time to time. What has gone it makes anew. If another
//! daemon has taken its place, or there is no place any more, it ends: nobody could reach it, and nothing would
//! keep another from starting.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use api::runtime;
use axum::serve::Listener;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tracing::warn;

use super::discovery::FileId;
use super::{DaemonError, own_directory, socket_in};

/// What came of a look at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// They are as they were.
    Same,
    /// Something had gone, and is there again.
    MadeAnew,
}

/// The files, and the way to whoever listens at the socket.
#[derive(Debug)]
pub struct OwnFiles {
    directory: PathBuf,
    directory_id: FileId,
    own_id: FileId,
    lock: File,
    lock_id: FileId,
    socket_id: FileId,
    listeners: mpsc::UnboundedSender<UnixListener>,
}

impl OwnFiles {
    /// Makes them for the VMs in `directory`, or in the user's own.
    ///
    /// # Errors
    /// The directory can't be made or is not this user's alone, or another daemon has it.
    pub fn make(directory: Option<&Path>) -> Result<(Self, RenewedListener), DaemonError> {
        let directory = match directory {
            Some(directory) => directory.to_owned(),
            None => runtime::directory()?,
        };
        make_directories(&directory)?;
        let (lock, lock_id) = lock(&directory)?;
        let (current, socket_id) = bind(&directory)?;
        let (listeners, renewed) = mpsc::unbounded_channel();
        let (directory_id, own_id) = directory_ids(&directory)?;
        let own = Self { directory, directory_id, own_id, lock, lock_id, socket_id, listeners };
        Ok((own, RenewedListener { current, renewed }))
    }

    /// Where the VMs' sockets are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Looks whether they are still there, and makes anew what is not.
    ///
    /// # Errors
    /// [`DaemonError::Displaced`] where another daemon has taken its place, [`DaemonError::Homeless`] where
    /// what has gone can't be made anew.
    pub fn look(&mut self) -> Result<Look, DaemonError> {
        let own = own_directory(&self.directory);
        let same_directories = fs::metadata(&self.directory)
            .is_ok_and(|now| FileId::of(&now) == self.directory_id)
            && FileId::at(&own) == Some(self.own_id);
        let same_lock = same_directories && FileId::at(&own.join("lock")) == Some(self.lock_id);
        let same_socket = same_lock && FileId::at(&socket_in(&self.directory)) == Some(self.socket_id);
        if same_socket {
            return Ok(Look::Same);
        }
        let gone = match (same_directories, same_lock) {
            (false, _) => self.directory.clone(),
            (true, false) => own.join("lock"),
            (true, true) => socket_in(&self.directory),
        };
        warn!("{} was removed or replaced while this balancer ran: it is made anew", gone.display());
        self.make_anew(same_lock).map_err(|error| match error {
            DaemonError::AlreadyRunning { directory, pid } => DaemonError::Displaced { directory, pid },
            error => DaemonError::Homeless { directory: self.directory.clone(), why: error.to_string() },
        })?;
        Ok(Look::MadeAnew)
    }

    fn make_anew(&mut self, is_locked: bool) -> Result<(), DaemonError> {
        if !is_locked {
            make_directories(&self.directory)?;
            (self.lock, self.lock_id) = lock(&self.directory)?;
            (self.directory_id, self.own_id) = directory_ids(&self.directory)?;
        }
        if FileId::at(&socket_in(&self.directory)) != Some(self.socket_id) {
            let (listener, socket_id) = bind(&self.directory)?;
            self.socket_id = socket_id;
            // Whoever serves it ends only with this daemon.
            let _ = self.listeners.send(listener);
        }
        Ok(())
    }

    /// Removes the socket, if it is still the daemon's own.
    pub fn leave(self) {
        let path = socket_in(&self.directory);
        if FileId::at(&path) == Some(self.socket_id) {
            let _ = fs::remove_file(path);
        }
        drop(self.lock);
    }
}

/// The socket's listener, and those that take its place.
#[derive(Debug)]
pub struct RenewedListener {
    current: UnixListener,
    renewed: mpsc::UnboundedReceiver<UnixListener>,
}

impl Listener for RenewedListener {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            tokio::select! {
                accepted = Listener::accept(&mut self.current) => return accepted,
                Some(next) = self.renewed.recv() => self.current = next,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.current.local_addr()
    }
}

/// Makes the directories.
fn make_directories(directory: &Path) -> Result<(), DaemonError> {
    runtime::create_private(directory)?;
    let own = own_directory(directory);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&own)
        .map_err(|source| DaemonError::Own { path: own.clone(), source })
}

fn directory_ids(directory: &Path) -> Result<(FileId, FileId), DaemonError> {
    let id = |path: &Path| {
        let metadata = fs::metadata(path);
        metadata
            .map(|metadata| FileId::of(&metadata))
            .map_err(|source| DaemonError::Own { path: path.to_owned(), source })
    };
    Ok((id(directory)?, id(&own_directory(directory))?))
}

/// Takes a lock that the kernel drops when this process ends, however it ends.
fn lock(directory: &Path) -> Result<(File, FileId), DaemonError> {
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
    let id = FileId::of(&file.metadata().map_err(own)?);
    Ok((file, id))
}

/// Listens for clients. This process holds the lock, so a socket that it finds belongs to nobody who lives.
fn bind(directory: &Path) -> Result<(UnixListener, FileId), DaemonError> {
    let path = socket_in(directory);
    let own = |source| DaemonError::Own { path: path.clone(), source };
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(own(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(own)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(own)?;
    let id = FileId::at(&path).ok_or_else(|| own(io::ErrorKind::NotFound.into()))?;
    Ok((listener, id))
}
