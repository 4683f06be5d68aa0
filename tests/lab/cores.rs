//! Shares the machine's processors among emulators, over all processes that use the lab.
//!
//! An emulated processor keeps a real one busy, and waits grow without end
//! where there are more of the one than of the other.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::cache;

/// How often a process that waits for a processor looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Processors that belong to one emulator until this is dropped.
pub struct Cores {
    numbers: Vec<usize>,
    _locks: Vec<File>,
}

impl Cores {
    /// Waits until `count` processors are free, or all, where there are fewer than that.
    ///
    /// # Errors
    /// Where the lock files can't be made.
    pub fn take(count: usize) -> Result<Self> {
        let usable = sched_getaffinity(None).context("the usable processors are not known")?;
        let usable: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| usable.is_set(cpu)).collect();
        let count = count.min(usable.len());
        // Whoever waits for several keeps later ones from taking them one by one.
        let _turn = cache::lock("cores")?;
        loop {
            let mut cores = Self { numbers: Vec::new(), _locks: Vec::new() };
            for &number in &usable {
                let path = cache::directory("locks")?.join(format!("core-{number}"));
                let file = File::create(path)?;
                if cores.numbers.len() < count
                    && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
                {
                    cores.numbers.push(number);
                    cores._locks.push(file);
                }
            }
            if cores.numbers.len() == count {
                return Ok(cores);
            }
            drop(cores);
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// These processors as a set to run on.
    pub fn set(&self) -> CpuSet {
        let mut set = CpuSet::new();
        for &number in &self.numbers {
            set.set(number);
        }
        set
    }
}
