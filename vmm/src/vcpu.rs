//! Running vCPUs: from each exit to the next entry, and stopping all of them from outside.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;
use std::{io, ptr};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::Buses;
use crate::exit::Exit;

/// What all vCPUs shall do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Order {
    Hold,
    Run,
    End(Exit),
}

/// Where a vCPU's thread can be reached while it may be inside KVM_RUN.
struct Kick {
    immediate_exit: ptr::NonNull<AtomicU8>,
    thread: libc::pthread_t,
}

// SAFETY: the flag is an atomic inside the vCPU's mapping, which stays until the entry has been
// taken out of the crew's list, under its lock; the thread outlives the entry for the same reason.
unsafe impl Send for Kick {}

/// Something to be done with a vCPU, on its own thread, while it is out of the guest.
type Visit = Box<dyn FnOnce(&VcpuFd) + Send>;

/// What belongs to one vCPU.
#[derive(Default)]
struct Place {
    kick: Option<Kick>,
    visit: Option<Visit>,
}

struct State {
    order: Order,
    /// vCPUs that may be in the guest or at a device on its behalf.
    inside: usize,
    places: Vec<Place>,
    /// Counts resumes, so that each vCPU can tell that it was held.
    resumes: u64,
}

/// All vCPUs of one VM, as those see them who stop and start them. A VM ends here, once:
/// the first reason given is the one that counts.
pub struct Crew {
    state: Mutex<State>,
    changed: Condvar,
}

/// How long a vCPU may take to come out of the guest: it comes at once, unless it is in
/// the middle of a write to a console that nobody reads.
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
enum Admission {
    /// Enter; `resumes` tells whether it was held since the last time.
    Enter {
        resumes: u64,
    },
    /// Let somebody look first, then ask again.
    Receive(Visit),
    Leave,
}

