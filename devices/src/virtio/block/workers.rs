//! Threads that wait for the host's disks, so that a device does not.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::disk::{ByteRange, Disk};
use super::request::Work;
use crate::virtio::queue::Chain;

/// Requests that are on their way to the host at once, each on a thread.
const THREADS: usize = 4;

/// Address space for a thread's stack; only what is used becomes memory.
const STACK: usize = 128 << 10;

/// A request that has been taken from its queue.
pub struct Job {
    queue: usize,
    chain: Chain,
    /// What is left to do.
    pub work: Work,
    /// What is written is made to last before it counts as written.
    pub write_through: bool,
    kind: Kind,
    bytes: u64,
}

impl Job {
    /// A request of a queue, with its buffers, which are to be given back.
    pub fn new(queue: usize, chain: Chain, work: Work, write_through: bool) -> Self {
        let (kind, bytes) = work.size();
        Self { queue, chain, work, write_through, kind, bytes }
    }

    /// Bytes that the request is about.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// It is over.
    pub fn finish(self, done: io::Result<()>) -> Finished {
        let Self { queue, chain, kind, bytes, .. } = self;
        Finished { queue, chain, kind, bytes, done }
    }

    /// The host says how many bytes it has read or written of what is left. None where there is more to do.
    pub fn advance(&mut self, transferred: io::Result<usize>) -> Option<io::Result<()>> {
        let (Work::Read(vectors, offset) | Work::Write(vectors, offset)) = &mut self.work else {
            return None;
        };
        match transferred {
            Ok(0) if self.kind == Kind::Read => Some(Err(io::ErrorKind::UnexpectedEof.into())),
            Ok(0) => Some(Err(io::ErrorKind::WriteZero.into())),
            Ok(bytes) => {
                vectors.advance(bytes);
                *offset = offset.saturating_add(bytes as u64);
                vectors.is_empty().then_some(Ok(()))
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

/// What a request was about, as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Make last.
    Flush,
    /// Discard, or write zeros.
    Clear,
}

impl Work {
    /// What it is about, and how many bytes.
    fn size(&self) -> (Kind, u64) {
        let bytes = |range: &ByteRange| range.end.saturating_sub(range.start);
        match self {
            Self::Read(vectors, _) => (Kind::Read, vectors.len() as u64),
            Self::Write(vectors, _) => (Kind::Write, vectors.len() as u64),
            Self::Flush => (Kind::Flush, 0),
            Self::Discard(range) | Self::WriteZeroes(range, _) => (Kind::Clear, bytes(range)),
        }
    }
}

/// A request that is over.
pub struct Finished {
    /// The queue.
    pub queue: usize,
    /// Its buffers.
    pub chain: Chain,
    /// What it was about.
    pub kind: Kind,
    /// Bytes of it.
    pub bytes: u64,
    /// How it ended.
    pub done: io::Result<()>,
}

/// A disk that is to grow.
pub struct Grown {
    /// To so many bytes.
    pub size: u64,
    /// Hears what came of it.
    pub done: Box<dyn FnOnce(io::Result<()>) + Send>,
}

/// A way to the threads for who is not the device.
#[derive(Clone)]
pub struct Entrance(Arc<Shared>);

impl Entrance {
    /// Has the disk grow.
    pub fn grow(&self, grown: Grown) {
        self.0.waiting.lock().growing.push(grown);
        self.0.more.notify_one();
    }
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
    growing: Vec<Grown>,
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

    /// A way in for who is not the device.
    pub fn entrance(&self) -> Entrance {
        Entrance(Arc::clone(&self.shared))
    }

    /// Hands over requests.
    pub fn submit(&self, jobs: &mut Vec<Job>) {
        let count = jobs.len();
        if count == 0 {
            return;
        }
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
        while let Some(task) = self.next() {
            let job = match task {
                Task::Job(job) => job,
                Task::Grow(Grown { size, done }) => {
                    done(disk.grow(size));
                    // The device tells the driver.
                    let _ = self.wake.write(1);
                    continue;
                }
            };
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

    fn next(&self) -> Option<Task> {
        let mut waiting = self.waiting.lock();
        loop {
            if waiting.closed {
                return None;
            }
            if let Some(grown) = waiting.growing.pop() {
                return Some(Task::Grow(grown));
            }
            match waiting.jobs.pop_front() {
                None => self.more.wait(&mut waiting),
                Some(job) => return Some(Task::Job(job)),
            }
        }
    }
}

enum Task {
    Job(Job),
    Grow(Grown),
}

fn run(disk: &dyn Disk, mut job: Job) -> Finished {
    let is_write = matches!(job.work, Work::Write(..) | Work::WriteZeroes(..));
    let done = match &mut job.work {
        Work::Read(vectors, offset) => disk.read(vectors, *offset),
        Work::Write(vectors, offset) => disk.write(vectors, *offset),
        Work::Flush => disk.flush(),
        Work::Discard(range) => disk.discard(range.clone()),
        Work::WriteZeroes(range, unmap) => disk.write_zeroes(range.clone(), *unmap),
    };
    let done = if is_write && job.write_through { done.and_then(|()| disk.flush()) } else { done };
    job.finish(done)
}
