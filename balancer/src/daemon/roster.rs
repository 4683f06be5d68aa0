//! Which VMs there are: the sockets in the runtime directory, and word of their coming and going.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use balloon::runtime;
use inotify::{Inotify, WatchMask};
use tokio::io::unix::AsyncFd;

use crate::driver::{Driver, ballast};

/// Tells a socket from another one that took its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incarnation {
    inode: u64,
    changed: (i64, i64),
}

/// A socket that may be a VM's.
#[derive(Clone, Debug)]
pub struct Found {
    /// The VM's name.
    pub name: String,
    /// Its socket.
    pub socket: PathBuf,
    /// Which one of that name.
    pub incarnation: Incarnation,
}

impl Found {
    /// The way to it.
    pub fn driver(&self) -> Box<dyn Driver> {
        Box::new(ballast::Client::new(&self.socket))
    }
}

/// Every socket in `directory` that is named as a VM's.
///
/// # Errors
/// Where the directory can't be read.
pub fn scan(directory: &Path) -> Result<Vec<Found>, runtime::RuntimeError> {
    let mut found = Vec::new();
    for (name, socket) in runtime::sockets(directory)? {
        // It may have gone since.
        let Ok(metadata) = fs::symlink_metadata(&socket) else { continue };
        if metadata.file_type().is_socket() {
            let incarnation =
                Incarnation { inode: metadata.ino(), changed: (metadata.ctime(), metadata.ctime_nsec()) };
            found.push(Found { name, socket, incarnation });
        }
    }
    Ok(found)
}

/// Word of changes in the directory.
pub struct Watch {
    inotify: AsyncFd<Inotify>,
}

impl Watch {
    /// Watches `directory`.
    ///
    /// # Errors
    /// Where it does not exist, or the user has no inotify watches left.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let changes = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE | WatchMask::DELETE_SELF;
        inotify.watches().add(directory, changes)?;
        // SAFETY: `Inotify` owns its descriptor until it is dropped, and nothing here replaces it.
        let inotify = unsafe { AsyncFd::register(inotify) }?;
        Ok(Self { inotify })
    }

    /// Waits for a change. What changed is left to [`scan`].
    ///
    /// # Errors
    /// Where the watch is lost; make a new one.
    pub async fn changed(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let mut ready = self.inotify.readable_mut().await?;
            match ready.try_io(|inotify| inotify.get_mut().read_events(&mut buffer).map(drop)) {
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }
}
