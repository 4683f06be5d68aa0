//! Tells of system calls that the sandbox refuses: either the list lacks one that a VM makes, or the guest has
//! got hold of its VM's process. The call fails with `EPERM` as if nothing else had happened.

use std::fmt::Write;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::signals::tell;

/// A bit for each call that was told of, by its number.
static TOLD: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];

/// Has refused calls told of from now on.
///
/// # Errors
/// The kernel refuses the handler.
pub(super) fn tell_of() -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_refused;
    // SAFETY: all zeros is a valid sigaction, with an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler calls nothing that is not safe in a signal handler.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The kernel has not made the call, and goes on behind it with the registers that this leaves (seccomp(2):
/// `SECCOMP_RET_TRAP`).
extern "C" fn on_refused(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid context, which nobody else has.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // It holds the call's number still, and is where the result is looked for.
    let Some(rax) = registers.get_mut(libc::REG_RAX as usize) else { return };
    let number = std::mem::replace(rax, -i64::from(libc::EPERM));
    // Each is told of once: an intruder must not be able to fill a log.
    let (word, bit) = (number.unsigned_abs() as usize / 64, 1 << (number.unsigned_abs() % 64));
    if TOLD.get(word).is_some_and(|told| told.fetch_or(bit, Ordering::Relaxed) & bit == 0) {
        let mut line = Line { bytes: [0; 160], len: 0 };
        let _ = writeln!(
            line,
            "ballast: the sandbox refused system call {number}. A VM makes none such: its guest may have got hold of \
             its process."
        );
        tell(line.bytes.get(..line.len).unwrap_or_default());
    }
}

/// Text on the stack: the heap may be locked by the very code that the signal came upon.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for (place, byte) in self.bytes.iter_mut().skip(self.len).zip(text.bytes()) {
            *place = byte;
            self.len += 1;
        }
        Ok(())
    }
}