impl Crew {
    /// A crew of `cpus` vCPUs that hold until told to run.
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
        let mut state = self.lock();
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
        let mut state = self.lock();
        if state.order == Order::Run {
            state.order = Order::Hold;
            state.kick_all();
        }
        let inside = |state: &mut State| state.inside > 0 && state.order == Order::Hold;
        let (mut state, _) =
            self.changed.wait_timeout_while(state, PATIENCE, inside).unwrap_or_else(PoisonError::into_inner);
        if inside(&mut state) {
            state.order = Order::Run;
            self.changed.notify_all();
            return Err(Stuck);
        }
        Ok(())
    }

    /// Ends the VM, unless it has ended already. Returns at once.
    pub fn end(&self, exit: Exit) {
        let mut state = self.lock();
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
            let mut state = self.lock();
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
        matches!(self.lock().order, Order::End(_))
    }

    /// Waits until the VM ends.
    pub fn wait_for_end(&self) -> Exit {
        let mut state = self.lock();
        loop {
            if let Order::End(exit) = &state.order {
                return exit.clone();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn admit(&self, index: u8) -> Admission {
        let mut state = self.lock();
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
                Order::Hold => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn left(&self) {
        self.lock().inside -= 1;
        self.changed.notify_all();
    }

    fn set_kick(&self, index: u8, kick: Option<Kick>) {
        if let Some(place) = self.lock().places.get_mut(usize::from(index)) {
            place.kick = kick;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn kick_all(&self) {
        self.places.iter().filter_map(|place| place.kick.as_ref()).for_each(Kick::out);
    }
}

impl Kick {
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

/// One vCPU, on its thread.
pub struct Vcpu {
    /// As KVM knows it.
    pub fd: VcpuFd,
    /// Its number, which is its APIC's identifier.
    pub index: u8,
    /// What its port and memory accesses reach.
    pub buses: Arc<Buses>,
    /// Who stops it.
    pub crew: Arc<Crew>,
}

impl Vcpu {
    /// Runs until the VM ends.
    pub fn run(mut self) {
        let flag = ptr::NonNull::from(&mut self.fd.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        // SAFETY: the call has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        self.crew.set_kick(self.index, Some(Kick { immediate_exit: flag, thread }));
        let crew = Arc::clone(&self.crew);
        let mut last = 0;
        loop {
            let resumes = match crew.admit(self.index) {
                Admission::Enter { resumes } => resumes,
                Admission::Receive(visit) => {
                    visit(&self.fd);
                    continue;
                }
                Admission::Leave => break,
            };
            if last != 0 && resumes != last {
                // Tells the guest that it stood still, so that its watchdogs keep calm. A guest
                // without kvmclock can't be told, and that is the only error there is.
                let _ = self.fd.kvmclock_ctrl();
            }
            last = resumes;
            let ended = self.run_until_called(flag);
            crew.left();
            if let Some(exit) = ended {
                crew.end(exit);
            }
        }
        crew.set_kick(self.index, None);
    }

    /// From exit to entry, until someone calls this vCPU out or it can't go on.
    fn run_until_called(&mut self, immediate_exit: ptr::NonNull<AtomicU8>) -> Option<Exit> {
        let failed = |why: String| Some(Exit::VcpuFailed(why));
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => self.buses.read_port(port, data),
                Ok(VcpuExit::IoOut(port, data)) => self.buses.write_port(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => self.buses.read_memory(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.buses.write_memory(address, data),
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Shutdown) => return Some(Exit::TripleFault),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return failed(format!(
                        "the processor refused to enter vCPU {} (hardware reason {reason:#x}, host CPU {cpu}); the host's kernel log says more",
                        self.index
                    ));
                }
                Ok(VcpuExit::InternalError) => return failed(self.internal_error()),
                Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                    return failed(format!("the host has no memory for guest address {gpa:#x}"));
                }
                Ok(VcpuExit::SystemEvent(kind, _)) => return Some(system_event(kind)),
                Ok(other) => return failed(format!("vCPU {} left the guest with {other:?}", self.index)),
                Err(error) if error.errno() == libc::EINTR => {
                    // SAFETY: the flag lies in the mapping that `self.fd` holds.
                    unsafe { immediate_exit.as_ref() }.store(0, Ordering::SeqCst);
                    return None;
                }
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) if error.errno() == libc::EFAULT => {
                    return failed(format!(
                        "the host could not provide memory that vCPU {} touched (out of memory or huge pages, or memory that the guest has not plugged?)",
                        self.index
                    ));
                }
                Err(error) => return failed(format!("KVM_RUN of vCPU {} failed: {error}", self.index)),
            }
        }
    }

    /// KVM_EXIT_INTERNAL_ERROR in words; the numbers are KVM_INTERNAL_ERROR_* of linux/kvm.h.
    fn internal_error(&mut self) -> String {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        // SAFETY: for this exit reason KVM has filled in the `internal` part of the union,
        // which is plain numbers.
        let number = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let what = match number {
            1 => "it met an instruction that its emulator does not know".to_owned(),
            2 => "an exception came up while it delivered another".to_owned(),
            3 => "it could not deliver an interrupt or exception".to_owned(),
            4 => "the processor reported an exit that it does not know".to_owned(),
            other => format!("internal error {other}"),
        };
        format!("{what} (vCPU {}, at address {rip:#x})", self.index)
    }
}

/// KVM_SYSTEM_EVENT_* of linux/kvm.h.
fn system_event(kind: u32) -> Exit {
    match kind {
        1 => Exit::PoweredOff,
        2 => Exit::Reboot,
        3 => Exit::Panicked,
        other => Exit::VcpuFailed(format!("an unknown system event ({other})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts() {
        let crew = Crew::new(1).expect("a crew");
        crew.run();
        assert!(matches!(crew.admit(0), Admission::Enter { resumes: 1 }));
        crew.end(Exit::Panicked);
        crew.end(Exit::Stopped);
        crew.run();
        assert_eq!(crew.wait_for_end(), Exit::Panicked);
        assert!(matches!(crew.admit(0), Admission::Leave));
    }

    #[test]
    fn hold_waits_for_those_inside() {
        let crew = Crew::new(1).expect("a crew");
        crew.run();
        assert!(matches!(crew.admit(0), Admission::Enter { .. }));
        let holder = std::thread::spawn({
            let crew = Arc::clone(&crew);
            move || crew.hold()
        });
        while crew.lock().order != Order::Hold {
            std::thread::yield_now();
        }
        assert!(!holder.is_finished());
        crew.left();
        assert_eq!(holder.join().expect("held"), Ok(()));
        crew.run();
        assert!(matches!(crew.admit(0), Admission::Enter { resumes: 2 }));
    }

    #[test]
    fn visits_end_with_the_vm_and_none_is_made_to_strangers() {
        let crew = Crew::new(1).expect("a crew");
        assert_eq!(crew.visit(1, |_| ()), Err(VisitError::NoSuchVcpu(1)));
        let visitor = std::thread::spawn({
            let crew = Arc::clone(&crew);
            move || crew.visit(0, |_| ())
        });
        while crew.lock().places[0].visit.is_none() {
            std::thread::yield_now();
        }
        crew.end(Exit::Stopped);
        assert_eq!(visitor.join().expect("answered"), Err(VisitError::Ended));
        assert_eq!(crew.visit(0, |_| ()), Err(VisitError::Ended));
    }
}
