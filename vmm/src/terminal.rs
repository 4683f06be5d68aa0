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
