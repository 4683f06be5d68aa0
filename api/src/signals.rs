//! What a process inherits of signals, and the flag by which one ends what it does.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

/// Signals that ask a process to end: Ctrl-C, Ctrl-\\, kill(1), and a terminal that closes.
const ASKING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGHUP];

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn asked(_: libc::c_int) {
    STOP.store(true, Ordering::SeqCst);
}

/// A flag that SIGINT, SIGQUIT, SIGTERM and SIGHUP set from now on, but for those that this process was started
/// to ignore.
///
/// It is for work that cleans up when it is stopped. Whoever works looks at the flag several times a second. A
/// second signal does no more than the first, as it would cut the cleaning up short. System calls go on
/// (`SA_RESTART`), so that a library without a thought of signals works too.
pub fn stop_flag() -> &'static AtomicBool {
    for signal in ASKING.into_iter().filter(|&signal| !is_ignored(signal)) {
        // SAFETY: all zeros is a valid action, with an empty mask.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = asked as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler stores a flag, which a handler may. It fails for no signal that may be caught.
        unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    }
    &STOP
}

/// Whether `signal` is ignored. At its start a process ignores what its parent did (nohup(1), a shell's
/// `trap '' HUP`), which wants it to go on.
pub fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: nothing is changed; where the call succeeds it has filled `action`.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_told_from_what_is_not() {
        // The Rust runtime ignores this one.
        assert!(is_ignored(libc::SIGPIPE));
        assert!(!is_ignored(libc::SIGURG));
        assert!(!is_ignored(-1));
    }

    #[test]
    fn each_signal_that_is_not_ignored_sets_the_flag_and_interrupts_nothing() {
        // SAFETY: no other test here has to do with this signal.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let stop = stop_flag();
        assert!(is_ignored(libc::SIGHUP));
        for signal in ASKING {
            // The second one, which ends nothing, comes while this thread waits for a byte.
            let (read, write) = std::io::pipe().unwrap();
            // SAFETY: it names the calling thread.
            let reader = unsafe { libc::pthread_self() };
            let sender = std::thread::spawn(move || {
                for _ in 0..2 {
                    // SAFETY: that thread waits for this one to end.
                    unsafe { libc::pthread_kill(reader, signal) };
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                std::io::Write::write_all(&mut &write, b"x").unwrap();
            });
            let mut byte = 0_u8;
            // Not by `Read`, some of whose methods begin anew by themselves.
            // SAFETY: there is room for one byte.
            let count =
                unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&read), (&raw mut byte).cast(), 1) };
            assert_eq!((count, byte), (1, b'x'), "{signal}");
            sender.join().unwrap();
            assert_eq!(stop.swap(false, Ordering::SeqCst), signal != libc::SIGHUP, "{signal}");
        }
    }
}
