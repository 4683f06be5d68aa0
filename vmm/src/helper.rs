//! A process beside the VM's that does one thing for it, with less power than the VM has, and ends with it.

use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use devices::sandbox::{Argument, Call, SandboxNeeds};
use parking_lot::Mutex;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};

/// The process.
#[derive(Debug)]
pub struct Helper {
    pidfd: OwnedFd,
    pid: u32,
    /// How it ended, once that is known.
    ended: Mutex<Option<Option<i32>>>,
}

impl Helper {
    /// Starts `command`, which inherits the descriptor `kept` beside its standard ones and no other. It can gain no
    /// privileges, and a terminal's Ctrl-C does not reach it.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(command: &mut Command, kept: &OwnedFd) -> io::Result<(Self, Child)> {
        let kept = kept.as_raw_fd();
        let restrict = move || {
            let mut good = true;
            // SAFETY: system calls on numbers. Every descriptor but the standard ones goes with the new program.
            unsafe {
                let all = libc::c_uint::MAX;
                good &= libc::syscall(libc::SYS_close_range, 3, all, libc::CLOSE_RANGE_CLOEXEC) == 0;
                good &= libc::fcntl(kept, libc::F_SETFD, 0) == 0;
                good &= libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
                good &= libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0;
            }
            if good { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        // SAFETY: only system calls are made, and nothing is allocated.
        unsafe { command.pre_exec(restrict) };
        let child = command.env_clear().current_dir("/").process_group(0).spawn()?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok((Self { pidfd, pid: child.id(), ended: Mutex::new(None) }, child))
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has ended; where it has, it is reaped.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn has_ended(&self) -> io::Result<bool> {
        self.wait(WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
    }

    /// Ends and reaps it.
    pub fn end(&self) {
        if !matches!(self.has_ended(), Ok(false)) {
            return;
        }
        let killed = pidfd_send_signal(&self.pidfd, Signal::KILL);
        if let Err(error) =
            killed.map_err(io::Error::from).and_then(|()| self.wait(WaitIdOptions::EXITED).map(drop))
        {
            tracing::warn!("process {}, which helped this VM, can't be ended: {error}", self.pid);
        }
    }

    fn wait(&self, options: WaitIdOptions) -> io::Result<bool> {
        let mut ended = self.ended.lock();
        if ended.is_none()
            && let Some(status) = waitid(WaitId::PidFd(self.pidfd.as_fd()), options)?
        {
            *ended = Some(status.exit_status());
        }
        Ok(ended.is_some())
    }

    /// What [`has_ended`](Self::has_ended) and [`end`](Self::end) need of the sandbox.
    pub fn sandbox_needs(&self) -> SandboxNeeds {
        let value = u64::from(self.pidfd.as_raw_fd().unsigned_abs());
        let of = |number, index| Call { number, argument: Some(Argument { index, value }) };
        SandboxNeeds::calls(&[of(libc::SYS_pidfd_send_signal, 0), of(libc::SYS_waitid, 1)])
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.end();
    }
}

/// Bytes of what one says that are looked at.
const MOST_WORDS: usize = 2048;

/// What a helper wrote to its standard error. It is read when somebody wants to know; what finds no room until then
/// is lost, and keeps nobody waiting.
#[derive(Debug)]
pub struct Words(PipeReader);

impl Words {
    /// A place for words, and the end that becomes a helper's standard error.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new() -> io::Result<(Self, PipeWriter)> {
        let (said, errors) = io::pipe()?;
        for end in [said.as_fd(), errors.as_fd()] {
            fcntl_setfl(end, OFlags::NONBLOCK)?;
        }
        Ok((Self(said), errors))
    }

    /// What it said since the last call, on one line.
    pub fn take(&mut self) -> String {
        let mut bytes = vec![0; MOST_WORDS];
        let count = self.0.read(&mut bytes).unwrap_or(0);
        let text = String::from_utf8_lossy(bytes.get(..count).unwrap_or_default());
        // passt can't reach the system's log from where it has shut itself in, and says so each time.
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with("Failed to send "));
        let line = lines.collect::<Vec<_>>().join("; ").replace(char::is_control, " ");
        if line.is_empty() { "it said nothing".to_owned() } else { line }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::path::Path;
    use std::process::Stdio;

    use super::*;

    fn start(program: &str, arguments: &[&str]) -> (Helper, Child) {
        let kept = File::open("/dev/null").unwrap().into();
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        Helper::start(&mut command, &kept).unwrap()
    }

    #[test]
    fn it_ends_and_is_reaped() {
        let (helper, _) = start("/bin/sleep", &["600"]);
        let process = format!("/proc/{}", helper.pid());
        assert!(!helper.has_ended().unwrap());
        helper.end();
        assert!(helper.has_ended().unwrap());
        assert!(!Path::new(&process).exists());
        helper.end();
        let (helper, _) = start("/bin/sleep", &["600"]);
        let process = format!("/proc/{}", helper.pid());
        drop(helper);
        assert!(!Path::new(&process).exists());
    }

    #[test]
    fn it_gets_one_descriptor_and_gains_nothing() {
        // As one that another program left open to us.
        let file = File::open("/dev/zero").unwrap();
        // SAFETY: a new number for an open file, closed at the end of this process.
        let open = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, 50) };
        let (helper, mut child) =
            start("/bin/sh", &["-c", "ls -l /proc/$$/fd; grep NoNewPrivs /proc/$$/status; env"]);
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(open >= 50 && !said.contains("/dev/zero"), "{said}");
        // Standard input, and what it was given.
        assert_eq!(said.matches("/dev/null").count(), 2, "{said}");
        assert!(said.contains("NoNewPrivs:\t1") && !said.contains("PATH=/"), "{said}");
        drop(helper);
    }
}
