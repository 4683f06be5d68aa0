//! All vCPUs of one VM, stopped and started from outside.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{io, ptr};

use kvm_ioctls::VcpuFd;
use parking_lot::{Condvar, Mutex};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::exit::Exit;

/// What all vCPUs shall do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Order {
    Hold,
    Run,
    End(Exit),
}

/// Where a vCPU's thread can be reached while it may be inside KVM_RUN.
pub(crate) struct Kick {
    immediate_exit: ptr::NonNull<AtomicU8>,
    thread: libc::pthread_t,
}

// SAFETY: the flag is an atomic inside the vCPU's mapping, which stays until the entry has been
// taken out of the vcpu_set's list, under its lock; the thread outlives the entry for the same reason.
unsafe impl Send for Kick {}

/// Something to be done with a vCPU, on its own thread, while it is out of the guest.
pub(crate) type Visit = Box<dyn FnOnce(&VcpuFd) + Send>;

/// What belongs to one vCPU.
#[derive(Default)]
struct Place {
    kick: Option<Kick>,
    visit: Option<Visit>,
}

struct State {
    order: Order,
    /// vCPUs that may be in the guest or at a device on its behalf, but for the console.
    inside: usize,
    places: Vec<Place>,
    /// Counts resumes, so that each vCPU can tell that it was held.
    resumes: u64,
}

/// All vCPUs of one VM, as those see them who stop and start them. A VM ends here, once:
/// the first reason given is the one that counts.
pub struct VcpuSet {
    state: Mutex<State>,
    changed: Condvar,
}

/// How long a vCPU may take to come out of the guest: it comes at once. One in the middle of a write
/// to a console that nobody reads is out already, but can't be looked at.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A vCPU could not be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a vCPU hangs in a write to the console: read the console's output, then try again")]
pub struct Stuck;

/// Why a vCPU could not be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VisitError {
    /// It does not come out of the guest.
    #[error(transparent)]
    Stuck(#[from] Stuck),
    /// There is no vCPU of this number.
    #[error("this VM has no vCPU {0}: the first is 0")]
    NoSuchVcpu(u8),
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
}

/// What a vCPU that asked to enter the guest may do.
pub(crate) enum Admission {
    /// Enter; `resumes` tells whether it was held since the last time.
    Enter {
        resumes: u64,
    },
    /// Let somebody look first, then ask again.
    Receive(Visit),
    Leave,
}

impl VcpuSet {
    /// A vcpu_set of `cpus` vCPUs that hold until told to run.
    ///
    /// # Errors
    /// When the signal that calls vCPUs out of the guest can't be set up.
    pub fn new(cpus: u8) -> io::Result<Arc<Self>> {
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                order: Order::Hold,
                inside: 0,
                places: (0..cpus).map(|_| Place::default()).collect(),
                resumes: 0,
            }),
            changed: Condvar::new(),
        }))
    }

    /// Lets the vCPUs enter the guest. An ended VM stays so.
    pub fn run(&self) {
        let mut state = self.state.lock();
        if state.order == Order::Hold {
            state.order = Order::Run;
            state.resumes += 1;
            self.changed.notify_all();
        }
    }

    /// Calls all vCPUs out of the guest; returns when none is inside any more.
    ///
    /// # Errors
    /// [`Stuck`] when one does not come out within [`PATIENCE`]; all run on then.
    pub fn hold(&self) -> Result<(), Stuck> {
        let mut state = self.state.lock();
        if state.order == Order::Run {
            state.order = Order::Hold;
            state.kick_all();
        }
        let inside = |state: &mut State| state.inside > 0 && state.order == Order::Hold;
        self.changed.wait_while_for(&mut state, inside, PATIENCE);
        if inside(&mut state) {
            state.order = Order::Run;
            self.changed.notify_all();
            return Err(Stuck);
        }
        Ok(())
    }

    /// Ends the VM, unless it has ended already. Returns at once.
    pub fn end(&self, exit: Exit) {
        let mut state = self.state.lock();
        if !matches!(state.order, Order::End(_)) {
            state.order = Order::End(exit);
            state.kick_all();
            for place in &mut state.places {
                place.visit = None;
            }
            self.changed.notify_all();
        }
    }

    /// Does `look` with a vCPU on that vCPU's own thread, between two entries into the guest, and
    /// hands back what it found. The other vCPUs run on, and a paused VM stays paused.
    ///
    /// # Errors
    /// [`VisitError`] says why nobody could look.
    pub fn visit<T: Send + 'static>(
        &self,
        index: u8,
        look: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> Result<T, VisitError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        {
            let mut state = self.state.lock();
            if matches!(state.order, Order::End(_)) {
                return Err(VisitError::Ended);
            }
            let place = state.places.get_mut(usize::from(index)).ok_or(VisitError::NoSuchVcpu(index))?;
            // One that nobody received has given up, or will find its channel closed.
            place.visit = Some(Box::new(move |vcpu| {
                // Whoever asked may have given up by now.
                let _ = sender.send(look(vcpu));
            }));
            if let Some(kick) = &place.kick {
                kick.out();
            }
            self.changed.notify_all();
        }
        receiver
            .recv_timeout(PATIENCE)
            .map_err(|_| if self.has_ended() { VisitError::Ended } else { Stuck.into() })
    }

    /// Whether the VM has ended.
    pub fn has_ended(&self) -> bool {
        matches!(self.state.lock().order, Order::End(_))
    }

    /// Waits until the VM ends.
    pub fn wait_for_end(&self) -> Exit {
        let mut state = self.state.lock();
        loop {
            if let Order::End(exit) = &state.order {
                return exit.clone();
            }
            self.changed.wait(&mut state);
        }
    }

    /// Waits until the vCPU of this number has something to do.
    pub(crate) fn admit(&self, index: u8) -> Admission {
        let mut state = self.state.lock();
        loop {
            let place = state.places.get_mut(usize::from(index));
            if let Some(visit) = place.and_then(|place| place.visit.take()) {
                return Admission::Receive(visit);
            }
            match state.order {
                Order::Run => {
                    state.inside += 1;
                    return Admission::Enter { resumes: state.resumes };
                }
                Order::End(_) => return Admission::Leave,
                Order::Hold => self.changed.wait(&mut state),
            }
        }
    }

    /// One that was let in has come out.
    pub(crate) fn left(&self) {
        let mut state = self.state.lock();
        state.inside -= 1;
        // While all run nobody waits for that, and a guest comes here with each byte for its console.
        if state.order != Order::Run {
            self.changed.notify_all();
        }
    }

    /// How to call the vCPU of this number out from now on; `None` before its thread or mapping goes.
    pub(crate) fn set_kick(&self, index: u8, kick: Option<Kick>) {
        if let Some(place) = self.state.lock().places.get_mut(usize::from(index)) {
            place.kick = kick;
        }
    }
}

