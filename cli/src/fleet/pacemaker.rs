//! Asking Pacemaker's own programs.

use std::fmt;
use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use api::text::clean;

use super::cluster::{self, Cluster, NotUnderstood};
use crate::failure::Failure;

/// How long one of its programs may take. A cluster that elects its controller answers none for a while.
const PATIENCE: Duration = Duration::from_secs(20);

/// The longest answer that is read, in bytes: thousands of hosts and tens of thousands of VMs.
const LARGEST_ANSWER: u64 = 64 << 20;

/// The longest complaint that is read, in bytes.
const LARGEST_COMPLAINT: u64 = 4096;

/// The exit codes of Pacemaker's programs that have a next step (`crm_error --exit --list`).
const INSUFFICIENT_PRIVILEGES: [i32; 2] = [4, 77];
const DISCONNECTED: i32 = 102;

/// Why Pacemaker told nothing that could be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its programs are not installed.
    #[error(
        "{program} is not here: `ballast fleet` runs on hosts of a Pacemaker cluster (apt install pacemaker)"
    )]
    NotInstalled { program: &'static str },
    /// The program can't be run.
    #[error("can't run {program}: {source}")]
    Unable { program: &'static str, source: io::Error },
    /// Nobody listens.
    #[error(
        "the cluster does not run on this host: `systemctl start pacemaker`, or ask another host ({said})"
    )]
    NotRunning { said: String },
    /// The kernel keeps this user from it.
    #[error("{program} may not ask the cluster: run as root, or as a user of the group haclient ({said})")]
    NotAllowed { program: &'static str, said: String },
    /// It took too long.
    #[error("{program} did not answer within {} s: the cluster hangs or has no controller yet", PATIENCE.as_secs())]
    NotAnswering { program: &'static str },
    /// It failed otherwise.
    #[error("{program} ended with {status}: {said}")]
    Failed { program: &'static str, status: ExitStatus, said: String },
    /// It wrote more than is read.
    #[error("{program} answered more than {} MiB: that is no cluster of ours", LARGEST_ANSWER >> 20)]
    TooLarge { program: &'static str },
    /// It wrote something else than was expected.
    #[error("{program} gave no answer that could be used: {source}")]
    NotUnderstood { program: &'static str, source: NotUnderstood },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error)
    }
}

/// The cluster that this host belongs to, as it is now.
///
/// # Errors
/// Pacemaker is not there, does not answer, or says what is not understood.
pub fn cluster() -> Result<Cluster, Error> {
    let status = ask("crm_mon", &["--one-shot", "--inactive", "--output-as=xml"])?;
    let not_understood = |program| move |source| Error::NotUnderstood { program, source };
    let mut cluster = Cluster::of_status(&status).map_err(not_understood("crm_mon"))?;
    let configuration = ask("cibadmin", &["--query", "--scope=configuration"])?;
    cluster.add_configuration(&configuration).map_err(not_understood("cibadmin"))?;
    Ok(cluster)
}

/// What `program` writes on standard output.
///
/// # Errors
/// It is not there, fails, takes longer than [`PATIENCE`], or writes more than [`LARGEST_ANSWER`].
pub fn ask(
    program: &'static str,
    words: &[impl AsRef<std::ffi::OsStr> + fmt::Debug],
) -> Result<String, Error> {
    let mut command = Command::new(program);
    command.args(words).env("LC_ALL", "C.UTF-8");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::NotInstalled { program },
        _ => Error::Unable { program, source },
    })?;
    Running { child, ended: false }.answer(program, PATIENCE)
}

/// A program that is ended where nobody waits for it any more.
struct Running {
    child: Child,
    ended: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Running {
    fn answer(mut self, program: &'static str, patience: Duration) -> Result<String, Error> {
        let unable = |source| Error::Unable { program, source };
        let until = Instant::now() + patience;
        let output = reader(self.child.stdout.take(), LARGEST_ANSWER + 1).map_err(unable)?;
        let complaint = reader(self.child.stderr.take(), LARGEST_COMPLAINT).map_err(unable)?;
        let heard = |from: &Receiver<io::Result<Vec<u8>>>| match from
            .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            Ok(read) => read.map_err(unable),
            Err(RecvTimeoutError::Timeout) => Err(Error::NotAnswering { program }),
            Err(RecvTimeoutError::Disconnected) => Ok(Vec::new()),
        };
        let answer = heard(&output)?;
        if answer.len() as u64 > LARGEST_ANSWER {
            return Err(Error::TooLarge { program });
        }
        let said = heard(&complaint)?;
        // Both streams are closed: it has nothing left to do.
        let status = self.child.wait().map_err(unable)?;
        self.ended = true;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        if status.success() {
            return Ok(answer);
        }
        let said = first_line(&String::from_utf8_lossy(&said)).or_else(|| cluster::complaint(&answer));
        let said = said.unwrap_or_else(|| "it said nothing".to_owned());
        Err(match status.code() {
            Some(DISCONNECTED) => Error::NotRunning { said },
            Some(code) if INSUFFICIENT_PRIVILEGES.contains(&code) => Error::NotAllowed { program, said },
            _ => Error::Failed { program, status, said },
        })
    }
}

/// Reads up to `most` bytes in a thread of its own: a program may fill either stream first.
fn reader(from: Option<impl Read + Send + 'static>, most: u64) -> io::Result<Receiver<io::Result<Vec<u8>>>> {
    let (sender, receiver) = channel();
    thread::Builder::new().name("answer".into()).spawn(move || {
        let mut bytes = Vec::new();
        let read = from.map_or(Ok(0), |from| from.take(most).read_to_end(&mut bytes));
        let _ = sender.send(read.map(|_| bytes));
    })?;
    Ok(receiver)
}

fn first_line(text: &str) -> Option<String> {
    text.lines().map(clean).find(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(script: &str) -> Running {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running { child: command.spawn().unwrap(), ended: false }
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let hangs = running("exec sleep 1000");
        let pid = hangs.child.id();
        let error = hangs.answer("crm_mon", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, Error::NotAnswering { .. }), "{error}");
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn what_a_program_says_is_read_from_both_streams() {
        let both = running("head -c 1000000 /dev/zero >&2; head -c 1000000 /dev/zero | tr '\\0' x");
        assert_eq!(both.answer("crm_mon", PATIENCE).unwrap().len(), 1_000_000);
    }
}
