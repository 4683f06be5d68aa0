//! Ctrl-C: what runs is stopped, what was measured is kept.

use std::sync::atomic::{AtomicBool, Ordering};

use api::signals::is_ignored;
use vmm_sys_util::signal::register_signal_handler;

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    STOP.store(true, Ordering::SeqCst);
}

/// A flag that SIGINT, SIGTERM and SIGHUP (a terminal that closes) set from now on, but for those that this
/// process was started to ignore.
pub fn flag() -> &'static AtomicBool {
    let taken = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP].into_iter().filter(|&signal| !is_ignored(signal));
    for signal in taken {
        // Fails only for signals that nobody may catch; these may be.
        let _ = register_signal_handler(signal, note);
    }
    &STOP
}