impl State {
    fn kick_all(&self) {
        self.places.iter().filter_map(|place| place.kick.as_ref()).for_each(Kick::out);
    }
}

impl Kick {
    /// Reaches the calling thread, by the flag of the vCPU that it runs.
    pub(crate) fn this_thread(immediate_exit: ptr::NonNull<AtomicU8>) -> Self {
        // SAFETY: the call has no preconditions.
        Self { immediate_exit, thread: unsafe { libc::pthread_self() } }
    }

    /// The flag makes the next KVM_RUN return at once, the signal the current one; what the vCPU
    /// shall do has been changed before, so one that clears its flag sees it.
    fn out(&self) {
        // SAFETY: see `Kick`: it is in its place, so the mapping and the thread are there.
        unsafe {
            self.immediate_exit.as_ref().store(1, Ordering::SeqCst);
            libc::pthread_kill(self.thread, SIGRTMIN());
        }
    }
}

/// Does nothing: that it was called is what ends KVM_RUN.
extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts() {
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        vcpu_set.run();
        assert!(matches!(vcpu_set.admit(0), Admission::Enter { resumes: 1 }));
        vcpu_set.end(Exit::Panicked);
        vcpu_set.end(Exit::Stopped);
        vcpu_set.run();
        assert_eq!(vcpu_set.wait_for_end(), Exit::Panicked);
        assert!(matches!(vcpu_set.admit(0), Admission::Leave));
    }

    #[test]
    fn hold_waits_for_those_inside() {
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        vcpu_set.run();
        assert!(matches!(vcpu_set.admit(0), Admission::Enter { .. }));
        let holder = std::thread::spawn({
            let vcpu_set = Arc::clone(&vcpu_set);
            move || vcpu_set.hold()
        });
        while vcpu_set.state.lock().order != Order::Hold {
            std::thread::yield_now();
        }
        assert!(!holder.is_finished());
        vcpu_set.left();
        assert_eq!(holder.join().expect("held"), Ok(()));
        vcpu_set.run();
        assert!(matches!(vcpu_set.admit(0), Admission::Enter { resumes: 2 }));
    }

    #[test]
    fn visits_end_with_the_vm_and_none_is_made_to_strangers() {
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        assert_eq!(vcpu_set.visit(1, |_| ()), Err(VisitError::NoSuchVcpu(1)));
        let visitor = std::thread::spawn({
            let vcpu_set = Arc::clone(&vcpu_set);
            move || vcpu_set.visit(0, |_| ())
        });
        while vcpu_set.state.lock().places[0].visit.is_none() {
            std::thread::yield_now();
        }
        vcpu_set.end(Exit::Stopped);
        assert_eq!(visitor.join().expect("answered"), Err(VisitError::Ended));
        assert_eq!(vcpu_set.visit(0, |_| ()), Err(VisitError::Ended));
    }
}
