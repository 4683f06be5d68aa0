//! Has requests done: by the kernel alone where it can, else by threads.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::disk::Disk;
use super::request::Work;
use super::ring::{NoRing, Ring};
use super::workers::{Entrance, Finished, Job, Workers};

/// What does the requests of one disk.
pub struct Engine {
    disk: Arc<dyn Disk>,
    workers: Workers,
    ring: Option<Ring>,
    /// Room for what the ring leaves to threads.
    rest: Vec<Job>,
}

impl Engine {
    /// For so many requests at once. With a ring, where the disk has a file for it and the host allows it.
    ///
    /// # Errors
    /// No eventfd can be had.
    pub fn new(disk: Arc<dyn Disk>, requests: u32) -> io::Result<Self> {
        let workers = Workers::new(Arc::clone(&disk))?;
        let ring = disk.file().map(|file| Ring::new(file, requests)).transpose();
        let ring = ring.unwrap_or_else(|why: NoRing| {
            tracing::debug!("threads do all of a disk's requests: {why}");
            None
        });
        Ok(Self { disk, workers, ring, rest: Vec::new() })
    }

    /// Leaves all to threads.
    pub fn on_threads(self) -> Self {
        Self { ring: None, ..self }
    }

    /// Whether the kernel does what it can by itself.
    pub fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// As [`Workers::start`].
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(&mut self) -> io::Result<()> {
        self.workers.start()
    }

    /// A way in for who is not the device.
    pub fn entrance(&self) -> Entrance {
        self.workers.entrance()
    }

    /// Readable while a thread has finished something that was not taken.
    pub fn threads_event(&self) -> RawFd {
        self.workers.wake().as_raw_fd()
    }

    /// Readable while the kernel has finished something that was not taken; none without a ring.
    pub fn ring_event(&self) -> Option<RawFd> {
        self.ring.as_ref().map(Ring::event)
    }

    /// Has requests done.
    pub fn submit(&mut self, jobs: &mut Vec<Job>) {
        let Some(ring) = &mut self.ring else { return self.workers.submit(jobs) };
        for job in jobs.drain(..) {
            let lane = match &job.work {
                // What is to last at once takes more than one step.
                Work::Write(..) if job.write_through => None,
                Work::Read(vectors, offset) | Work::Write(vectors, offset) => {
                    self.disk.lane(vectors, *offset)
                }
                _ => None,
            };
            match lane {
                None => self.rest.push(job),
                Some(lane) => self.rest.extend(ring.push(job, lane).err().map(|job| *job)),
            }
        }
        ring.enter(&mut self.rest);
        self.workers.submit(&mut self.rest);
    }

    /// What threads have finished since the last call.
    pub fn take_from_threads(&mut self) -> Vec<Finished> {
        self.workers.take_finished()
    }

    /// What the kernel has finished since the last call.
    pub fn take_from_ring(&mut self) -> Vec<Finished> {
        let mut finished = Vec::new();
        if let Some(ring) = &mut self.ring {
            ring.take(&mut finished, &mut self.rest);
            self.workers.submit(&mut self.rest);
        }
        finished
    }

    /// Waits until something goes on, and takes what is finished: something must be on its way.
    pub fn wait_finished(&mut self) -> Vec<Finished> {
        // A thread may wait for what the kernel has, and not the other way round.
        match &self.ring {
            Some(ring) if ring.in_flight() > 0 => {
                ring.wait();
                self.take_from_ring()
            }
            _ => self.workers.wait_finished(),
        }
    }
}
