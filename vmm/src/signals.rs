//! SIGTERM and its like: first the power button, then the plug.

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use api::signals::is_ignored;
use api::status::Pauser;
use devices::events::Subscriber;
use event_manager::{EventOps, EventSet, Events, Result as EventResult};

use crate::control::Control;

/// What ends a VM when someone sends it to the process.
const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Signals as events of the device loop.
pub struct Signals {
    fd: OwnedFd,
    control: Arc<Control>,
    asked: bool,
    senders: Senders,
}

/// Who has sent signals so far. A parent may hand on what others send to both, as a service manager does: that is one
/// wish, and not two.
struct Senders {
    /// The parent's process.
    parent: u32,
    from_parent: u32,
    from_others: u32,
}

impl Senders {
    /// Counts a signal, and says whether it is a new wish.
    fn count(&mut self, sender: u32) -> bool {
        let before = self.from_parent.max(self.from_others);
        let count = if sender == self.parent { &mut self.from_parent } else { &mut self.from_others };
        *count = count.saturating_add(1);
        *count > before
    }
}

impl Signals {
    /// Takes the signals away from their default effect, but for those that this process was started to
    /// ignore. To be called before other threads are started: they inherit it.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub fn take(control: &Arc<Control>) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset fills the whole set; the other calls read or change it in place.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            let mut set = set.assume_init();
            for signal in ENDING.into_iter().filter(|&signal| !is_ignored(signal)) {
                libc::sigaddset(&mut set, signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let senders = Senders { parent: std::os::unix::process::parent_id(), from_parent: 0, from_others: 0 };
        Ok(Self { fd, control: Arc::clone(control), asked: false, senders })
    }

    /// Takes one pending signal, if there is one. Says whether it is a new one.
    fn next(&mut self) -> Option<bool> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = mem::size_of_val(&info);
        // SAFETY: the buffer has the size given.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(read).is_ok_and(|read| read != size) || read < 0 {
            return None;
        }
        // SAFETY: the kernel has filled all of it.
        let sender = unsafe { info.assume_init() }.ssi_pid;
        Some(self.senders.count(sender))
    }
}

/// Says a line to the user, if there is someone to hear it. Safe in a signal handler.
///
/// A closed standard error must not end the VM, as `eprintln!` would; nor may one that nobody
/// reads keep this thread from the next signal, which a write to a full pipe would.
pub(crate) fn tell(line: &[u8]) {
    let mut errors = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one whole `pollfd`, as the call is told; with no time to wait it returns at once.
    let ready = unsafe { libc::poll(&mut errors, 1, 0) };
    if ready == 1 && errors.revents & libc::POLLOUT != 0 {
        // SAFETY: the buffer has the size given.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
    }
}

impl Subscriber for Signals {
    fn init(&mut self, ops: &mut EventOps) -> EventResult<()> {
        ops.add(Events::new(&self.fd, EventSet::IN))
    }

    fn process(&mut self, _: Events, _: &mut EventOps) -> EventResult<()> {
        while let Some(is_new) = self.next() {
            if !is_new {
                continue;
            }
            // A paused guest hears no button: whoever ends its VM wants it to run to its end. One that runs
            // refuses to be resumed, and is pressed all the same.
            if !self.asked {
                let _ = self.control.resume(Pauser::Operator);
            }
            if !self.asked && self.control.power_button().is_ok() {
                self.asked = true;
                tell(b"Pressed the guest's power button. A second signal stops the VM at once.\n");
            } else {
                // Only a VM that has ended already refuses.
                let _ = self.control.shutdown();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_parent_hands_on_is_not_heard_twice() {
        let heard = |senders: &[u32]| {
            let mut counted = Senders { parent: 7, from_parent: 0, from_others: 0 };
            senders.iter().filter(|sender| counted.count(**sender)).count()
        };
        assert_eq!(heard(&[7]), 1);
        assert_eq!(heard(&[1, 7]), 1);
        assert_eq!(heard(&[7, 1]), 1);
        assert_eq!(heard(&[1, 7, 1, 7]), 2);
        assert_eq!(heard(&[7, 7]), 2);
        assert_eq!(heard(&[0, 9]), 2);
    }

    #[test]
    fn what_the_parent_ignored_is_left_ignored() {
        let control = Arc::new(Control::new(
            "web".parse().expect("a name"),
            "1".parse().expect("a number of vCPUs"),
            "256M".parse().expect("limits"),
        ));
        // SAFETY: no handler is set.
        let before = unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let _signals = Signals::take(&control).expect("signals as events");
        let mut mask = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: nothing is changed of the mask, which fills `mask`; then it is only read.
        let blocked = [libc::SIGHUP, libc::SIGTERM].map(|signal| unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), mask.as_mut_ptr());
            libc::sigismember(mask.as_ptr(), signal)
        });
        // SAFETY: as it was.
        unsafe { libc::signal(libc::SIGHUP, before) };
        assert_eq!(blocked, [0, 1]);
    }
}
