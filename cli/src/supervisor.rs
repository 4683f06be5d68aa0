//! A VM that starts again where its guest reboots: a process that starts the VM's own, waits for its end, and starts
//! the next.
//!
//! A VM's process can't start over by itself: its sandbox leaves it no file to open and no program to run. The guest's
//! kernel is looked for anew each time.

use std::collections::VecDeque;
use std::env;
use std::io;
use std::mem::MaybeUninit;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::ptr;
use std::time::{Duration, Instant};

use api::signals::is_ignored;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use vmm::exit::Exit;

use crate::failure::Failure;
use crate::sentence;

/// What is handed on to the VM's process.
const HANDED_ON: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// A guest that reboots more often than this within [`PERIOD`] is left switched off: its kernel panics before it is up.
const MOST_REBOOTS: usize = 5;
const PERIOD: Duration = Duration::from_secs(60);

/// Runs VMs, one after the other, until one ends otherwise than by a reboot. `named` says whether the command line has
/// a name; without one all are called after this process.
///
/// # Errors
/// Where a VM's process can't be started.
pub fn run(named: bool) -> Result<ExitCode, Failure> {
    let failed = |error: io::Error| Failure::new(format!("the VM's process can't be started: {error}"));
    let signals = Signals::take().map_err(failed)?;
    let mut reboots = Reboots::default();
    loop {
        let mut child = command(named).spawn().map_err(failed)?;
        let (status, was_asked) = signals.wait(&mut child).map_err(failed)?;
        if status.code() != Some(Exit::Reboot.code().into()) || was_asked {
            return Ok(ExitCode::from(code(status)));
        }
        if !reboots.may_go_on(Instant::now()) {
            let why = format!(
                "The guest has rebooted more than {MOST_REBOOTS} times within {} seconds, and is not started again: \
                 look at its console.",
                PERIOD.as_secs()
            );
            sentence::befell("left-off", why);
            return Ok(ExitCode::from(Exit::Reboot.code()));
        }
        sentence::befell("starts-again", "The VM starts again.");
    }
}

/// What [`run`] started ends with it.
///
/// # Errors
/// The one that started this process has ended already.
pub fn end_with(supervisor: i32) -> Result<(), Failure> {
    let gone = || Failure::new("the process that started this VM has ended");
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Failure::new)?;
    Signals::give_back().map_err(Failure::new)?;
    (getppid() == Pid::from_raw(supervisor)).then_some(()).ok_or_else(gone)
}

fn command(named: bool) -> Command {
    let own = std::process::id().to_string();
    let mut command = Command::new("/proc/self/exe");
    command.args(env::args_os().skip(1)).args(["--supervisor", &own]);
    if !named {
        command.args(["--name", &format!("vm-{own}")]);
    }
    command
}

/// The code of a process, or the shell's for the signal that ended it.
fn code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;

    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(vmm::exit::FAILED)
}

/// When the guest rebooted, of late.
#[derive(Default)]
struct Reboots(VecDeque<Instant>);

impl Reboots {
    fn may_go_on(&mut self, now: Instant) -> bool {
        while self.0.front().is_some_and(|then| now.duration_since(*then) > PERIOD) {
            self.0.pop_front();
        }
        self.0.push_back(now);
        self.0.len() <= MOST_REBOOTS
    }
}

/// Signals that wait to be looked at.
struct Signals(libc::sigset_t);

impl Signals {
    /// Takes the signals away from their default effect, but for those that this process was started to ignore.
    fn take() -> io::Result<Self> {
        Self::mask(libc::SIG_BLOCK).map(Self)
    }

    /// Gives them their effect again, in a process that was started by one that has taken them.
    fn give_back() -> io::Result<()> {
        Self::mask(libc::SIG_UNBLOCK).map(|_| ())
    }

    fn mask(how: libc::c_int) -> io::Result<libc::sigset_t> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset fills the whole set; the other calls read or change it in place.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            let mut set = set.assume_init();
            libc::sigaddset(&raw mut set, libc::SIGCHLD);
            for signal in HANDED_ON.into_iter().filter(|&signal| !is_ignored(signal)) {
                libc::sigaddset(&raw mut set, signal);
            }
            match libc::pthread_sigmask(how, &raw const set, ptr::null_mut()) {
                0 => Ok(set),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    /// Waits for the end of `child`, and hands on what comes meanwhile. Says whether anything did.
    fn wait(&self, child: &mut Child) -> io::Result<(ExitStatus, bool)> {
        let mut was_asked = false;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok((status, was_asked));
            }
            let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
            // SAFETY: both are valid, and the call fills the second where it succeeds.
            let signal = unsafe { libc::sigwaitinfo(&raw const self.0, info.as_mut_ptr()) };
            if signal < 0 {
                continue;
            }
            // SAFETY: the call has succeeded.
            let info = unsafe { info.assume_init() };
            // A terminal's own go to the VM's process as well.
            let is_from_process = info.si_code <= 0;
            if signal != libc::SIGCHLD {
                was_asked = true;
                if is_from_process {
                    // SAFETY: numbers alone; the child has not been waited for, so the number is its own.
                    unsafe { libc::kill(child.id().cast_signed(), signal) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_does_nothing_but_reboot_is_given_up() {
        let mut reboots = Reboots::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!((0..5).all(|second| reboots.may_go_on(at(second))));
        assert!(!reboots.may_go_on(at(6)));
        let mut reboots = Reboots::default();
        assert!((0..100).all(|number| reboots.may_go_on(at(number * 15))));
    }
}
