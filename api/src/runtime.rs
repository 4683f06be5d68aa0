//! Where the VMs of one host are found: a directory with one socket for each.
//!
//! `ballast run` puts a VM's API socket there, and everybody who looks for VMs
//! (the command line, the balancer) looks there and nowhere else.

use std::collections::HashSet;
use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The variable that names another directory than the usual one, for those
/// who keep several groups of VMs apart on one host.
pub const DIRECTORY_VARIABLE: &str = "BALLAST_RUNTIME_DIR";

/// The longest name of a VM, in characters.
pub const LONGEST_NAME: usize = 63;

/// The longest path that a Unix socket's address takes, less the final NUL (unix(7)).
const LONGEST_SOCKET_PATH: usize = 107;

/// The longest runtime directory, in bytes: the balancer's socket in it is `/balancer/balancer.sock`.
const LONGEST_DIRECTORY: usize = LONGEST_SOCKET_PATH - "/balancer/balancer.sock".len();

const EXTENSION: &str = "sock";

/// Why there is no directory or no socket for a VM.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Neither root, nor a login session's directory.
    #[error(
        "there is no runtime directory for user {uid}: log in with a session that sets XDG_RUNTIME_DIR, \
         or set {DIRECTORY_VARIABLE} to a directory of your own"
    )]
    NoDirectory {
        /// Who asked.
        uid: u32,
    },
    /// A relative path would mean another directory for each reader.
    #[error("{variable}={value} is not an absolute path")]
    Relative {
        /// Which variable.
        variable: &'static str,
        /// As set.
        value: String,
    },
    /// Somebody else could put sockets there, or take them away.
    #[error(
        "{} belongs to user {owner} with mode {mode:03o}: it must be yours alone \
         (chown it, and chmod 700), else others could pose as your VMs", .path.display()
    )]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// Something other than a directory stands there.
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// The directory can't be made or read.
    #[error("cannot use the runtime directory {}: {source}", .path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The balancer's socket would have no place in it.
    #[error(
        "the runtime directory {} is longer than the {LONGEST_DIRECTORY} bytes that leave room for sockets: \
         choose a shorter one ({DIRECTORY_VARIABLE})", .0.display()
    )]
    DirectoryTooLong(PathBuf),
    /// Not a name that a VM may have.
    #[error("`{0}` is not a VM's name: use 1 to {LONGEST_NAME} of a-z, 0-9 and -, not beginning with -")]
    Name(String),
    /// The kernel takes no address that long.
    #[error(
        "{} is longer than the {LONGEST_SOCKET_PATH} bytes of a socket's address: \
         choose a shorter name or directory", .0.display()
    )]
    PathTooLong(PathBuf),
}

/// The directory that holds the sockets of this user's VMs; it may not exist yet.
///
/// `$BALLAST_RUNTIME_DIR` where that is set; else `/run/ballast` for root, and
/// `$XDG_RUNTIME_DIR/ballast` or `/run/user/UID/ballast` for everybody else.
///
/// # Errors
/// [`RuntimeError::NoDirectory`], [`RuntimeError::Relative`] or [`RuntimeError::DirectoryTooLong`].
pub fn directory() -> Result<PathBuf, RuntimeError> {
    let path = directory_of(
        rustix::process::geteuid().as_raw(),
        env::var_os(DIRECTORY_VARIABLE),
        env::var_os("XDG_RUNTIME_DIR"),
        Path::new("/run/user"),
    )?;
    check_length(&path)?;
    Ok(path)
}

fn check_length(path: &Path) -> Result<(), RuntimeError> {
    let fits = path.as_os_str().as_bytes().len() <= LONGEST_DIRECTORY;
    if fits { Ok(()) } else { Err(RuntimeError::DirectoryTooLong(path.to_owned())) }
}

fn directory_of(
    uid: u32,
    ours: Option<OsString>,
    session: Option<OsString>,
    sessions: &Path,
) -> Result<PathBuf, RuntimeError> {
    if let Some(path) = absolute(DIRECTORY_VARIABLE, ours)? {
        return Ok(path);
    }
    // Root keeps to one place, whatever a session that became root by `su` still says.
    if uid == 0 {
        return Ok(PathBuf::from("/run/ballast"));
    }
    if let Some(path) = absolute("XDG_RUNTIME_DIR", session)? {
        return Ok(path.join("ballast"));
    }
    let session = sessions.join(uid.to_string());
    if session.is_dir() { Ok(session.join("ballast")) } else { Err(RuntimeError::NoDirectory { uid }) }
}

