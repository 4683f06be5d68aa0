//! Standard error, written so that nobody who does not read it, and no disk that is full, ends or stops anything.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// How bytes get there without waiting. Other processes share the open file, so its flags stay as they are.
enum Way {
    /// The same pipe or terminal, opened once more for this process alone, which does not wait.
    Own(File),
    /// A socket, where each message can say that it does not wait.
    Socket,
    /// A file, which never waits, or a pipe of another user, which is asked first whether it has room.
    Shared,
}

/// What did not get there.
#[derive(Default)]
struct Lost {
    lines: u64,
    /// The last line that got there did so in part.
    torn: bool,
    /// Somebody waited for a reader in vain. Nobody does so a second time.
    gave_up: bool,
}

static WAY: OnceLock<Way> = OnceLock::new();
static LOST: Mutex<Lost> = Mutex::new(Lost { lines: 0, torn: false, gave_up: false });

/// Finds the way to standard error: to be called before a sandbox takes away the paths to it.
pub fn open() {
    WAY.get_or_init(Way::find);
}

/// Writes one or more whole lines, or gives up when there was no room for them within `patience`. What
/// is missing is counted, and told when there is room again.
pub fn write(lines: &[u8], patience: Duration) {
    let way = WAY.get_or_init(Way::find);
    let mut lost = LOST.lock().unwrap_or_else(PoisonError::into_inner);
    let patience = if lost.gave_up { Duration::ZERO } else { patience };
    let deadline = Instant::now() + patience;
    if lost.torn || lost.lines > 0 {
        let start = if lost.torn { "\n" } else { "" };
        let note = format!("{start}ballast: {} lines are missing here: nobody read them\n", lost.lines);
        match way.write_all(note.as_bytes(), deadline) {
            0 => {}
            written => *lost = Lost { torn: written < note.len(), ..Lost::default() },
        }
    }
    let written = if lost.lines > 0 { 0 } else { way.write_all(lines, deadline) };
    if written < lines.len() {
        lost.torn |= written > 0;
        lost.lines = lost.lines.saturating_add(1);
        lost.gave_up |= patience > Duration::ZERO;
    }
}

impl Way {
    fn find() -> Self {
        let errors = io::stderr();
        let Some(kind) = file(errors.as_fd()).and_then(|file| Some(file.metadata().ok()?.file_type())) else {
            return Self::Shared;
        };
        if kind.is_socket() {
            return Self::Socket;
        }
        if !(kind.is_fifo() || kind.is_char_device()) {
            return Self::Shared;
        }
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let own = OpenOptions::new().write(true).custom_flags(flags).open("/proc/self/fd/2");
        own.map_or(Self::Shared, Self::Own)
    }

    /// Gives how many bytes got there until the deadline.
    fn write_all(&self, bytes: &[u8], deadline: Instant) -> usize {
        let mut written = 0;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            match self.write(rest) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() || !has_room(self.fd(), left) {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        written
    }

    fn fd(&self) -> libc::c_int {
        match self {
            Self::Own(file) => file.as_raw_fd(),
            Self::Socket | Self::Shared => libc::STDERR_FILENO,
        }
    }

    /// One write that does not wait.
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let (start, length) = (bytes.as_ptr().cast(), bytes.len());
        let written = match self {
            Self::Socket => {
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                // SAFETY: `length` bytes can be read at `start`.
                unsafe { libc::send(self.fd(), start, length, flags) }
            }
            Self::Shared if !has_room(self.fd(), Duration::ZERO) => {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            // A pipe that has room at all has room for this much.
            // SAFETY: no more than `length` bytes are read at `start`.
            Self::Shared => unsafe { libc::write(self.fd(), start, length.min(libc::PIPE_BUF)) },
            // SAFETY: `length` bytes can be read at `start`.
            Self::Own(_) => unsafe { libc::write(self.fd(), start, length) },
        };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}

fn file(fd: BorrowedFd<'_>) -> Option<File> {
    fd.try_clone_to_owned().ok().map(File::from)
}

/// Whether something can be written within this time; also where a write only tells what is wrong.
fn has_room(fd: libc::c_int, within: Duration) -> bool {
    let mut room = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    let milliseconds = libc::c_int::try_from(within.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one whole `pollfd`, as the call is told.
    unsafe { libc::poll(&mut room, 1, milliseconds) > 0 }
}

/// Where the log goes.
pub struct LogWriter;

impl MakeWriter<'_> for LogWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

/// No error is ever given: there is no place to say it.
impl io::Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write(bytes, Duration::ZERO);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
