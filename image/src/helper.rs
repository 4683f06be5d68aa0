//! The process that unpacks: a program that is run for one bzImage, can do nothing but that, and is given up on after
//! a while.
//!
//! Its standard input is the bzImage, its standard output takes the unpacked kernel ([`crate::kernel::prepared`]), and
//! on standard error it says in a sentence why not.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use api::text::clean;
use api::units::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::confinement::{self, Limits};
use crate::kernel::header::SetupHeader;
use crate::kernel::{LARGEST_FILE, payload, prepared};

/// How long a kernel may take. The slowest format takes a second, and fifty on an emulated processor.
pub const TIME_LIMIT: Duration = Duration::from_secs(60);

/// What the program itself takes of address space, with its stack and what its allocator keeps.
const OWN_MEMORY: u64 = 96 << 20;

/// Bytes of a sentence at most.
const SENTENCE: u64 = 1024;

/// The exit code for an output that can't be written; it says nothing of the kernel.
const UNWRITTEN: u8 = 3;

/// A program that calls [`run`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Helper {
    /// Its file.
    pub program: PathBuf,
    /// Its arguments; those of its work are added, such as a file's size.
    pub arguments: Vec<String>,
}

impl Helper {
    /// This program with a subcommand.
    pub fn own(subcommand: &str) -> Self {
        Self { program: "/proc/self/exe".into(), arguments: vec![subcommand.to_owned()] }
    }

    /// Has the kernel in `image` unpacked to `to`, within this time.
    ///
    /// # Errors
    /// [`Error::Refused`] with what the helper says of the kernel; [`Error::Write`] where `to` took no more;
    /// [`Error::Helper`], [`Error::BadEnd`] and [`Error::TooSlow`] where there was no answer.
    pub fn unpack(
        &self,
        image: &File,
        header: &SetupHeader,
        to: &File,
        within: Duration,
    ) -> Result<(), Error> {
        let start = || -> io::Result<(Child, OwnedFd)> {
            let mut input = image.try_clone()?;
            let size = input.seek(SeekFrom::End(0))?;
            input.rewind()?;
            let numbers = [size, header.init_size];
            let mut child = self.spawn(&numbers, input.into(), to.try_clone()?.into())?;
            let pid = Pid::from_raw(child.id().cast_signed()).ok_or(io::ErrorKind::NotFound);
            match pid.map_err(io::Error::from).and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?)) {
                Ok(end) => Ok((child, end)),
                Err(error) => {
                    child.kill()?;
                    child.wait()?;
                    Err(error)
                }
            }
        };
        let (mut child, end) = start().map_err(Error::Helper)?;
        let has_ended = wait(&end, within);
        if !has_ended {
            // It has ended by itself just now otherwise.
            let _ = child.kill();
        }
        let status = child.wait().map_err(Error::Helper)?;
        if !has_ended {
            return Err(Error::TooSlow(within.as_secs()));
        }
        judge(status, &last_words(&mut child).map_err(Error::Helper)?)
    }

    /// Starts it with `numbers` as further arguments; what it says on standard error is for [`last_words`].
    pub(crate) fn spawn(&self, numbers: &[u64], input: Stdio, output: Stdio) -> io::Result<Child> {
        Command::new(&self.program)
            .args(&self.arguments)
            .args(numbers.iter().map(u64::to_string))
            .env_clear()
            .current_dir("/")
            .stdin(input)
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()
    }
}

/// The sentence of one that has ended.
pub(crate) fn last_words(child: &mut Child) -> io::Result<String> {
    let mut said = Vec::new();
    if let Some(errors) = child.stderr.take() {
        errors.take(SENTENCE).read_to_end(&mut said)?;
    }
    Ok(clean(&String::from_utf8_lossy(&said)))
}

/// Whether the process has ended within this time.
pub(crate) fn wait(end: &OwnedFd, limit: Duration) -> bool {
    let mut waited_for = [PollFd::new(end, PollFlags::IN)];
    let limit = Timespec::try_from(limit).ok();
    loop {
        match poll(&mut waited_for, limit.as_ref()) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn judge(status: ExitStatus, said: &str) -> Result<(), Error> {
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(0) => Ok(()),
        Some(1) if !said.is_empty() => Err(Error::Refused(said.to_owned())),
        Some(UNWRITTEN) => Err(Error::Write(io::Error::other(said.to_owned()))),
        _ if said.is_empty() => Err(Error::BadEnd(status.to_string())),
        _ => Err(Error::BadEnd(format!("{status}: {said}"))),
    }
}

/// What the program does: confines itself, unpacks standard input to standard output, and gives its exit code. It has
/// one thread, and has read nothing of its input. Its arguments are the size of the file and the kernel's `init_size`.
pub fn run(size: u64, init_size: u64) -> u8 {
    let (code, said) = match unpack_own_input(size, init_size) {
        Ok(()) => return 0,
        Err(Error::Write(error)) => (UNWRITTEN, error.to_string()),
        Err(error) => (1, error.to_string()),
    };
    // Its exit code tells enough where nobody reads.
    let _ = writeln!(io::stderr(), "{said}");
    code
}

fn unpack_own_input(size: u64, init_size: u64) -> Result<(), Error> {
    if size > LARGEST_FILE {
        return Err(Error::TooLarge { what: "the file", limit: Bytes(LARGEST_FILE) });
    }
    // A decoder's window may lie in room for two.
    let memory =
        [OWN_MEMORY, size, init_size, 2 * payload::LARGEST_WINDOW].into_iter().fold(0, u64::saturating_add);
    // The kernel and its relocations, which are behind it in what is unpacked, and a few numbers.
    let output = init_size.saturating_mul(2).saturating_add(1 << 20);
    confinement::confine(Limits { memory, output, seconds: TIME_LIMIT.as_secs() })?;
    let mut image = vec![0; size as usize];
    io::stdin().lock().read_exact(&mut image).map_err(Error::Read)?;
    prepared::prepare(&image, &mut Output)
}

/// Standard output without a buffer: what is written is large.
struct Output;

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(io::stdout().as_fd(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
