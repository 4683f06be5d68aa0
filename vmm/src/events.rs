//! A thread that sleeps until one of its devices has something to do.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Whatever such a thread can serve.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Events taken at a time.
const CAPACITY: usize = 16;

/// Address space for the stack; only what is used becomes memory.
pub const STACK: usize = 256 << 10;

/// A running event loop.
pub struct EventLoop {
    stop: EventFd,
    thread: JoinHandle<()>,
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
        let thread = Builder::new().name(name.to_owned()).stack_size(STACK).spawn(move || {
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
        Ok(Self { stop, thread })
    }

    /// Ends the thread and waits for it.
    pub fn stop(self) {
        // The one failure is a full counter, which stops it as well.
        let _ = self.stop.write(1);
        // A loop that panicked has said so already.
        let _ = self.thread.join();
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
