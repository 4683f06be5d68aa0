//! The socket that a VM is spoken to through: made private, never stolen, made again where somebody removes it,
//! taken away at the end.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use event_manager::EventSet;
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::sandbox;

/// Clients that wait for the server to take them on.
pub(crate) const BACKLOG: i32 = 16;

/// Why a VM can't be spoken to at a path.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another VM listens there.
    #[error("a VM already listens at {}: choose another --name, or stop that VM first", .0.display())]
    InUse(PathBuf),
    /// A file that nobody made for this.
    #[error("{} is there and is not a socket: move it away, or choose another --name", .0.display())]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("cannot listen at {}: {source}", .path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How often to look whether a socket's file is still there. The kernel would tell, but an inotify instance for
/// each VM is more than a user has of them.
pub const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What to watch a listener for whose clients are taken by [`Listening::next_client`] until none waits.
pub const CLIENT_COMES: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

/// Why a socket that was removed is not there again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RenewError {
    /// Somebody has put another file there.
    Taken,
    /// The kernel refuses.
    Refused(Errno),
}

/// A socket at which this VM listens, for as long as it lives.
#[derive(Debug)]
pub struct Listening {
    // Dropped before the listener, whose life keeps the file's inode from being given to another.
    file: SocketFile,
    listener: UnixListener,
    /// Why the file is not there, which is said once.
    trouble: Option<RenewError>,
}

impl Listening {
    /// Listens at `path`, for this user alone. A socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn at(path: &Path) -> Result<Self, BindError> {
        let (listener, file) = listen(path)?;
        Ok(Self { file, listener, trouble: None })
    }

    /// Where clients come.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The next client that waits, if one does.
    ///
    /// # Errors
    /// The host has no descriptor or no memory for it. It waits on, and a watch that is level-triggered would call
    /// again at once: watch the listener with [`CLIENT_COMES`], and ask again some time later.
    pub fn next_client(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    // It left before it was let in.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// Looks whether its file is still there, and makes it again if somebody has removed it. Works within the
    /// sandbox. Returns the listener from before where there is another one now.
    pub fn look(&mut self) -> Option<UnixListener> {
        let found = self.file.renew();
        let trouble = found.as_ref().err().copied();
        let path = self.file.path.to_string_lossy();
        match trouble {
            Some(trouble) if self.trouble == Some(trouble) => {}
            Some(RenewError::Taken) => tracing::warn!(
                "the socket of this VM was removed, and another file has its place: nobody can connect to {path} until \
                 that file has gone"
            ),
            Some(RenewError::Refused(errno)) => tracing::warn!(
                "the socket of this VM was removed, and can't be made again yet ({errno}): nobody can connect to {path} \
                 until its directory is there again, as a balancer or the next `ballast run` makes it"
            ),
            None => {}
        }
        self.trouble = trouble;
        let listener = found.ok()??;
        tracing::warn!("somebody removed the socket of this VM: {path} is there again");
        Some(std::mem::replace(&mut self.listener, listener))
    }
}

/// A socket's file, removed when its owner goes. To be dropped before the listener:
/// while that lives, no other file can have the same identity.
#[derive(Debug)]
struct SocketFile {
    path: CString,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let path = sandbox::kept(&self.path);
        // By now somebody may have put another socket there; that one must stay.
        if identity(path).is_ok_and(|now| now == self.identity) {
            let _ = rustix::fs::unlinkat(CWD, path, AtFlags::empty());
        }
    }
}

impl SocketFile {
    /// Listens again where the file has gone, for this user alone; `None` where it is still there.
    ///
    /// Works within the sandbox.
    ///
    /// # Errors
    /// [`RenewError`].
    fn renew(&mut self) -> Result<Option<UnixListener>, RenewError> {
        match identity(sandbox::kept(&self.path)) {
            Ok(now) if now == self.identity => return Ok(None),
            Ok(_) => return Err(RenewError::Taken),
            // Its directory may be gone as well: then to bind fails.
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => return Err(RenewError::Refused(errno)),
        }
        self.listen_again().map(Some).map_err(|errno| match errno {
            Errno::ADDRINUSE => RenewError::Taken,
            errno => RenewError::Refused(errno),
        })
    }

