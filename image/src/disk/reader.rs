//! The side that opened the disk: it has a process look for the kernel, and serves it the disk's bytes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};

use super::SearchError;
use super::helper::TIME_LIMIT;
use super::protocol::{HEAD, LARGEST_PIECE, Message};
use super::search::{LARGEST_INITRD, LARGEST_KERNEL, Plan};
use super::source::Source;
use crate::helper::{Helper, last_words, wait};

/// Bytes of a command line at most: Linux takes no longer one.
const LONGEST_LINE: usize = 2048;

/// Who looks through disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finder {
    /// A program that calls [`super::helper::run`]; the disk's size is added to its arguments.
    pub helper: Helper,
}

/// What a disk is booted with. All of it comes from the guest.
#[derive(Debug)]
pub struct Found {
    /// Which files these are, and the command line.
    pub plan: Plan,
    /// The kernel, in memory.
    pub kernel: File,
    /// The initramfs, in memory.
    pub initrd: Option<File>,
}

impl Finder {
    /// Finds what `disk` is booted with.
    ///
    /// # Errors
    /// [`SearchError`].
    pub fn find(&self, disk: &dyn Source) -> Result<Found, SearchError> {
        self.find_within(disk, TIME_LIMIT)
    }

    /// As [`find`](Self::find), within this time.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn find_within(&self, disk: &dyn Source, limit: Duration) -> Result<Found, SearchError> {
        let (own, other) = UnixStream::pair().map_err(SearchError::Helper)?;
        let mut child = self.start(disk.size(), other).map_err(SearchError::Helper)?;
        let mut line = Line { socket: own, end: Instant::now() + limit };
        let served = serve(&mut line, disk);
        if served.is_err() {
            // It may wait for an answer. It has ended by itself just now otherwise.
            let _ = line.socket.shutdown(Shutdown::Both);
        }
        // Only where it has hung up its end tells anything.
        let patience = if matches!(served, Err(Lost::HungUp)) { GRACE } else { Duration::ZERO };
        if !has_ended(&child, patience) {
            let _ = child.kill();
        }
        let status = child.wait().map_err(SearchError::Helper)?;
        let said = last_words(&mut child).map_err(SearchError::Helper)?;
        match (served, status.code()) {
            (Ok(found), _) => Ok(found),
            (Err(Lost::HungUp), Some(1)) if !said.is_empty() => Err(SearchError::Refused(said)),
            (Err(Lost::HungUp), _) if said.is_empty() => Err(SearchError::BadEnd(status.to_string())),
            (Err(Lost::HungUp), _) => Err(SearchError::BadEnd(format!("{status}: {said}"))),
            (Err(Lost::Late), _) => Err(SearchError::TooSlow(limit.as_secs())),
            (Err(Lost::For(error)), _) => Err(error),
        }
    }

    fn start(&self, size: u64, socket: UnixStream) -> io::Result<Child> {
        let output = OwnedFd::from(socket.try_clone()?);
        self.helper.spawn(&[size], OwnedFd::from(socket).into(), output.into())
    }
}

/// How long a process has to say its last words, when its socket is closed.
const GRACE: Duration = Duration::from_secs(2);

fn has_ended(child: &Child, within: Duration) -> bool {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    let pid = Pid::from_raw(child.id().cast_signed());
    let end = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    end.is_some_and(|end| wait(&end, within))
}

/// The socket, with an end to all patience.
struct Line {
    socket: UnixStream,
    end: Instant,
}

/// Why a conversation has ended.
enum Lost {
    /// The other side has closed its socket: its own words say why.
    HungUp,
    /// There is no time left.
    Late,
    /// This.
    For(SearchError),
}

impl From<SearchError> for Lost {
    fn from(error: SearchError) -> Self {
        Self::For(error)
    }
}

impl From<io::Error> for Lost {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::Late,
            _ => Self::HungUp,
        }
    }
}

impl Line {
    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// The time that is left, for one call.
    fn patience(&self) -> io::Result<Option<Duration>> {
        let left = self.left();
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Line {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.patience()?)?;
        self.socket.read(bytes)
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.patience()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that a process sends, in memory.
struct Received {
    file: File,
    len: u64,
    limit: u64,
}

impl Received {
    fn new(name: &std::ffi::CStr, limit: u64) -> Result<Self, SearchError> {
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC);
        let file = file.map_err(|error| SearchError::Memory(error.into()))?;
        Ok(Self { file: file.into(), len: 0, limit })
    }

    fn add(&mut self, bytes: &[u8]) -> Result<(), SearchError> {
        self.len = self.len.saturating_add(bytes.len() as u64);
        if self.len > self.limit {
            return Err(senseless("it sends more than it may"));
        }
        self.file.write_all(bytes).map_err(SearchError::Memory)
    }
}

fn senseless(why: &str) -> SearchError {
    SearchError::BadEnd(why.to_owned())
}

fn serve(line: &mut Line, disk: &dyn Source) -> Result<Found, Lost> {
    let mut plan = None;
    let mut kernel = Received::new(c"kernel", LARGEST_KERNEL)?;
    let mut initrd = Received::new(c"initrd", LARGEST_INITRD)?;
    let mut room = vec![0; LARGEST_PIECE];
    loop {
        let mut head = [0; HEAD];
        line.read_exact(&mut head)?;
        let message = Message::parse(&head).map_err(|error| senseless(&error.to_string()))?;
        match message {
            Message::Read { offset, len } => {
                let piece = room.get_mut(..len).unwrap_or_default();
                if offset.checked_add(len as u64).is_none_or(|end| end > disk.size()) {
                    return Err(senseless("it asks for what is not on the disk").into());
                }
                disk.read_at(offset, piece).map_err(SearchError::Read)?;
                line.write_all(piece)?;
            }
            Message::Plan(len) => {
                let piece = room.get_mut(..len).unwrap_or_default();
                line.read_exact(piece)?;
                plan =
                    Some(check(serde_json::from_slice(piece).map_err(|_| senseless("its plan is none"))?)?);
            }
            Message::Kernel(len) | Message::Initrd(len) => {
                let piece = room.get_mut(..len).unwrap_or_default();
                line.read_exact(piece)?;
                let file = if matches!(message, Message::Kernel(_)) { &mut kernel } else { &mut initrd };
                file.add(piece)?;
            }
            Message::Done => break,
        }
    }
    let plan = plan.ok_or_else(|| senseless("it has no plan"))?;
    if kernel.len == 0 {
        return Err(senseless("it sends no kernel").into());
    }
    Ok(Found { plan, kernel: kernel.file, initrd: (initrd.len > 0).then_some(initrd.file) })
}

/// A plan whose words can be printed, and stand on a command line.
fn check(plan: Plan) -> Result<Plan, SearchError> {
    let names = [&plan.place, &plan.by, &plan.kernel, &plan.cmdline];
    let is_clean = |text: &String| text.len() <= LONGEST_LINE && !text.chars().any(char::is_control);
    if names.into_iter().chain(&plan.initrd).chain(&plan.memory_driver).all(is_clean) {
        Ok(plan)
    } else {
        Err(senseless("its plan has words that can't be used"))
    }
}