fn absolute(variable: &'static str, value: Option<OsString>) -> Result<Option<PathBuf>, RuntimeError> {
    let Some(path) = value.filter(|value| !value.is_empty()).map(PathBuf::from) else {
        return Ok(None);
    };
    if path.is_absolute() {
        Ok(Some(path))
    } else {
        Err(RuntimeError::Relative { variable, value: path.display().to_string() })
    }
}

/// [`directory`], made with mode 0700 where it is missing, and checked to be
/// this user's alone.
///
/// # Errors
/// As [`directory`]; besides when it can't be made, or others can write in it.
pub fn create_directory() -> Result<PathBuf, RuntimeError> {
    let path = directory()?;
    create_private(&path)?;
    Ok(path)
}

/// As [`create_directory`], for a directory of one's own choice.
///
/// # Errors
/// When it is too long for sockets or can't be made, or others can write in it.
pub fn create_private(path: &Path) -> Result<(), RuntimeError> {
    check_length(path)?;
    let io = |source| RuntimeError::Io { path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io)?;
    let metadata = fs::metadata(path).map_err(io)?;
    if !metadata.is_dir() {
        return Err(RuntimeError::NotADirectory(path.to_owned()));
    }
    let mode = metadata.mode() & 0o777;
    if metadata.uid() != rustix::process::geteuid().as_raw() || mode & 0o022 != 0 {
        return Err(RuntimeError::NotPrivate { path: path.to_owned(), owner: metadata.uid(), mode });
    }
    Ok(())
}

/// Where the VM `name` is spoken to.
///
/// # Errors
/// A name that breaks the rules of [`check_name`], no [`directory`], or a path
/// that no socket can have.
pub fn socket(name: &str) -> Result<PathBuf, RuntimeError> {
    socket_in(&directory()?, name)
}

/// Where the VM `name` is spoken to, in a directory of one's own choice.
///
/// # Errors
/// A name that breaks the rules of [`check_name`], or a path that no socket can have.
pub fn socket_in(directory: &Path, name: &str) -> Result<PathBuf, RuntimeError> {
    check_name(name)?;
    let path = directory.join(name).with_extension(EXTENSION);
    if path.as_os_str().as_bytes().len() > LONGEST_SOCKET_PATH {
        return Err(RuntimeError::PathTooLong(path));
    }
    Ok(path)
}

/// The name of the VM that this socket's path belongs to, if it is one.
pub fn name_of(socket: &Path) -> Option<&str> {
    let name = socket.file_name()?.to_str()?.strip_suffix(".sock")?;
    check_name(name).is_ok().then_some(name)
}

/// The VMs that have a socket in `directory`, living or dead, sorted by name.
/// A directory that does not exist holds none. A socket with several names is
/// one VM: links to it are left out.
///
/// # Errors
/// [`RuntimeError::Io`] where the directory can't be read.
pub fn sockets(directory: &Path) -> Result<Vec<(String, PathBuf)>, RuntimeError> {
    let io = |source| RuntimeError::Io { path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(io)?.path();
        if let Some(name) = name_of(&path) {
            found.push((name.to_owned(), path));
        }
    }
    // Of several names for one socket the first counts, and a symbolic link only where it is alone.
    found.sort_by_cached_key(|(name, path)| (path.is_symlink(), name.clone()));
    let mut seen = HashSet::new();
    found.retain(|(_, path)| {
        // What is not there, or not to be seen, is told of by whoever connects.
        fs::metadata(path).map_or(true, |metadata| seen.insert((metadata.dev(), metadata.ino())))
    });
    found.sort();
    Ok(found)
}

