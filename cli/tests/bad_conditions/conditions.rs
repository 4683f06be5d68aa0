//! What goes wrong.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::BALLAST;
use crate::scene::Scene;

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum Condition {
    Usual,
    /// A standard stream.
    Stream(i32, State),
    NoStreams,
    /// So many descriptors at most.
    Descriptors(u64),
    /// No further thread and no child process.
    NoThreads,
    /// Files of so many bytes at most.
    FileSize(u64),
    /// So many MiB of address space at most.
    Memory(u64),
    /// The parent ignores these signals.
    Ignored(&'static [i32]),
    /// The directory of the sockets.
    Runtime(Directory),
    NoWorkDirectory,
    NoTemporaryDirectory,
}

/// How a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Closed,
    /// `/dev/full`.
    Full,
    /// A pipe whose other end does nothing; one that is to be written to is full.
    Stalled,
}

/// How the runtime directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directory {
    /// A path of so many bytes.
    Long(usize),
    Missing,
    Unreadable,
    ReadOnly,
    AFile,
    /// It goes while the command runs.
    Removed,
}

/// The other ends of streams, which must live as long as the command.
#[derive(Default)]
pub struct OtherEnds {
    /// The one that is not read.
    pub output: Option<OwnedFd>,
    _input: Option<OwnedFd>,
}

impl Condition {
    /// Whether what is said on standard error can be read.
    pub fn is_heard(self) -> bool {
        !matches!(self, Self::Stream(2, _) | Self::NoStreams)
    }

    pub fn is_output_stalled(self) -> bool {
        matches!(self, Self::Stream(1, State::Stalled))
    }

    /// Whether there may be too little memory for anything at all.
    pub fn is_short_of_memory(self) -> bool {
        matches!(self, Self::Memory(_))
    }

    /// Whether `signal` ends nothing.
    pub fn ignores(self, signal: i32) -> bool {
        matches!(self, Self::Ignored(signals) if signals.contains(&signal))
    }

    /// Has `command` meet it.
    pub fn befall(self, command: &mut Command, scene: &mut Scene) -> OtherEnds {
        let mut ends = OtherEnds::default();
        match self {
            Self::Usual => {}
            Self::Stream(fd, State::Closed) => {
                before(command, move || close(fd));
            }
            Self::Stream(fd, State::Full) => {
                let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
                set_stream(command, fd, full);
            }
            Self::Stream(0, State::Stalled) => {
                let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
                set_stream(command, 0, read);
                ends._input = Some(write);
            }
            Self::Stream(fd, State::Stalled) => {
                let (read, write) = full_pipe();
                set_stream(command, fd, write);
                ends.output = Some(read);
            }
            Self::NoStreams => before(command, || (0..3).try_for_each(close)),
            Self::Descriptors(most) => limit(command, Resource::Nofile, most),
            Self::NoThreads => {
                // Root may have as many as it likes.
                scene.leave_root(command);
                limit(command, Resource::Nproc, 1);
            }
            Self::FileSize(most) => limit(command, Resource::Fsize, most),
            Self::Memory(mib) => limit(command, Resource::As, mib << 20),
            Self::Ignored(signals) => {
                before(command, move || {
                    for &signal in signals {
                        // SAFETY: no handler is set.
                        unsafe { libc::signal(signal, libc::SIG_IGN) };
                    }
                    Ok(())
                });
            }
            Self::Runtime(directory) => directory.befall(command, scene),
            Self::NoWorkDirectory => {
                let work = std::ffi::CString::new(scene.work().to_str().unwrap()).unwrap();
                fs::remove_dir_all(scene.work()).unwrap();
                fs::create_dir(scene.work()).unwrap();
                before(command, move || {
                    // SAFETY: a whole string.
                    if unsafe { libc::rmdir(work.as_ptr()) } == 0 { Ok(()) } else { Err(last_error()) }
                });
            }
            Self::NoTemporaryDirectory => {
                command.env("TMPDIR", scene.root().join("no/temporary"));
            }
        }
        ends
    }
}

