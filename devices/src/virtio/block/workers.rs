//! Threads that wait for the host's disks, so that a device does not.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::disk::Disk;
use super::request::{Status, Work};
use crate::virtio::queue::Chain;

/// Requests that are on their way to the host at once, each on a thread.
const THREADS: usize = 4;

/// Address space for a thread's stack; only what is used becomes memory.
const STACK: usize = 128 << 10;

/// A request that has been taken from its queue.
pub struct Job {
    /// The queue.
    pub queue: usize,
    /// Its buffers, to be given back.
    pub chain: Chain,
    /// What to do.
    pub work: Work,
    /// What is written is made to last before it counts as written.
    pub write_through: bool,
}

/// A request that is over.
pub struct Finished {
    /// The queue.
    pub queue: usize,
    /// Its buffers.
    pub chain: Chain,
    /// How it ended.
    pub status: Status,
    /// Whether the host wrote into its buffers.
    pub filled: bool,
}

/// The threads of one disk, and what lies between them and the device.
pub struct Workers {
    disk: Arc<dyn Disk>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    waiting: Mutex<Waiting>,
    more: Condvar,
    finished: Mutex<Vec<Finished>>,
    any_finished: Condvar,
    /// Readable while something is finished and not taken.
    wake: EventFd,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl Workers {
    /// No threads yet.
    ///
    /// # Errors
    /// No eventfd can be had.
    pub fn new(disk: Arc<dyn Disk>) -> io::Result<Self> {
        let shared = Shared {
            waiting: Mutex::default(),
            more: Condvar::new(),
            finished: Mutex::default(),
            any_finished: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        };
        Ok(Self { disk, shared: Arc::new(shared), threads: Vec::new() })
    }

    /// Starts the threads. They end when this value goes, each after what it is working on.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(&mut self) -> io::Result<()> {
        for number in 0..THREADS {
            let (disk, shared) = (Arc::clone(&self.disk), Arc::clone(&self.shared));
            let thread = Builder::new().name(format!("disk-{number}")).stack_size(STACK);
            self.threads.push(thread.spawn(move || shared.work(&*disk))?);
        }
        Ok(())
    }

    /// Readable while something is finished and not taken.
    pub fn wake(&self) -> &EventFd {
        &self.shared.wake
    }

    /// Hands over requests.
    pub fn submit(&self, jobs: &mut Vec<Job>) {
        let count = jobs.len();
        self.shared.waiting.lock().jobs.extend(jobs.drain(..));
        for _ in 0..count.min(THREADS) {
            self.shared.more.notify_one();
        }
    }

    /// What is finished since the last call.
    pub fn take_finished(&self) -> Vec<Finished> {
        let mut finished = self.shared.finished.lock();
        let _ = self.shared.wake.read();
        std::mem::take(&mut *finished)
    }

    /// As [`take_finished`](Self::take_finished), and waits until there is something: something must be on
    /// its way.
    pub fn wait_finished(&self) -> Vec<Finished> {
        let mut finished = self.shared.finished.lock();
        while finished.is_empty() {
            self.shared.any_finished.wait(&mut finished);
        }
        let _ = self.shared.wake.read();
        std::mem::take(&mut *finished)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.waiting.lock().closed = true;
        self.shared.more.notify_all();
        // The disk is closed once nobody has it any more.
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self, disk: &dyn Disk) {
        while let Some(job) = self.next() {
            let finished = run(disk, job);
            let mut all = self.finished.lock();
            all.push(finished);
            if all.len() == 1 {
                // The one failure is a full counter, which is readable too.
                let _ = self.wake.write(1);
                self.any_finished.notify_one();
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let mut waiting = self.waiting.lock();
        loop {
            if waiting.closed {
                return None;
            }
            match waiting.jobs.pop_front() {
                None => self.more.wait(&mut waiting),
                job => return job,
            }
        }
    }
}

fn run(disk: &dyn Disk, job: Job) -> Finished {
    let Job { queue, chain, work, write_through } = job;
    let is_write = matches!(work, Work::Write(..) | Work::WriteZeroes(..));
    let filled = matches!(work, Work::Read(..));
    let done = match work {
        Work::Read(mut vectors, offset) => disk.read(&mut vectors, offset),
        Work::Write(mut vectors, offset) => disk.write(&mut vectors, offset),
        Work::Flush => disk.flush(),
        Work::Discard(range) => disk.discard(range),
        Work::WriteZeroes(range, unmap) => disk.write_zeroes(range, unmap),
    };
    let done = if is_write && write_through { done.and_then(|()| disk.flush()) } else { done };
    let status = match done {
        Ok(()) => Status::Ok,
        Err(error) => {
            // A guest may ask the same again at once: each of a log's readers has seen the first.
            tracing::debug!("a request to a disk failed: {error}");
            Status::IoError
        }
    };
    Finished { queue, chain, status, filled }
}
