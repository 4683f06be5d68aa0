//! The guest's first serial port on a terminal, pipes, a file or a socket.
//!
//! A thread of its own waits for whoever reads the output: no vCPU does, nor does the event loop that
//! hears the signals which end the VM. Clients of the VM's API may look at the console beside that reader.

mod attached;
#[cfg(test)]
mod attached_tests;
mod client;
mod escape;
mod input;
mod output;
#[cfg(test)]
pub(crate) mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::platform::serial::{FirstReader, Port};
use devices::sandbox::{Call, SandboxNeeds};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

pub use self::attached::{AttachError, Attachments, MOST_ATTACHED, Mode, Place};
use self::client::Client;
pub use self::escape::Escape;
pub use self::input::Input;
use self::input::Source;
use self::output::Sink;
use crate::api_server::{BindError, LOOK_EVERY, Listening};
use crate::config;
use crate::events;
use crate::exit::Exit;
use crate::terminal::{RawTerminal, Terminal};
use crate::vcpu_set::VcpuSet;

/// How long the end of a VM waits for a reader who does not take its last output.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it does where somebody wants the VM to end.
const IMPATIENCE: Duration = Duration::from_secs(1);

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file can't be made.
    #[error("can't write the console to {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket can't be made.
    #[error("can't listen for the console at {}: {why}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Standard input or output can't be used.
    #[error("can't use standard input and output for the console: {0}")]
    Stdio(io::Error),
    /// The host has no descriptors left.
    #[error("can't make a serial port: {0}")]
    Port(io::Error),
}

/// The serial port and what its line ends at.
pub struct Console {
    /// The port, for the bus.
    pub port: Arc<Port>,
    /// Whoever brings input, for the event loop.
    pub input: Arc<Mutex<Input>>,
    /// Where clients of the API are attached.
    pub attachments: Arc<Attachments>,
    sink: Option<Sink>,
    /// Given back to the user when this goes.
    _terminal: Option<RawTerminal>,
}

impl Console {
    /// Opens what `config` names. `irq` is the port's interrupt line.
    ///
    /// # Errors
    /// [`ConsoleError`] names the file.
    pub fn open(
        config: &config::Console,
        irq: EventFd,
        vcpu_set: &Arc<VcpuSet>,
    ) -> Result<Self, ConsoleError> {
        let mut terminal = None;
        let (reader, sink, source) = match config {
            config::Console::Stdio => {
                let output = duplicate(&io::stdout()).map_err(ConsoleError::Stdio)?;
                let source = match Terminal::enter().map_err(ConsoleError::Stdio)? {
                    Terminal::InBackground => {
                        tracing::info!(
                            "this VM runs in the background: its console takes no input, and the terminal stays as it is"
                        );
                        Source::Nothing
                    }
                    Terminal::None => stdin(false)?,
                    Terminal::Raw(raw) => {
                        terminal = Some(raw);
                        stdin(true)?
                    }
                };
                (FirstReader::Present, Some(Sink::File(output)), source)
            }
            config::Console::File(path) => {
                let file =
                    append(path).map_err(|source| ConsoleError::File { path: path.clone(), source })?;
                (FirstReader::Present, Some(Sink::File(file)), Source::Nothing)
            }
            config::Console::Socket(path) => {
                let socket = Listening::at(path)
                    .map_err(|error| ConsoleError::Socket { path: path.clone(), why: refusal(&error) })?;
                let timer = every(LOOK_EVERY).map_err(ConsoleError::Port)?;
                let client = Arc::new(Client::default());
                let source = Source::Socket { socket, timer, client: Arc::clone(&client) };
                (FirstReader::Awaited, Some(Sink::Client(client)), source)
            }
            config::Console::None => (FirstReader::Nobody, None, Source::Nothing),
        };
        let port = Arc::new(Port::new(irq, reader).map_err(ConsoleError::Port)?);
        let input =
            Input::new(source, Arc::clone(&port), Arc::clone(vcpu_set)).map_err(ConsoleError::Port)?;
        let attachments = input.attachments();
        let input = Arc::new(Mutex::new(input));
        Ok(Self { port, input, attachments, sink, _terminal: terminal })
    }

    /// Starts the thread that brings output to its reader.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(&mut self, vcpu_set: &Arc<VcpuSet>) -> io::Result<()> {
        let Some(sink) = self.sink.take() else { return Ok(()) };
        let port = Arc::clone(&self.port);
        events::spawn("console", vcpu_set, move || {
            output::bring(&port, &sink);
            Ok(())
        })?;
        Ok(())
    }

    /// Waits until the reader has the guest's last output, but not for ever. The VM has come to its `exit`.
    pub fn finish(&self, exit: &Exit) {
        self.port.finish(match exit {
            Exit::Stopped | Exit::ConsoleQuit => IMPATIENCE,
            _ => PATIENCE,
        });
        // Poisoned by a panic, which has ended the process.
        if let Ok(mut input) = self.input.lock() {
            input.finish();
        }
    }
}

/// What a console needs of the sandbox: a terminal's settings are undone, and a socket removed, at the end, and made again where
/// somebody removes it.
pub(crate) fn sandbox_needs(config: &config::Console) -> SandboxNeeds {
    const TERMINAL: [Call; 6] = [
        Call::ioctl(libc::TCGETS),
        Call::ioctl(libc::TCSETS),
        Call::ioctl(libc::TCSETSW),
        Call::ioctl(libc::TCSETSF),
        Call::ioctl(libc::TIOCGPGRP),
        Call::ioctl(libc::TIOCGWINSZ),
    ];
    match config {
        config::Console::Stdio => SandboxNeeds::calls(&TERMINAL),
        config::Console::Socket(path) => {
            SandboxNeeds { remove: vec![path.clone()], ..SandboxNeeds::default() }
        }
        config::Console::File(_) | config::Console::None => SandboxNeeds::default(),
    }
}

/// A timer that fires so often.
fn every(interval: Duration) -> io::Result<TimerFd> {
    let error = |error: vmm_sys_util::errno::Error| io::Error::from_raw_os_error(error.errno());
    let mut timer = TimerFd::new().map_err(error)?;
    timer.reset(interval, Some(interval)).map_err(error)?;
    Ok(timer)
}

fn duplicate(stream: &impl AsFd) -> io::Result<File> {
    Ok(File::from(stream.as_fd().try_clone_to_owned()?))
}

fn stdin(typed: bool) -> Result<Source, ConsoleError> {
    let input = duplicate(&io::stdin()).map_err(ConsoleError::Stdio)?;
    Ok(Source::Stdin { input, escape: Escape::Plain, typed })
}

/// What is in the file already stays.
fn append(path: &Path) -> io::Result<File> {
    let file = File::options().append(true).create(true).open(path)?;
    if file.metadata()?.len() > 0 {
        tracing::info!("the console is appended to {}, which was there", path.display());
    }
    Ok(file)
}

/// Why nobody can listen for a console.
fn refusal(error: &BindError) -> String {
    match error {
        BindError::InUse(_) => "another process listens there: choose another path".to_owned(),
        BindError::NotASocket(_) => "there is a file that is no socket: choose another path".to_owned(),
        BindError::Io { source, .. } => source.to_string(),
    }
}
