//! virtiofsd: a process that does with a directory what a guest asks for, and with nothing else. It shuts itself in
//! (namespaces with the directory as their root, seccomp), and ends with its socket.
//!
//! There are two: that of QEMU 7 (Debian 12), and the later one in Rust (<https://gitlab.com/virtio-fs/virtiofsd>).

use std::ffi::{CString, OsStr, OsString};
use std::fs::Permissions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::ptr;

use crate::config::ShareOptions;
use crate::helper::{Helper, Words};

/// Where systems have it, the later one first.
const PLACES: [&str; 4] =
    ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/bin/virtiofsd", "/usr/lib/qemu/virtiofsd"];

/// Why a directory is not shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It is not installed.
    #[error(
        "a shared directory needs the program virtiofsd, which is not installed: `apt install virtiofsd`, or \
         qemu-system-common on Debian 12"
    )]
    Missing,
    /// There is nothing to share.
    #[error("the shared directory {} can't be had: {source}", .path.display())]
    Directory {
        /// As it was named.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// QEMU's needs root.
    #[error(
        "{0} of QEMU shares directories for root alone: run ballast as root, or install the later virtiofsd, which \
         needs no privileges (Debian 13 has it)"
    )]
    NeedsRoot(&'static str),
    /// It does not start, or does not do as it should.
    #[error("virtiofsd, which is to share {}, can't be used ({reason}): {said}", .path.display())]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What it says.
        said: String,
    },
    /// The host refuses.
    #[error("virtiofsd can't be started: {0}")]
    Host(#[from] io::Error),
}

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// QEMU's, in C.
    Qemu,
    /// The later one.
    Rust,
}

/// One that was started.
pub struct Virtiofsd {
    /// Where it is told what to do.
    pub socket: UnixStream,
    /// The process.
    pub helper: Helper,
    /// What it says of itself.
    pub words: Words,
}