    fn listen_again(&mut self) -> Result<UnixListener, Errno> {
        let socket = private_socket()?;
        sandbox::bind(&socket, &self.path)?;
        rustix::net::listen(&socket, BACKLOG)?;
        self.identity = identity(sandbox::kept(&self.path))?;
        Ok(UnixListener::from(socket))
    }

    /// The socket that was just bound at `path`.
    fn of(path: &Path) -> io::Result<Self> {
        let path = sandbox::absolute(path)?;
        Ok(Self { identity: identity(&path)?, path })
    }
}

/// Tells a file from another one of its name.
fn identity(path: &CStr) -> Result<(u64, u64), Errno> {
    let found = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((found.st_dev, found.st_ino))
}

fn listen(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let io = |source| BindError::Io { path: path.to_owned(), source };
    let errno = |errno: Errno| io(errno.into());
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // While one process looks whether the socket is dead and replaces it, no other may do the same.
    let lock =
        rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(errno)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(errno)?;

    let address = SocketAddrUnix::new(path).map_err(errno)?;
    make_way(path, &address)?;
    let socket = bind_privately(&address).map_err(errno)?;
    let file = SocketFile::of(path).map_err(io)?;
    rustix::net::listen(&socket, BACKLOG).map_err(errno)?;
    Ok((UnixListener::from(socket), file))
}

/// Removes what a dead VM left at `path`.
fn make_way(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let io = |source| BindError::Io { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    let probe = stream_socket().map_err(|errno| io(errno.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(io),
        // A full backlog is a living server too.
        Ok(()) | Err(Errno::AGAIN) => Err(BindError::InUse(path.to_owned())),
        Err(errno) => Err(io(errno.into())),
    }
}

/// A socket bound at `address` to which only this user can connect, whatever the umask.
///
/// # Errors
/// The place is taken, or the kernel refuses.
fn bind_privately(address: &SocketAddrUnix) -> Result<OwnedFd, Errno> {
    let socket = private_socket()?;
    rustix::net::bind(&socket, address)?;
    Ok(socket)
}

/// A socket whose file will be private: it gets the mode that the socket has when it is bound.
fn private_socket() -> Result<OwnedFd, Errno> {
    let socket = stream_socket()?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    Ok(socket)
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_is_private_and_goes_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let (listener, file) = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(file);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_living_socket_is_not_stolen_and_a_dead_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let (listener, file) = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(BindError::InUse(_))));
        drop(listener);
        let (_second, second_file) = listen(&path).unwrap();
        drop(second_file);
        assert!(!path.exists());
        drop(file);
    }

    #[test]
    fn a_socket_that_took_ones_place_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let (_listener, file) = listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = listen(&path).unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn a_socket_that_was_removed_is_made_again_and_none_is_taken_from_others() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("run");
        fs::create_dir(&directory).unwrap();
        let path = directory.join("vm.sock");
        let (first, mut file) = listen(&path).unwrap();
        assert!(file.renew().unwrap().is_none());
        fs::remove_file(&path).unwrap();
        let second = file.renew().unwrap().expect("it is there again");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert!(file.renew().unwrap().is_none());

        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(file.renew().unwrap_err(), RenewError::Refused(Errno::NOENT));
        fs::create_dir(&directory).unwrap();
        let other = listen(&path).unwrap();
        assert_eq!(file.renew().unwrap_err(), RenewError::Taken);
        drop(other.1);
        let third = file.renew().unwrap().expect("it is there again");
        drop(file);
        drop((first, second, third));
        assert!(!path.exists());
    }

    #[test]
    fn other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let missing = directory.path().join("missing/vm.sock");
        assert!(listen(&missing).unwrap_err().to_string().contains("missing/vm.sock"));
    }
}
