//! Why a server gave no answer that could be used: one set of words for every VMM.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use super::Peer;

/// Why a VM gave no answer that could be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens at the socket.
    #[error("no VM answers at {}: it has ended or never started{}", .socket.display(), .peer.where_to_look)]
    NoSuchVm {
        /// Which server was expected.
        peer: &'static Peer,
        /// Where it was looked for.
        socket: PathBuf,
    },
    /// This user may not connect.
    #[error("not allowed to connect to {}: run as the user who started the VM, or as root", .socket.display())]
    NotAllowed {
        /// The socket.
        socket: PathBuf,
    },
    /// No connection could be made, for a reason that lies on this side.
    #[error("this process could not ask the VM at {} for {request}: {cause}", .socket.display())]
    Unable {
        /// The socket.
        socket: PathBuf,
        /// What was to be asked.
        request: String,
        /// What the kernel said, and what to do.
        cause: String,
    },
    /// No answer in time.
    #[error(
        "the VM at {} did not answer {request} within {} ms: its process hangs or this host is overloaded",
        .socket.display(), .within.as_millis()
    )]
    NotAnswering {
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        request: String,
        /// The limit that passed.
        within: Duration,
    },
    /// The connection broke in the middle.
    #[error("the VM at {} hung up during {request} ({cause}): it has probably just ended", .socket.display())]
    HungUp {
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        request: String,
        /// What the connection said.
        cause: String,
    },
    /// An answer that can't be understood.
    #[error("the VM at {} answered {request} with nonsense ({what}): {}", .socket.display(), .peer.should_be)]
    Nonsense {
        /// Which server was expected.
        peer: &'static Peer,
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        request: String,
        /// What is wrong with it.
        what: String,
    },
    /// The one connection that a VM serves at a time is somebody else's.
    #[error("the VM at {} takes a connection and says nothing: {advice}", .socket.display())]
    Busy {
        /// The socket.
        socket: PathBuf,
        /// What to do.
        advice: &'static str,
    },
    /// The VM understood and said no.
    #[error("the VM at {} refused {request} ({status}): {error}", .socket.display())]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        request: String,
        /// The HTTP status, 4xx or 5xx, or the VMM's name for the error.
        status: String,
        /// The VM's own sentence.
        error: String,
    },
}

impl Error {
    /// The error of a connection that could not be made.
    pub fn unreachable(peer: &'static Peer, socket: &Path, request: &str, error: &io::Error) -> Self {
        let socket = socket.to_owned();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Self::NoSuchVm { peer, socket },
            io::ErrorKind::PermissionDenied => Self::NotAllowed { socket },
            // A Unix socket whose queue of connections is full.
            io::ErrorKind::WouldBlock => {
                Self::NotAnswering { socket, request: request.to_owned(), within: Duration::ZERO }
            }
            io::ErrorKind::ConnectionReset => {
                Self::HungUp { socket, request: request.to_owned(), cause: error.to_string() }
            }
            _ => Self::Unable { socket, request: request.to_owned(), cause: own_trouble(error) },
        }
    }

    /// Whether it could not even be asked, as too many others wait to be connected.
    pub fn is_crowded(&self) -> bool {
        matches!(self, Self::NotAnswering { within: Duration::ZERO, .. })
    }

    /// One word for a log line and for telling one trouble from another.
    pub fn word(&self) -> &'static str {
        match self {
            Self::NoSuchVm { .. } => "gone",
            Self::NotAllowed { .. } => "not-allowed",
            Self::Unable { .. } => "unable",
            Self::NotAnswering { .. } => "not-answering",
            Self::HungUp { .. } => "hung-up",
            Self::Nonsense { .. } => "nonsense",
            Self::Busy { .. } => "busy",
            Self::Refused { .. } => "refused",
        }
    }
}

fn own_trouble(error: &io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE) => {
            format!("{error}; raise how many descriptors a process may have (`ulimit -n`, LimitNOFILE=)")
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_of_ones_own_is_not_told_as_the_vms() {
        let error = |errno: Errno| {
            let error = io::Error::from(errno);
            Error::unreachable(&super::super::BALLAST, Path::new("/x.sock"), "GET /vm", &error)
        };
        for own in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::INVAL, Errno::NAMETOOLONG]
        {
            assert_eq!(error(own).word(), "unable", "{own}");
        }
        assert!(error(Errno::MFILE).to_string().contains("ulimit -n"));
        assert_eq!(error(Errno::CONNREFUSED).word(), "gone");
        assert_eq!(error(Errno::CONNRESET).word(), "hung-up");
    }
}
