//! Shares the machine's processors among emulators, over all processes that use the lab.
//!
//! An emulated processor keeps a real one busy, and waits grow without end
//! where there are more of the one than of the other.

use std::fs::File;
use std::thread;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity};

use crate::error::files;
use crate::{Error, cache, progress};

/// How often a process that waits for a processor looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Processors that belong to one emulator until this is dropped.
pub struct Cores(Vec<(usize, File)>);

impl Cores {
    /// Waits until `count` processors are free, or all, where there are fewer than that.
    ///
    /// # Errors
    /// Where the lock files can't be made, or `stopped` says that nobody waits any more.
    pub fn take(count: usize, stopped: impl Fn() -> bool) -> Result<Self, Error> {
        let usable = sched_getaffinity(None).map_err(|error| files("the usable processors")(error.into()))?;
        let usable: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| usable.is_set(cpu)).collect();
        let count = count.min(usable.len());
        // Whoever waits for several keeps later ones from taking them one by one.
        let mut turn = None;
        let mut step = None;
        loop {
            if turn.is_none() {
                turn = cache::try_lock("cores")?;
            }
            if turn.is_some() {
                let lock = |&cpu| Ok(cache::try_lock(&format!("core-{cpu}"))?.map(|lock| (cpu, lock)));
                let free = usable.iter().filter_map(|cpu| lock(cpu).transpose());
                let cores: Vec<_> = free.take(count).collect::<Result<_, Error>>()?;
                if cores.len() == count {
                    return Ok(Self(cores));
                }
            }
            if stopped() {
                return Err(Error::Stopped);
            }
            step.get_or_insert_with(|| progress::begin("waiting for a processor that no other emulator has"));
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// These processors as a set to run on.
    pub fn set(&self) -> CpuSet {
        let mut set = CpuSet::new();
        self.0.iter().for_each(|(cpu, _)| set.set(*cpu));
        set
    }
}
