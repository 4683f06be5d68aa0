//! All vCPUs of one VM, stopped and started from outside.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use std::{io, ptr};

use kvm_ioctls::VcpuFd;
use parking_lot::{Condvar, Mutex};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::exit::Exit;

/// What all vCPUs shall do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Order {
    /// To stay out of the guest. While some are still inside they have time to come out `until` then;
    /// all have come out where it is `None`.
    Hold {
        until: Option<Instant>,
    },
    Run,
    End(Exit),
}

/// Where a vCPU's thread can be reached while it may be inside KVM_RUN.
pub(crate) struct Kick {
    immediate_exit: ptr::NonNull<AtomicU8>,
    thread: libc::pthread_t,
}

// SAFETY: the flag is an atomic inside the vCPU's mapping, which stays until the entry has been
// taken out of the set's list, under its lock; the thread outlives the entry for the same reason.
unsafe impl Send for Kick {}

/// Something to be done with a vCPU, on its own thread, while it is out of the guest.
pub(crate) type Visit = Box<dyn FnOnce(&VcpuFd) + Send>;

/// What belongs to one vCPU.
#[derive(Default)]
struct Place {
    kick: Option<Kick>,
    visits: VecDeque<Visit>,
    /// It is in the guest, or at a device on its behalf.
    inside: bool,
}

struct State {
    order: Order,
    places: Vec<Place>,
    /// Counts how often the vCPUs were let in after a hold, so that each can tell that it was held.
    resumes: u64,
    /// Why the last hold came to nothing.
    stuck: Option<Stuck>,
}

/// All vCPUs of one VM, as those see them who stop and start them. A VM ends here, once:
/// the first reason given is the one that counts.
pub struct VcpuSet {
    state: Mutex<State>,
    changed: Condvar,
    when_changed: OnceLock<Tell>,
}

/// Called with the lock held.
type Tell = Box<dyn Fn(Standing) + Send + Sync>;

/// How long a vCPU may take to come out of the guest. It comes at once, unless the host is very busy.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Visits to one vCPU that wait at a time. Another takes the place of the oldest.
const MOST_VISITS: usize = 16;

/// How the vCPUs stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// They may enter the guest.
    Running {
        /// Why they could not be held, where that was tried and nothing has happened since.
        stuck: Option<Stuck>,
    },
    /// They were called out, and some are not out yet.
    Holding,
    /// None is in the guest or at a device on its behalf.
    Held,
    /// The VM has ended.
    Ended,
}

/// The vCPU of this number could not be stopped, or not be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "vCPU {0} has not come out of the guest, or back from a device, in 5 s, and runs on: the host may be too busy; \
     try again"
)]
pub struct Stuck(pub u8);