/// Starts one for a directory. Whether it serves is seen by its first answer.
pub fn start(share: &ShareOptions) -> Result<Virtiofsd, ShareError> {
    let lacks = |source| ShareError::Directory { path: share.path.clone(), source };
    let directory = share.path.canonicalize().map_err(lacks)?;
    if !directory.is_dir() {
        return Err(lacks(io::ErrorKind::NotADirectory.into()));
    }
    let program = PLACES.into_iter().find(|path| Path::new(path).exists()).ok_or(ShareError::Missing)?;
    let kind = kind(program)?;
    let is_root = rustix::process::geteuid().is_root();
    if kind == Kind::Qemu && !is_root {
        return Err(ShareError::NeedsRoot(program));
    }
    let (listener, socket) = connection()?;
    let (words, errors) = Words::new()?;
    let mut command = Command::new(program);
    command.args(arguments(kind, &directory, listener.as_raw_fd()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
    if share.readonly {
        if is_root {
            read_only(&mut command, &directory)?;
        } else {
            command.arg("--readonly");
        }
    }
    let (helper, _) = Helper::start(&mut command, &listener)?;
    Ok(Virtiofsd { socket, helper, words })
}

/// Which one a program is, by its own words.
fn kind(program: &str) -> io::Result<Kind> {
    let help = Command::new(program).arg("--help").env_clear().stdin(Stdio::null()).output()?;
    let is_later = String::from_utf8_lossy(&help.stdout).contains("--shared-dir");
    Ok(if is_later { Kind::Rust } else { Kind::Qemu })
}

/// A listener with one connection that waits for it already: both programs accept the first, and no other. Nobody else
/// can come before, as the name is in a directory of this user's alone until it goes.
fn connection() -> io::Result<(OwnedFd, UnixStream)> {
    let private =
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).prefix("ballast-").tempdir()?;
    let path = private.path().join("fs");
    let listener = UnixListener::bind(&path)?;
    let socket = UnixStream::connect(&path)?;
    Ok((listener.into(), socket))
}

fn arguments(kind: Kind, directory: &Path, listener: i32) -> Vec<OsString> {
    let fd = format!("--fd={listener}").into();
    match kind {
        Kind::Rust => {
            let mut shared = OsString::from("--shared-dir=");
            shared.push(directory);
            vec![fd, shared, "--sandbox=namespace".into(), "--log-level=error".into()]
        }
        Kind::Qemu => {
            let source = [b"source=", &*escaped(directory.as_os_str())].concat();
            let options = ["-f", "-o", "sandbox=namespace,log_level=err", "-o"].map(OsString::from);
            [fd].into_iter().chain(options).chain([OsString::from_vec(source)]).collect()
        }
    }
}

/// As an option's value in a list with commas.
fn escaped(text: &OsStr) -> Vec<u8> {
    let escaped = |byte: &u8| if b",\\".contains(byte) { vec![b'\\', *byte] } else { vec![*byte] };
    text.as_bytes().iter().flat_map(escaped).collect()
}

/// Gives the program mounts of its own in which the directory, and all below it, can't be written: whatever it does,
/// the kernel refuses. It has no right to mount once it serves.
fn read_only(command: &mut Command, directory: &Path) -> Result<(), ShareError> {
    let path = CString::new(directory.as_os_str().as_bytes()).map_err(io::Error::other)?;
    // SAFETY: all zeros is one that changes nothing.
    let mut attributes: libc::mount_attr = unsafe { std::mem::zeroed() };
    attributes.attr_set = libc::MOUNT_ATTR_RDONLY;
    let mount = move || {
        let (all, here) = (libc::MS_REC, path.as_ptr());
        // SAFETY: the texts are C strings, and the kernel reads one structure of the size that it is told.
        let good = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), all | libc::MS_PRIVATE, ptr::null())
                    == 0
                && libc::mount(here, here, ptr::null(), all | libc::MS_BIND, ptr::null()) == 0
                && libc::syscall(
                    libc::SYS_mount_setattr,
                    libc::AT_FDCWD,
                    here,
                    libc::AT_RECURSIVE,
                    &raw const attributes,
                    size_of::<libc::mount_attr>(),
                ) == 0
        };
        if good { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: only system calls are made, and nothing is allocated.
    unsafe { command.pre_exec(mount) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use api::units::Bytes;
    use devices::virtio::fs::QUEUES;
    use devices::virtio::vhost_user::{FrontEnd, PATIENCE};

    use super::*;
    use crate::config::{Backing, MemoryOptions};
    use crate::memory::Ram;

    #[test]
    fn each_is_told_in_its_own_words() {
        let line = |kind, directory: &str| {
            let words = arguments(kind, Path::new(directory), 7);
            words.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        let qemu = line(Kind::Qemu, r"/srv/a,b\c");
        assert_eq!(qemu, r"--fd=7 -f -o sandbox=namespace,log_level=err -o source=/srv/a\,b\\c");
        let later = line(Kind::Rust, "/srv/a,b");
        assert_eq!(later, "--fd=7 --shared-dir=/srv/a,b --sandbox=namespace --log-level=error");
    }

    #[test]
    fn the_first_to_come_is_this_process() {
        let (listener, socket) = connection().unwrap();
        let (accepted, _) = UnixListener::from(listener).accept().unwrap();
        drop(socket);
        assert_eq!(io::Read::read(&mut &accepted, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn what_is_no_directory_is_told() {
        for path in ["/etc/passwd", "/nowhere"] {
            let share = ShareOptions { path: path.into(), tag: None, readonly: false };
            let error = start(&share).map(drop).unwrap_err().to_string();
            assert!(error.contains(path), "{error}");
        }
    }

    /// The one that this machine has, where it can be used here.
    #[test]
    fn it_answers_and_ends_with_its_socket() {
        let is_there = PLACES.into_iter().find(|path| Path::new(path).exists());
        let usable = is_there.is_some_and(|program| {
            rustix::process::geteuid().is_root() || kind(program).is_ok_and(|kind| kind == Kind::Rust)
        });
        if !usable {
            eprintln!("SKIPPED: there is no virtiofsd for this user");
            return;
        }
        let memory =
            Ram::new(Bytes::mib(64), MemoryOptions { backing: Backing::Memfd, ..Default::default() });
        let memory = memory.expect("mapped").shared().expect("descriptors").expect("a memfd");
        let directory = tempfile::tempdir().unwrap();
        for readonly in [false, true] {
            let share = ShareOptions { path: directory.path().to_owned(), tag: None, readonly };
            let mut virtiofsd = start(&share).unwrap();
            let made = FrontEnd::new(virtiofsd.socket, &memory, QUEUES, PATIENCE);
            assert!(made.is_ok(), "{:?}: {}", made.err(), virtiofsd.words.take());
            assert!(!virtiofsd.helper.has_ended().unwrap());
            drop(made);
            let begun = Instant::now();
            while !virtiofsd.helper.has_ended().unwrap() {
                assert!(begun.elapsed() < PATIENCE, "it stays");
                thread::sleep(Duration::from_millis(2));
            }
        }
    }
}
