//! Ctrl-C: what runs is stopped, what was measured is kept.

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::signal::register_signal_handler;

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    STOP.store(true, Ordering::SeqCst);
}

/// A flag that SIGINT, SIGTERM and SIGHUP (a terminal that closes) set from now on.
pub fn flag() -> &'static AtomicBool {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // Fails only for signals that nobody may catch; these may be.
        let _ = register_signal_handler(signal, note);
    }
    &STOP
}