/// Why a vCPU can't be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VisitError {
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
    /// A set of `cpus` vCPUs that hold until told to run.
    ///
    /// # Errors
    /// When the signal that calls vCPUs out of the guest can't be set up.
    pub fn new(cpus: u8) -> io::Result<Arc<Self>> {
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                order: Order::Hold { until: None },
                places: (0..cpus).map(|_| Place::default()).collect(),
                resumes: 0,
                stuck: None,
            }),
            changed: Condvar::new(),
            when_changed: OnceLock::new(),
        }))
    }

    /// Has `tell` called when a hold is complete or has come to nothing, and when the VM has ended: on
    /// any thread, and before anything else happens to the vCPUs. Only the first call counts.
    pub fn when_changed(&self, tell: impl Fn(Standing) + Send + Sync + 'static) {
        let _ = self.when_changed.set(Box::new(tell));
    }

    /// Lets the vCPUs enter the guest. An ended VM stays so.
    pub fn run(&self) {
        let mut state = self.state.lock();
        if let Order::Hold { .. } = state.order {
            self.let_in(&mut state);
        }
    }

    fn let_in(&self, state: &mut State) {
        state.order = Order::Run;
        state.resumes += 1;
        self.changed.notify_all();
    }

    /// Calls all vCPUs out of the guest. [`standing`](Self::standing) tells when they are: if one does not
    /// come within [`PATIENCE`], all run on.
    pub fn hold(&self) {
        self.hold_until(Instant::now() + PATIENCE);
    }

    fn hold_until(&self, until: Instant) {
        let mut state = self.state.lock();
        if state.order == Order::Run {
            (state.order, state.stuck) = (Order::Hold { until: Some(until) }, None);
            state.kick_all();
            self.settle(&mut state);
        }
    }

    /// How the vCPUs stand now.
    pub fn standing(&self) -> Standing {
        let mut state = self.state.lock();
        self.settle(&mut state);
        match state.order {
            Order::Run => Standing::Running { stuck: state.stuck },
            Order::Hold { until: Some(_) } => Standing::Holding,
            Order::Hold { until: None } => Standing::Held,
            Order::End(_) => Standing::Ended,
        }
    }

    /// Brings a hold to its end where all are out, or where time is over. Whoever looks does that.
    fn settle(&self, state: &mut State) {
        let Order::Hold { until: Some(until) } = state.order else { return };
        match (0..=u8::MAX).zip(&state.places).find(|(_, place)| place.inside) {
            None => {
                state.order = Order::Hold { until: None };
                self.tell(Standing::Held);
            }
            Some((index, _)) if until <= Instant::now() => {
                state.stuck = Some(Stuck(index));
                // Those that did stand still must be told so.
                self.let_in(state);
                self.tell(Standing::Running { stuck: state.stuck });
            }
            Some(_) => {}
        }
    }

    fn tell(&self, standing: Standing) {
        if let Some(tell) = self.when_changed.get() {
            tell(standing);
        }
    }

    /// Ends the VM, unless it has ended already. Returns at once.
    pub fn end(&self, exit: Exit) {
        let mut state = self.state.lock();
        if !matches!(state.order, Order::End(_)) {
            state.order = Order::End(exit);
            state.kick_all();
            for place in &mut state.places {
                place.visits.clear();
            }
            self.changed.notify_all();
            self.tell(Standing::Ended);
        }
    }

    /// Has `visit` done with a vCPU on that vCPU's own thread, between two entries into the guest. The other
    /// vCPUs run on, and a paused VM stays paused. It is dropped where the VM ends first, or where
    /// too many others wait for the same vCPU.
    ///
    /// # Errors
    /// [`VisitError`] says why nobody can look.
    pub(crate) fn visit(&self, index: u8, visit: Visit) -> Result<(), VisitError> {
        let mut state = self.state.lock();
        if matches!(state.order, Order::End(_)) {
            return Err(VisitError::Ended);
        }
        let place = state.places.get_mut(usize::from(index)).ok_or(VisitError::NoSuchVcpu(index))?;
        if place.visits.len() >= MOST_VISITS {
            place.visits.pop_front();
        }
        place.visits.push_back(visit);
        if let Some(kick) = &place.kick {
            kick.out();
        }
        self.changed.notify_all();
        Ok(())
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
            if let Some(place) = state.places.get_mut(usize::from(index)) {
                place.inside = false;
                if let Some(visit) = place.visits.pop_front() {
                    return Admission::Receive(visit);
                }
            }
            self.settle(&mut state);
            match state.order {
                Order::Run => {
                    if let Some(place) = state.places.get_mut(usize::from(index)) {
                        place.inside = true;
                    }
                    return Admission::Enter { resumes: state.resumes };
                }
                Order::End(_) => return Admission::Leave,
                Order::Hold { until: None } => self.changed.wait(&mut state),
                Order::Hold { until: Some(until) } => {
                    self.changed.wait_until(&mut state, until);
                }
            }
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
    use std::sync::mpsc;

    use super::*;

    /// A set of `cpus` vCPUs that are all inside.
    fn running(cpus: u8) -> Arc<VcpuSet> {
        let vcpu_set = VcpuSet::new(cpus).expect("a signal");
        vcpu_set.run();
        for index in 0..cpus {
            assert!(matches!(vcpu_set.admit(index), Admission::Enter { resumes: 1 }));
        }
        vcpu_set
    }

    /// What is told from now on.
    fn told(vcpu_set: &VcpuSet) -> mpsc::Receiver<Standing> {
        let (sender, receiver) = mpsc::channel();
        vcpu_set.when_changed(move |standing| {
            let _ = sender.send(standing);
        });
        receiver
    }

    #[test]
    fn the_first_end_counts() {
        let vcpu_set = running(1);
        let told = told(&vcpu_set);
        vcpu_set.end(Exit::Panicked);
        vcpu_set.end(Exit::Stopped);
        vcpu_set.run();
        vcpu_set.hold();
        assert_eq!((vcpu_set.wait_for_end(), vcpu_set.standing()), (Exit::Panicked, Standing::Ended));
        assert!(matches!(vcpu_set.admit(0), Admission::Leave));
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [Standing::Ended]);
    }

    #[test]
    fn a_hold_is_complete_when_nobody_is_inside_any_more() {
        let vcpu_set = running(2);
        let told = told(&vcpu_set);
        vcpu_set.hold();
        let vcpu = |index| {
            let vcpu_set = Arc::clone(&vcpu_set);
            std::thread::spawn(move || vcpu_set.admit(index))
        };
        let first = vcpu(0);
        assert_eq!(vcpu_set.standing(), Standing::Holding);
        let second = vcpu(1);
        assert_eq!(told.recv(), Ok(Standing::Held));
        assert_eq!(vcpu_set.standing(), Standing::Held);
        assert!(!first.is_finished() && !second.is_finished());
        vcpu_set.run();
        for vcpu in [first, second] {
            assert!(matches!(vcpu.join().expect("let in"), Admission::Enter { resumes: 2 }));
        }
    }

    /// The vCPUs that did stop have lost time like those of any other hold, and their guest must be told.
    #[test]
    fn a_hold_that_comes_to_nothing_lets_all_run_on_and_counts_as_one() {
        let vcpu_set = running(2);
        let told = told(&vcpu_set);
        vcpu_set.hold_until(Instant::now() + Duration::from_millis(20));
        // The one that waits looks at the time, should nobody else.
        assert!(matches!(vcpu_set.admit(0), Admission::Enter { resumes: 2 }));
        let stuck = Standing::Running { stuck: Some(Stuck(1)) };
        assert_eq!((told.try_recv(), vcpu_set.standing()), (Ok(stuck), stuck));

        // Nobody waits: whoever asks looks.
        assert!(matches!(vcpu_set.admit(1), Admission::Enter { resumes: 2 }));
        vcpu_set.hold_until(Instant::now());
        assert_eq!(vcpu_set.standing(), Standing::Running { stuck: Some(Stuck(0)) });
        vcpu_set.hold();
        assert_eq!(vcpu_set.standing(), Standing::Holding);
        vcpu_set.run();
        assert_eq!(vcpu_set.standing(), Standing::Running { stuck: None });
    }

    #[test]
    fn visits_end_with_the_vm_and_none_is_made_to_strangers() {
        let vcpu_set = running(1);
        let visit = || {
            let (sender, receiver) = mpsc::channel::<()>();
            (Box::new(move |_: &VcpuFd| drop(sender)) as Visit, receiver)
        };
        assert_eq!(vcpu_set.visit(1, visit().0), Err(VisitError::NoSuchVcpu(1)));
        let mut visitors = Vec::new();
        for _ in 0..=MOST_VISITS {
            let (visit, visitor) = visit();
            vcpu_set.visit(0, visit).expect("it is there");
            visitors.push(visitor);
        }
        let waits = |visitor: &mpsc::Receiver<()>| visitor.try_recv() == Err(mpsc::TryRecvError::Empty);
        assert_eq!(visitors.iter().map(waits).filter(|waits| *waits).count(), MOST_VISITS);
        assert!(matches!(vcpu_set.admit(0), Admission::Receive(_)));
        vcpu_set.end(Exit::Stopped);
        assert!(!visitors.iter().any(waits));
        assert_eq!(vcpu_set.visit(0, visit().0), Err(VisitError::Ended));
    }
}
