//! Bytes between standard input and output and a connection that goes on in a protocol of its own.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use api::client::Upgraded;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm::console::Escape;

use crate::failure::Failure;

const CHUNK: usize = 16 << 10;

/// Bytes that standard output takes without waiting where it takes any: a pipe promises room for so many.
const AT_ONCE: usize = 4 << 10;

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The user has seen enough, or nobody reads the output.
    Detached,
    /// The VM has hung up.
    HungUp,
}

/// Standard input on its way to the guest.
pub struct Keyboard {
    /// Keys that are for this command are looked for, as a person types.
    pub escape: Option<Escape>,
}

/// Moves bytes both ways until the VM's side ends, nobody reads the output, or `stop` is set.
///
/// Neither way waits for the other, nor a signal for either: a guest may answer before it has read all, and may read
/// nothing at all.
///
/// # Errors
/// Standard input or output can't be used.
pub fn converse(
    attached: Upgraded,
    keyboard: &mut Option<Keyboard>,
    stop: &AtomicBool,
) -> Result<End, Failure> {
    let Upgraded { stream, received } = attached;
    let unusable = |error: io::Error| Failure::new(format!("can't use the VM's connection: {error}"));
    stream.set_nonblocking(true).map_err(unusable)?;
    let mut stdout = duplicate(&io::stdout())?;
    let mut stdin = keyboard.is_some().then(|| duplicate(&io::stdin())).transpose()?;
    let (mut to_user, mut to_guest) = (Pending::new(&received), Pending::default());
    let mut chunk = [0; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        let ready = wait(&stream, stdin.as_ref(), &stdout, &to_user, &to_guest)?;
        if ready.output {
            match to_user.write(&mut stdout, AT_ONCE) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(End::Detached),
                Err(error) => return Err(Failure::new(format!("can't write to standard output: {error}"))),
            }
        }
        if ready.stream && to_user.is_empty() {
            match (&stream).read(&mut chunk) {
                Ok(count @ 1..) => to_user = Pending::new(chunk.get(..count).unwrap_or_default()),
                Err(error) if waits(&error) => {}
                Ok(0) | Err(_) => return Ok(End::HungUp),
            }
        }
        if ready.input
            && let (Some(input), Some(keyboard)) = (&mut stdin, keyboard.as_mut())
        {
            match input.read(&mut chunk) {
                Ok(count @ 1..) => {
                    let (through, quits) = keyboard.filter(chunk.get(..count).unwrap_or_default());
                    to_guest = Pending::new(&through);
                    if quits {
                        let _ = to_guest.write(&mut &stream, CHUNK);
                        return Ok(End::Detached);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => {
                    // The guest's answer may still come.
                    let _ = stream.shutdown(Shutdown::Write);
                    stdin = None;
                }
            }
        }
        // What the guest does not take any more is read no further; what it has said may still come.
        if !to_guest.is_empty() && to_guest.write(&mut &stream, CHUNK).is_err() {
            (to_guest, stdin) = (Pending::default(), None);
        }
    }
    Ok(End::Detached)
}

impl Keyboard {
    /// What of `bytes` is for the guest, and whether the user wants to go.
    fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let Some(escape) = &mut self.escape else { return (bytes.to_vec(), false) };
        let mut through = Vec::with_capacity(bytes.len());
        let quits = escape.filter(bytes, &mut through);
        (through, quits)
    }
}

/// Bytes that are on their way.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    gone: usize,
}

impl Pending {
    fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), gone: 0 }
    }

    fn rest(&self) -> &[u8] {
        self.bytes.get(self.gone..).unwrap_or_default()
    }

    fn is_empty(&self) -> bool {
        self.rest().is_empty()
    }

    /// Writes `most` of them, or as many as are taken.
    fn write(&mut self, to: &mut impl Write, most: usize) -> io::Result<()> {
        let rest = self.rest();
        match to.write(rest.get(..most).unwrap_or(rest)) {
            Ok(0) => Err(ErrorKind::WriteZero.into()),
            Ok(count) => {
                self.gone += count;
                Ok(())
            }
            Err(error) if waits(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Whether it is only not possible now.
fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// What can be done without waiting.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    stream: bool,
    input: bool,
    output: bool,
}

/// Waits until bytes can go one way or the other, or a signal comes. What has come is passed on before more is read.
fn wait(
    stream: &UnixStream,
    stdin: Option<&File>,
    stdout: &File,
    to_user: &Pending,
    to_guest: &Pending,
) -> Result<Ready, Failure> {
    let mut both = PollFlags::empty();
    both.set(PollFlags::IN, to_user.is_empty());
    both.set(PollFlags::OUT, !to_guest.is_empty());
    let input = stdin.filter(|_| to_guest.is_empty());
    let output = (!to_user.is_empty()).then_some(stdout);
    let wanted = [
        (!both.is_empty()).then(|| PollFd::new(stream, both)),
        input.map(|stdin| PollFd::new(stdin, PollFlags::IN)),
        output.map(|stdout| PollFd::new(stdout, PollFlags::OUT)),
    ];
    let is_wanted = wanted.each_ref().map(Option::is_some);
    let mut watched: Vec<PollFd<'_>> = wanted.into_iter().flatten().collect();
    match poll(&mut watched, None) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok(Ready::default()),
        Err(errno) => return Err(Failure::new(format!("can't wait for the VM: {errno}"))),
    }
    let mut told = watched.iter().map(|fd| !fd.revents().is_empty());
    let [stream, input, output] = is_wanted.map(|wanted| wanted && told.next().unwrap_or(false));
    Ok(Ready { stream, input, output })
}

fn duplicate(stream: &impl AsFd) -> Result<File, Failure> {
    let duplicate = stream.as_fd().try_clone_to_owned();
    duplicate
        .map(File::from)
        .map_err(|error| Failure::new(format!("can't use standard input and output: {error}")))
}
