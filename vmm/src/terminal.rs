//! The user's terminal in raw mode, and back, whatever happens in between.

use std::io;
use std::mem::MaybeUninit;
use std::sync::{Once, OnceLock};

use vmm_sys_util::signal::register_signal_handler;

/// The settings before raw mode. A process has one terminal, and a signal handler
/// can find it only here.
static BEFORE: OnceLock<Before> = OnceLock::new();

struct Before {
    settings: libc::termios,
    /// This process's group.
    group: libc::pid_t,
}

/// What standard input is.
pub enum Terminal {
    /// No terminal.
    None,
    /// A terminal that is another job's.
    InBackground,
    /// A terminal that passes on every key.
    Raw(RawTerminal),
}

/// Standard input's terminal passes on every key while this lives.
pub struct RawTerminal(());

impl Terminal {
    /// Sets raw mode where standard input is a terminal and this process is in its foreground: from the
    /// background the shell's terminal would be changed, or this process stopped.
    ///
    /// # Errors
    /// When the terminal's settings can't be read or set.
    pub fn enter() -> io::Result<Self> {
        // SAFETY: the call takes a descriptor and nothing else.
        if unsafe { libc::isatty(libc::STDIN_FILENO) } != 1 {
            return Ok(Self::None);
        }
        // SAFETY: the call has no preconditions.
        let group = unsafe { libc::getpgrp() };
        if is_anothers(group) {
            return Ok(Self::InBackground);
        }
        let settings = settings()?;
        let before = BEFORE.get_or_init(|| Before { settings, group });
        restore_on_fatal_ends();
        let mut raw = before.settings;
        // SAFETY: `raw` is a whole termios, which the call changes in place.
        unsafe { libc::cfmakeraw(&mut raw) };
        // Lines that ballast itself writes still start at the left.
        raw.c_oflag |= libc::OPOST;
        apply(&raw)?;
        Ok(Self::Raw(RawTerminal(())))
    }
}

/// Whether another process group is in the foreground of the terminal. One that does not control
/// this session has none.
fn is_anothers(group: libc::pid_t) -> bool {
    // SAFETY: the call takes a descriptor and nothing else.
    let foreground = unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) };
    foreground != -1 && foreground != group
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn settings() -> io::Result<libc::termios> {
    let mut settings = MaybeUninit::uninit();
    // SAFETY: the call writes a whole termios where it succeeds.
    if unsafe { libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it has succeeded.
    Ok(unsafe { settings.assume_init() })
}

fn apply(settings: &libc::termios) -> io::Result<()> {
    // SAFETY: the call reads a whole termios.
    if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, settings) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives the terminal back, unless another job has it by now: its settings are not ours. May be called from a
/// signal handler: tcgetpgrp(3) and tcsetattr(3) are async-signal-safe, and reading a set `OnceLock`
/// is an atomic load.
fn restore() {
    if let Some(before) = BEFORE.get()
        && !is_anothers(before.group)
    {
        let _ = apply(&before.settings);
    }
}

/// A panic and the signals of a crash run no destructors.
fn restore_on_fatal_ends() {
    static SET_UP: Once = Once::new();
    SET_UP.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            hook(panic);
        }));
        for signal in [libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGSEGV] {
            // A signal that can't be handled leaves a raw terminal after a crash, no more.
            let _ = register_signal_handler(signal, crashed);
        }
    });
}

extern "C" fn crashed(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    // SAFETY: both calls are async-signal-safe; the signal then does what it does by default.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};
    use std::ptr::null_mut;

    use super::*;

    /// What the leader of a session ends with whose job was stopped.
    const STOPPED: i32 = 99;

    #[test]
    #[ignore = "the next test runs it, with a terminal"]
    fn job() {
        // SAFETY: the call takes a descriptor and nothing else.
        if unsafe { libc::isatty(libc::STDIN_FILENO) } != 1 {
            return eprintln!("SKIPPED: this test is run by another one");
        }
        assert!(matches!(Terminal::enter().expect("a terminal"), Terminal::InBackground));
    }

    /// `job &`, as an interactive shell starts it.
    #[test]
    fn a_job_in_the_background_is_not_stopped_and_leaves_the_terminal_alone() {
        let (mut master, mut user) = (-1, -1);
        // SAFETY: the call writes two descriptors, and reads nothing where it is given no address.
        let opened = unsafe { libc::openpty(&mut master, &mut user, null_mut(), null_mut(), null_mut()) };
        assert_eq!(opened, 0, "the host has terminals");
        // SAFETY: both are new and belong to nobody else.
        let (_master, user) = unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(user)) };
        let settings = || {
            let mut settings = MaybeUninit::<libc::termios>::uninit();
            // SAFETY: the call writes a whole termios where it succeeds.
            assert_eq!(unsafe { libc::tcgetattr(user.as_raw_fd(), settings.as_mut_ptr()) }, 0);
            // SAFETY: it has succeeded.
            unsafe { settings.assume_init() }.c_lflag
        };
        let before = settings();
        let mut job = Command::new(std::env::current_exe().expect("this test"));
        job.args(["--ignored", "--exact", "terminal::tests::job"]);
        job.stdin(Stdio::from(user.try_clone().expect("a descriptor"))).stdout(Stdio::null());
        // SAFETY: only calls that are async-signal-safe, between fork and exec.
        unsafe { job.pre_exec(lead_a_session) };
        let ended = job.status().expect("it can be run");
        assert_ne!(ended.code(), Some(STOPPED), "it was stopped");
        assert!(ended.success(), "{ended}");
        assert_eq!(settings(), before);
    }

    /// Goes on as a job in the background of a session with standard input for its terminal.
    fn lead_a_session() -> io::Result<()> {
        // SAFETY: the calls take numbers and one whole int. The leader does nothing but wait.
        unsafe {
            if libc::setsid() < 0 || libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            let job = libc::fork();
            if job == 0 {
                libc::setpgid(0, 0);
                return Ok(());
            }
            let mut status = 0;
            libc::waitpid(job, &mut status, libc::WUNTRACED);
            if libc::WIFSTOPPED(status) {
                libc::kill(job, libc::SIGKILL);
                libc::_exit(STOPPED);
            }
            libc::_exit(libc::WEXITSTATUS(status));
        }
    }
}
