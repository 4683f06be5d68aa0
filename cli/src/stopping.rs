//! Work that a user may stop and that cleans up after itself.

use std::sync::atomic::{AtomicBool, Ordering};

use api::signals::is_ignored;

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn asked(_: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

/// A flag that Ctrl-C and the other signals which ask a process to end set, where they are not ignored.
pub fn by_signals() -> &'static AtomicBool {
    let asking = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
    for signal in asking.into_iter().filter(|&signal| !is_ignored(signal)) {
        let handler = asked as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the handler stores a flag, which a handler may.
        unsafe { libc::signal(signal, handler) };
    }
    &STOP
}