/// Whether a VM may be called `name`: `^[a-z0-9][a-z0-9-]{0,62}$`, so that a
/// name is always one plain component of a path, and a host name too.
///
/// # Errors
/// [`RuntimeError::Name`].
pub fn check_name(name: &str) -> Result<(), RuntimeError> {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = match name.as_bytes() {
        [first, rest @ ..] => {
            plain(*first) && rest.len() < LONGEST_NAME && rest.iter().all(|&c| plain(c) || c == b'-')
        }
        [] => false,
    };
    if good { Ok(()) } else { Err(RuntimeError::Name(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn os(text: &str) -> Option<OsString> {
        Some(OsString::from(text))
    }

    #[test]
    fn root_keeps_to_one_directory_and_others_to_their_session() {
        let none = Path::new("/nonexistent");
        let root = directory_of(0, None, os("/run/user/1000"), none).unwrap();
        assert_eq!(root, Path::new("/run/ballast"));
        let user = directory_of(1000, None, os("/run/user/1000"), none).unwrap();
        assert_eq!(user, Path::new("/run/user/1000/ballast"));
        let chosen = directory_of(0, os("/srv/vms"), None, none).unwrap();
        assert_eq!(chosen, Path::new("/srv/vms"));
    }

    #[test]
    fn a_user_without_a_session_is_told_so() {
        let sessions = tempfile::tempdir().unwrap();
        let error = directory_of(1000, None, os(""), sessions.path()).unwrap_err();
        assert!(error.to_string().contains("XDG_RUNTIME_DIR"), "{error}");
        fs::create_dir(sessions.path().join("1000")).unwrap();
        let found = directory_of(1000, None, None, sessions.path()).unwrap();
        assert_eq!(found, sessions.path().join("1000/ballast"));
        assert!(directory_of(1000, os("vms"), None, sessions.path()).is_err());
    }

    #[test]
    fn a_directory_without_room_for_sockets_is_refused_with_the_limit() {
        assert!(check_length(Path::new(&format!("/{}", "d".repeat(83)))).is_ok());
        let error = check_length(Path::new(&format!("/{}", "d".repeat(84)))).unwrap_err();
        assert!(error.to_string().contains("84 bytes"), "{error}");
    }

    #[test]
    fn names_are_one_plain_component() {
        for good in ["a", "web-1", "0", &"x".repeat(63)] {
            let path = socket_in(Path::new("/run/ballast"), good).unwrap();
            assert_eq!(name_of(&path), Some(good));
        }
        for bad in ["", "-a", "A", "a/b", "..", "a.b", "ä", "a b", "a\0", &"x".repeat(64)] {
            assert!(socket_in(Path::new("/run/ballast"), bad).is_err(), "{bad}");
        }
        let long = PathBuf::from(format!("/{}", "d".repeat(100)));
        assert!(matches!(socket_in(&long, "abcdef"), Err(RuntimeError::PathTooLong(_))));
    }

    #[test]
    fn the_directory_is_private_from_birth() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("one/two");
        create_private(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        create_private(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(create_private(&path), Err(RuntimeError::NotPrivate { mode: 0o777, .. })));
    }

    #[test]
    fn only_sockets_of_vms_are_listed() {
        let temporary = tempfile::tempdir().unwrap();
        for file in ["web.sock", "db.sock", "notes.txt", "Bad.sock", ".sock"] {
            fs::write(temporary.path().join(file), "").unwrap();
        }
        let found = sockets(temporary.path()).unwrap();
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["db", "web"]);
        assert!(sockets(&temporary.path().join("missing")).unwrap().is_empty());
    }

    #[test]
    fn a_socket_with_several_names_is_listed_once() {
        let temporary = tempfile::tempdir().unwrap();
        let path = |name: &str| temporary.path().join(name);
        fs::write(path("web.sock"), "").unwrap();
        fs::hard_link(path("web.sock"), path("web-2.sock")).unwrap();
        // Sorted before what it leads to.
        std::os::unix::fs::symlink("web.sock", path("latest.sock")).unwrap();
        fs::write(path("elsewhere"), "").unwrap();
        std::os::unix::fs::symlink("elsewhere", path("far.sock")).unwrap();
        std::os::unix::fs::symlink("nowhere", path("gone.sock")).unwrap();
        let found = sockets(temporary.path()).unwrap();
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["far", "gone", "web"]);
    }
}
