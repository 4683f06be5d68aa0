//! What a process inherits of signals.

use std::mem::MaybeUninit;
use std::ptr;

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
}
