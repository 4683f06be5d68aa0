//! The threads of a VM, and event loops on them.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use devices::events::{self, EventLoop};
use event_manager::{EventOps, EventSet, Events, Result as EventResult};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::exit::Exit;
use crate::vcpu_set::VcpuSet;

/// What an event loop can serve.
pub type Subscriber = Arc<Mutex<dyn events::Subscriber>>;

/// Events taken at a time.
const CAPACITY: usize = 16;

/// Address space for a thread's stack; only what is used becomes memory.
pub const STACK: usize = 256 << 10;

/// How long the end of a VM waits for an event loop: it ends at once, unless the host keeps it in a call.
const PATIENCE: Duration = Duration::from_secs(5);

/// Does `work` on a thread. Should it fail, the VM ends: no part of it runs without the others.
///
/// # Errors
/// When there is no thread to be had.
pub fn spawn(
    name: &str,
    vcpu_set: &Arc<VcpuSet>,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (owned, vcpu_set) = (name.to_owned(), Arc::clone(vcpu_set));
    Builder::new().name(name.to_owned()).stack_size(STACK).spawn(move || {
        if let Err(error) = work() {
            vcpu_set.end(Exit::Failed(format!("its thread `{owned}` can't go on: {error}")));
        }
    })
}

/// A thread that sleeps until one of its devices has something to do.
pub struct EventThread {
    name: String,
    stop: EventFd,
    /// Hangs up when the thread ends, however that comes.
    running: Receiver<()>,
}

impl EventThread {
    /// Starts a thread that serves `subscribers`. Should one of them fail, the VM ends.
    ///
    /// # Errors
    /// When there is no thread to be had, or an event of a subscriber can't be watched.
    pub fn start(name: &str, subscribers: Vec<Subscriber>, vcpu_set: &Arc<VcpuSet>) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mut events = EventLoop::new(CAPACITY).map_err(io::Error::other)?;
        let stopped = Arc::new(Mutex::new(Stop { fd: stop.try_clone()?, stopped: false }));
        for subscriber in subscribers.into_iter().chain([stopped.clone() as Subscriber]) {
            events.add(subscriber)?;
        }
        let (runs, running) = mpsc::channel();
        spawn(name, vcpu_set, move || {
            let _runs: mpsc::Sender<()> = runs;
            while !stopped.lock().is_ok_and(|stop| stop.stopped) {
                events.run(-1).map_err(io::Error::other)?;
            }
            Ok(())
        })?;
        Ok(Self { name: name.to_owned(), stop, running })
    }

    /// Ends the thread and waits for it, but not for ever: no device may keep a VM that has ended,
    /// and its memory, on the host. One that hangs ends with the process.
    pub fn stop(self) {
        self.stop_within(PATIENCE);
    }

    fn stop_within(self, patience: Duration) {
        // The one failure is a full counter, which stops it as well.
        let _ = self.stop.write(1);
        // A loop that failed has ended the VM.
        if self.running.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the thread `{}` hangs and is not waited for", self.name);
        }
    }
}

struct Stop {
    fd: EventFd,
    stopped: bool,
}

impl events::Subscriber for Stop {
    fn init(&mut self, ops: &mut EventOps) -> EventResult<()> {
        ops.add(Events::new(&self.fd, EventSet::IN))
    }

    fn process(&mut self, _: Events, _: &mut EventOps) -> EventResult<()> {
        self.stopped = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does `act` with what may be watched once `now` is written to.
    struct Acts<F> {
        now: EventFd,
        act: F,
    }

    impl<F: FnMut(&mut EventOps) -> EventResult<()> + Send> events::Subscriber for Acts<F> {
        fn init(&mut self, ops: &mut EventOps) -> EventResult<()> {
            ops.add(Events::new(&self.now, EventSet::IN))
        }

        fn process(&mut self, _: Events, ops: &mut EventOps) -> EventResult<()> {
            (self.act)(ops)
        }
    }

    fn vcpu_set() -> Arc<VcpuSet> {
        VcpuSet::new(1).expect("a signal")
    }

    fn event(count: u64) -> EventFd {
        let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        event.write(count).expect("it is empty");
        event
    }

    #[test]
    fn the_end_waits_for_no_device_that_hangs() {
        let (release, until) = mpsc::channel::<()>();
        let (begun, hangs) = mpsc::channel();
        let act = move |_: &mut EventOps| {
            let _ = begun.send(());
            let _ = until.recv();
            Ok(())
        };
        let device = Arc::new(Mutex::new(Acts { now: event(1), act }));
        let events = EventThread::start("test", vec![device], &vcpu_set()).expect("a thread");
        hangs.recv().expect("it is served");
        events.stop_within(Duration::from_millis(1));
        drop(release);
    }

    #[test]
    fn a_device_that_can_not_be_served_any_more_ends_the_vm() {
        let vcpu_set = vcpu_set();
        // No descriptor at all, as one that was closed.
        let act = |ops: &mut EventOps| ops.add(Events::new_raw(-1, EventSet::IN));
        let device = Arc::new(Mutex::new(Acts { now: event(1), act }));
        let events = EventThread::start("test", vec![device], &vcpu_set).expect("a thread");
        let exit = vcpu_set.wait_for_end();
        assert_eq!(exit.code(), crate::exit::FAILED);
        assert!(exit.to_string().contains("`test`"), "{exit}");
        events.stop();
    }

    #[test]
    fn a_device_that_can_not_be_served_at_all_is_told_before_the_vm_runs() {
        let vcpu_set = vcpu_set();
        let device = Arc::new(Mutex::new(Acts { now: event(0), act: |_: &mut EventOps| Ok(()) }));
        let twice: Vec<Subscriber> = vec![device.clone(), device];
        assert!(EventThread::start("test", twice, &vcpu_set).is_err(), "one descriptor is watched twice");
        assert!(!vcpu_set.has_ended());
    }
}
