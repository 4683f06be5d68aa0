//! A thread that sleeps until one of its devices has something to do.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::Builder;
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Whatever such a thread can serve.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Events taken at a time.
const CAPACITY: usize = 16;

/// Address space for the stack; only what is used becomes memory.
pub const STACK: usize = 256 << 10;

/// How long the end of a VM waits for such a thread: it ends at once, unless the host keeps it in a call.
const PATIENCE: Duration = Duration::from_secs(5);

/// A running event loop.
pub struct EventLoop {
    name: String,
    stop: EventFd,
    /// Hangs up when the thread ends, however that comes.
    running: Receiver<()>,
}

impl EventLoop {
    /// Starts a thread that serves `subscribers`.
    ///
    /// # Errors
    /// When there is no thread, or nothing to wait with, to be had.
    pub fn start(name: &str, subscribers: Vec<Subscriber>) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mut manager =
            EventManager::<Subscriber>::new_with_capacity(CAPACITY).map_err(io::Error::other)?;
        let stopped = Arc::new(Mutex::new(Stop { fd: stop.try_clone()?, stopped: false }));
        let (runs, running) = mpsc::channel();
        Builder::new().name(name.to_owned()).stack_size(STACK).spawn(move || {
            let _runs: mpsc::Sender<()> = runs;
            for subscriber in subscribers {
                manager.add_subscriber(subscriber);
            }
            manager.add_subscriber(stopped.clone());
            while !stopped.lock().is_ok_and(|stop| stop.stopped) {
                if let Err(error) = manager.run() {
                    tracing::error!("an event loop has ended: {error}");
                    return;
                }
            }
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
        // A loop that panicked has said so already.
        if self.running.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the thread `{}` hangs and is not waited for", self.name);
        }
    }
}

struct Stop {
    fd: EventFd,
    stopped: bool,
}

impl MutEventSubscriber for Stop {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.fd, EventSet::IN)) {
            tracing::error!("an event loop can't be stopped: {error}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.stopped = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hangs in its device until the sender goes.
    struct Hangs {
        now: EventFd,
        until: Receiver<()>,
        begun: mpsc::Sender<()>,
    }

    impl MutEventSubscriber for Hangs {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.now, EventSet::IN)).expect("a new descriptor");
        }

        fn process(&mut self, _: Events, _: &mut EventOps) {
            let _ = self.begun.send(());
            let _ = self.until.recv();
        }
    }

    #[test]
    fn the_end_waits_for_no_device_that_hangs() {
        let now = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let (release, until) = mpsc::channel();
        let (begun, hangs) = mpsc::channel();
        now.write(1).expect("it is empty");
        let device = Arc::new(Mutex::new(Hangs { now, until, begun }));
        let events = EventLoop::start("test", vec![device]).expect("a thread");
        hangs.recv().expect("it is served");
        events.stop_within(Duration::from_millis(1));
        drop(release);
    }
}
