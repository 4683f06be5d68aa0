//! How the command ends when it did not do what it was asked.

use std::io::{self, IsTerminal};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};

use api::client;
use api::runtime::RuntimeError;
use balancer::daemon::DaemonError;
use vmm::exit::{FAILED, HOST_CANNOT, USAGE};
use vmm::host::HostCannot;
use vmm::machine::MachineError;

use crate::sentence;

/// A balancer whose directory was removed or taken over while it ran.
const DISPLACED: u8 = 4;

/// An exit code with its sentence.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    sentence: Option<String>,
}

impl Failure {
    /// ballast or what it spoke to failed.
    pub fn new(sentence: impl ToString) -> Self {
        Self { code: FAILED, sentence: Some(sentence.to_string()) }
    }

    /// The arguments can be read, but don't make sense.
    pub fn usage(sentence: impl ToString) -> Self {
        Self { code: USAGE, sentence: Some(sentence.to_string()) }
    }

    /// This host can't run guests.
    pub fn host_cannot(sentence: impl ToString) -> Self {
        Self { code: HOST_CANNOT, sentence: Some(sentence.to_string()) }
    }

    /// The user stopped it: the shell's code for SIGINT.
    pub fn stopped(sentence: impl ToString) -> Self {
        Self { code: 130, sentence: Some(sentence.to_string()) }
    }

    /// Another process of this program failed: its code, or the shell's for the signal that ended it.
    pub fn of_child(status: ExitStatus, sentence: impl ToString) -> Self {
        let code = status.code().or_else(|| Some(128 + status.signal()?));
        let code = code.and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0);
        Self { code: code.unwrap_or(FAILED), sentence: Some(sentence.to_string()) }
    }

    /// Says it on standard error.
    pub fn tell(self) -> ExitCode {
        if let Some(sentence) = self.sentence {
            sentence::say(sentence);
        }
        ExitCode::from(self.code)
    }
}

/// Standard output can't be written. A reader that has seen enough is no failure.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self { code: 0, sentence: None };
        }
        Self::new(format!("cannot write to standard output: {error}"))
    }
}

impl From<RuntimeError> for Failure {
    fn from(error: RuntimeError) -> Self {
        match error {
            RuntimeError::Name(_) => Self::usage(error),
            error => Self::new(error),
        }
    }
}

impl From<HostCannot> for Failure {
    fn from(error: HostCannot) -> Self {
        Self { code: HOST_CANNOT, sentence: Some(error.to_string()) }
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        Self { code: error.code(), sentence: Some(error.to_string()) }
    }
}

impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Self {
        match error {
            DaemonError::Config(_) => Self::usage(error),
            DaemonError::Displaced { .. } | DaemonError::Homeless { .. } => {
                Self { code: DISPLACED, sentence: Some(error.to_string()) }
            }
            error => Self::new(error),
        }
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        Self::new(error)
    }
}

/// What clap has to say: help and version on standard output, mistakes on standard error.
pub fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return error.print().map_or_else(|error| Failure::from(error).tell(), |()| ExitCode::SUCCESS);
    }
    let text = error.render().to_string();
    match text.strip_prefix("error: ") {
        Some(sentence) => sentence::say(sentence.trim_end()),
        // No subcommand at all: clap shows the help.
        None if io::stderr().is_terminal() => {
            let _ = error.print();
        }
        None => sentence::text(&text),
    }
    ExitCode::from(USAGE)
}