impl Directory {
    fn befall(self, command: &mut Command, scene: &mut Scene) {
        let own = scene.own_runtime();
        let path = match self {
            Self::Long(length) => {
                let mut path = own.to_str().unwrap().to_owned();
                while path.len() < length {
                    let more = (length - path.len()).clamp(2, 201) - 1;
                    path = format!("{path}/{}", "d".repeat(more));
                }
                path.into()
            }
            Self::Missing => own.join("not/there"),
            Self::Unreadable | Self::ReadOnly => {
                let mode = if self == Self::Unreadable { 0 } else { 0o500 };
                // Root reads and writes what it likes.
                scene.leave_root(command);
                fs::set_permissions(&own, Permissions::from_mode(mode)).unwrap();
                own
            }
            Self::AFile => scene.work().join("vmlinuz"),
            Self::Removed => own,
        };
        scene.set_runtime(command, path);
    }
}

/// Adds what is done in the new process before the program begins.
fn before(command: &mut Command, work: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: none of those here does more than system calls.
    unsafe { command.pre_exec(work) };
}

fn last_error() -> io::Error {
    io::Error::last_os_error()
}

fn close(fd: i32) -> io::Result<()> {
    // SAFETY: nobody uses this process's standard streams between here and its program.
    if unsafe { libc::close(fd) } == 0 { Ok(()) } else { Err(last_error()) }
}

fn limit(command: &mut Command, resource: Resource, most: u64) {
    let limit = Rlimit { current: Some(most), maximum: Some(most) };
    before(command, move || Ok(setrlimit(resource, limit)?));
}

fn set_stream(command: &mut Command, fd: i32, to: impl Into<Stdio>) {
    match fd {
        0 => command.stdin(to),
        1 => command.stdout(to),
        _ => command.stderr(to),
    };
}

/// A small pipe with no room left.
pub fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setpipe_size(&write, 4096).unwrap();
    let flags = rustix::fs::fcntl_getfl(&write).unwrap();
    rustix::fs::fcntl_setfl(&write, flags | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&write, &[b'x'; 512]).is_ok() {}
    rustix::fs::fcntl_setfl(&write, flags).unwrap();
    (read, write)
}

/// Makes `command` one of another user than root, to whom `paths` belong. Nothing where root does not run it.
pub fn leave_root(command: &mut Command, paths: &[&std::path::Path]) {
    /// Each has a user for itself: what a user's processes count to is theirs together.
    static USERS: AtomicU32 = AtomicU32::new(0);
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let own = 100_000 + std::process::id() % 10_000 * 1000;
    let user = own + USERS.fetch_add(1, Ordering::Relaxed) % 1000;
    for path in paths {
        chown(path, Some(user), Some(user)).unwrap();
    }
    before(command, move || {
        // SAFETY: plain system calls; the pointer to no groups is never read.
        let left = unsafe {
            libc::setgroups(0, std::ptr::null()) == 0 && libc::setgid(user) == 0 && libc::setuid(user) == 0
        };
        if left { Ok(()) } else { Err(last_error()) }
    });
}

/// The least address space in which the program begins, in MiB.
pub fn least_memory_mib() -> u64 {
    let begins = |mib: u64| {
        let mut command = Command::new(BALLAST);
        command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        limit(&mut command, Resource::As, mib << 20);
        command.status().is_ok_and(|status| status.success())
    };
    let (mut less, mut enough) = (0, 1024);
    assert!(begins(enough));
    while enough - less > 1 {
        let middle = (less + enough) / 2;
        *(if begins(middle) { &mut enough } else { &mut less }) = middle;
    }
    enough
}

/// Where standard output goes if nothing is said of it.
pub fn output_file(scene: &Scene) -> File {
    File::create(scene.output()).unwrap()
}
