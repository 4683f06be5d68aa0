//! A balancer whose log goes nowhere.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::{BALLAST, PATIENCE, wait_for};

/// A balancer of a test's own, which ends with it.
pub struct Daemon {
    directory: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    /// Starts `command`, which is to become a balancer, and waits until it serves.
    pub fn start(command: impl FnOnce(&Path) -> Command) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = command(directory.path());
        command.env("BALLAST_RUNTIME_DIR", directory.path()).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().unwrap();
        let mut daemon = Self { directory, child };
        wait_for("balancer", || {
            assert_eq!(daemon.child.try_wait().unwrap(), None, "the balancer has ended");
            UnixStream::connect(daemon.socket()).ok()
        });
        daemon
    }

    /// Where it looks for VMs.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn socket(&self) -> PathBuf {
        self.directory().join("balancer/balancer.sock")
    }

    /// Asks for its state: an answer shows that its event loop runs.
    fn answers(&self) -> bool {
        let ask = || {
            let mut stream = UnixStream::connect(self.socket())?;
            stream.set_read_timeout(Some(PATIENCE / 4))?;
            stream.write_all(b"GET /state HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            std::io::Result::Ok(answer)
        };
        ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    fn end(mut self) -> ExitStatus {
        self.signal("TERM");
        wait_for("end of the balancer", || self.child.try_wait().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn balancer(_: &Path) -> Command {
    let mut command = Command::new(BALLAST);
    command.args(["balancer", "--interval", "50ms", "--budget", "64M", "--beside-others"]);
    command
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let daemon = Daemon::start(|directory| {
        let mut command = balancer(directory);
        command.stderr(OpenOptions::new().write(true).open("/dev/full").unwrap());
        command
    });
    daemon.signal("HUP");
    assert!(daemon.answers());
    assert_eq!(daemon.end().code(), Some(0));
}

#[test]
fn a_log_that_nobody_reads_stops_nothing_and_says_what_is_missing() {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setpipe_size(&write, 4096).unwrap();
    let flags = rustix::fs::fcntl_getfl(&write).unwrap();
    let errors = write.try_clone().unwrap();
    let daemon = Daemon::start(|directory| {
        let mut command = balancer(directory);
        command.stderr(errors);
        command
    });
    for _ in 0..100 {
        daemon.signal("HUP");
        sleep(Duration::from_millis(5));
    }
    assert!(daemon.answers());
    assert_eq!(rustix::fs::fcntl_getfl(&write).unwrap(), flags, "others share the open file");
    drop(write);
    let mut log = fs::File::from(read);
    let mut full = vec![0; 4096];
    let length = log.read(&mut full).unwrap();
    assert!(length > 2048, "the pipe held {length} bytes");
    assert_eq!(daemon.end().code(), Some(0));
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("lines are missing here"), "{rest}");
    assert!(rest.contains("stopped"), "{rest}");
}

/// A socket is what a service manager's log is.
#[test]
fn a_log_socket_that_nobody_reads_stops_nothing() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(theirs.as_fd(), 4096).unwrap();
    let daemon = Daemon::start(|directory| {
        let mut command = balancer(directory);
        command.stderr(std::os::fd::OwnedFd::from(theirs));
        command
    });
    for _ in 0..100 {
        daemon.signal("HUP");
        sleep(Duration::from_millis(5));
    }
    assert!(daemon.answers());
    assert_eq!(daemon.end().code(), Some(0));
    drop(ours);
}

#[test]
fn signals_that_were_ignored_stay_ignored() {
    let daemon = Daemon::start(|_| {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "trap '' HUP INT; exec \"$0\" balancer --interval 50ms --budget 64M --beside-others",
            BALLAST,
        ]);
        command.stderr(Stdio::null());
        command
    });
    daemon.signal("INT");
    daemon.signal("HUP");
    sleep(Duration::from_millis(300));
    assert!(daemon.answers());
    let status = daemon.end();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
}
