//! Sentences on standard error.

use std::fmt::Display;
use std::io::{self, Write};

/// Milliseconds that a sentence waits for a reader of standard error who has stopped reading.
const PATIENCE: libc::c_int = 5000;

/// Says a sentence on standard error.
///
/// Nobody may be there to hear it, least of all when a VM has run for long; that
/// must not end anything, as `eprintln!` would, nor keep anything from its end.
pub fn say(sentence: impl Display) {
    let mut errors = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one whole `pollfd`, as the call is told.
    if unsafe { libc::poll(&mut errors, 1, PATIENCE) } == 0 {
        return;
    }
    let _ = io::stderr().lock().write_all(format!("ballast: {sentence}\n").as_bytes());
}
