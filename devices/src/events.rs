//! What an event loop serves, and how it learns that it can't go on.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{Error, EventManager, EventOps, Events, MutEventSubscriber, Result, SubscriberOps};

/// What an event loop serves. An error of either method ends the loop, and whoever runs it ends the VM:
/// a device that is served no more must not pass for one that has nothing to do.
pub trait Subscriber: Send {
    /// Starts what it needs beside the loop, before it is watched.
    ///
    /// # Errors
    /// There is no thread to be had.
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Has `ops` watch what the subscriber begins with.
    ///
    /// # Errors
    /// An event can't be watched.
    fn init(&mut self, ops: &mut EventOps) -> Result<()>;

    /// Serves what is ready.
    ///
    /// # Errors
    /// An event can't be watched that has to be from now on.
    fn process(&mut self, events: Events, ops: &mut EventOps) -> Result<()>;
}

/// An event loop and what it serves.
pub struct EventLoop {
    manager: EventManager<Served>,
    failure: Sender<Error>,
    failures: Receiver<Error>,
}

/// A subscriber as event-manager takes it, which knows no errors.
struct Served {
    subscriber: Arc<Mutex<dyn Subscriber>>,
    failure: Sender<Error>,
}

impl EventLoop {
    /// A loop that serves nobody yet and takes up to `capacity` events at a time.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new(capacity: usize) -> Result<Self> {
        let (failure, failures) = mpsc::channel();
        Ok(Self { manager: EventManager::new_with_capacity(capacity)?, failure, failures })
    }

    /// Serves `subscriber` too.
    ///
    /// # Errors
    /// As [`Subscriber::start`] and [`Subscriber::init`].
    pub fn add(&mut self, subscriber: Arc<Mutex<dyn Subscriber>>) -> io::Result<()> {
        lock(&subscriber).start()?;
        self.manager.add_subscriber(Served { subscriber, failure: self.failure.clone() });
        self.failure().map_err(io::Error::other)
    }

    /// Waits for events for so many milliseconds, for ever where they are negative, and has them served.
    /// Returns how many there were.
    ///
    /// # Errors
    /// As [`Subscriber::process`], or the kernel refuses to wait.
    pub fn run(&mut self, milliseconds: i32) -> Result<usize> {
        let count = self.manager.run_with_timeout(milliseconds)?;
        self.failure().map(|()| count)
    }

    fn failure(&self) -> Result<()> {
        self.failures.try_recv().map_or(Ok(()), Err)
    }
}

/// A panic ends the process, so no lock is ever left poisoned.
fn lock(subscriber: &Mutex<dyn Subscriber>) -> MutexGuard<'_, dyn Subscriber + 'static> {
    subscriber.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Served {
    fn ask(&self, ask: impl FnOnce(&mut dyn Subscriber) -> Result<()>) {
        if let Err(error) = ask(&mut *lock(&self.subscriber)) {
            // The loop that has the receiver is the one that asks.
            let _ = self.failure.send(error);
        }
    }
}

impl MutEventSubscriber for Served {
    fn init(&mut self, ops: &mut EventOps) {
        self.ask(|subscriber| subscriber.init(ops));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.ask(|subscriber| subscriber.process(events, ops));
    }
}
