//! What a guest's memory does, in steps.
//!
//! ```text
//! rest:TIME                 nothing
//! grow:SIZE[:TIME]          takes SIZE more and touches it, spread over TIME
//! hold:TIME[:PATTERN]       keeps touching all it holds: sequential (default) or random
//! release[:TIME]            gives all of it back, spread over TIME
//! file:SIZE                 writes a file of SIZE into memory (tmpfs)
//! remove                    removes that file
//! ```
//! SIZE is a number with K, M or G; TIME a number with ms or s.

use std::fs::{self, File};
use std::io::Write;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use crate::memory::Block;

/// In what pieces memory is taken and given back; small against every guest.
const PIECE: usize = 1 << 20;
/// Where a `file` step writes.
const FILE: &str = "/tmp/file";
/// How long a `hold` rests between two passes over its memory.
const BETWEEN_PASSES: Duration = Duration::from_millis(200);

/// In what order held memory is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Upwards.
    Sequential,
    /// Every page at a place drawn anew.
    Random,
}

/// One step of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing for this long.
    Rest(Duration),
    /// Takes bytes, spread over a time.
    Grow(usize, Duration),
    /// Touches what is held for this long.
    Hold(Duration, Pattern),
    /// Gives back all, spread over a time.
    Release(Duration),
    /// Writes a file of bytes.
    File(usize),
    /// Removes it.
    Remove,
}

impl Step {
    /// Reads steps with commas between them.
    pub fn parse_all(text: &str) -> Result<Vec<Self>, String> {
        text.split(',').filter(|step| !step.is_empty()).map(str::parse).collect()
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        match parts.as_slice() {
            ["rest", time] => Ok(Self::Rest(duration(time)?)),
            ["grow", bytes] => Ok(Self::Grow(size(bytes)?, Duration::ZERO)),
            ["grow", bytes, time] => Ok(Self::Grow(size(bytes)?, duration(time)?)),
            ["hold", time] | ["hold", time, "sequential"] => {
                Ok(Self::Hold(duration(time)?, Pattern::Sequential))
            }
            ["hold", time, "random"] => Ok(Self::Hold(duration(time)?, Pattern::Random)),
            ["release"] => Ok(Self::Release(Duration::ZERO)),
            ["release", time] => Ok(Self::Release(duration(time)?)),
            ["file", bytes] => Ok(Self::File(size(bytes)?)),
            ["remove"] => Ok(Self::Remove),
            _ => Err(format!(
                "`{text}` is no step: use rest:TIME, grow:SIZE[:TIME], hold:TIME[:sequential|random], \
                 release[:TIME], file:SIZE or remove"
            )),
        }
    }
}

fn size(text: &str) -> Result<usize, String> {
    let wrong = || format!("`{text}` is no size: use a number with K, M or G");
    let shift = match text.bytes().last() {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        _ => return Err(wrong()),
    };
    let number: usize = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time: use a number with ms or s");
    if let Some(number) = text.strip_suffix("ms") {
        return number.parse().map(Duration::from_millis).map_err(|_| wrong());
    }
    let number = text.strip_suffix('s').ok_or_else(wrong)?;
    number.parse().map(Duration::from_secs).map_err(|_| wrong())
}

/// The memory that a guest's load holds.
#[derive(Default)]
pub struct Load {
    blocks: Vec<Block>,
    /// The state of the generator behind [`Pattern::Random`].
    random: u64,
}

impl Load {
    /// Does one step and returns when it is done.
    ///
    /// # Errors
    /// A sentence, where the kernel refused memory or a file.
    pub fn run(&mut self, step: &Step) -> Result<(), String> {
        match *step {
            Step::Rest(time) => thread::sleep(time),
            Step::Grow(bytes, time) => self.grow(bytes, time)?,
            Step::Hold(time, pattern) => self.hold(time, pattern),
            Step::Release(time) => self.release(time),
            Step::File(bytes) => write_file(bytes).map_err(|error| format!("{FILE}: {error}"))?,
            Step::Remove => fs::remove_file(FILE).map_err(|error| format!("{FILE}: {error}"))?,
        }
        Ok(())
    }

    fn grow(&mut self, bytes: usize, time: Duration) -> Result<(), String> {
        let pieces = bytes.div_ceil(PIECE);
        let pace = Pace::new(time, pieces);
        for piece in 0..pieces {
            let mut block = Block::new(PIECE.min(bytes - piece * PIECE))
                .map_err(|error| format!("the kernel gave no memory: {error}"))?;
            block.touch_all();
            self.blocks.push(block);
            pace.wait(piece + 1);
        }
        Ok(())
    }

    fn hold(&mut self, time: Duration, pattern: Pattern) {
        let end = Instant::now() + time;
        loop {
            for index in 0..self.blocks.len() {
                if Instant::now() >= end {
                    return;
                }
                match pattern {
                    Pattern::Sequential => self.blocks[index].touch_all(),
                    Pattern::Random => {
                        for _ in 0..self.blocks[index].pages() {
                            let random = self.next_random();
                            let count = self.blocks.len();
                            self.blocks[random % count].touch(random / count);
                        }
                    }
                }
            }
            thread::sleep(BETWEEN_PASSES.min(end.saturating_duration_since(Instant::now())));
            if Instant::now() >= end {
                return;
            }
        }
    }

    fn release(&mut self, time: Duration) {
        let pieces = self.blocks.len();
        let pace = Pace::new(time, pieces);
        for piece in 0..pieces {
            self.blocks.pop();
            pace.wait(piece + 1);
        }
    }

    /// Knuth's 64-bit linear congruential generator: repeatable, and good enough to scatter touches.
    fn next_random(&mut self) -> usize {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as usize
    }
}

/// Spreads equal pieces of work over a time.
struct Pace {
    start: Instant,
    piece: Duration,
}

impl Pace {
    fn new(time: Duration, pieces: usize) -> Self {
        Self { start: Instant::now(), piece: time.checked_div(pieces as u32).unwrap_or_default() }
    }

    fn wait(&self, done: usize) {
        let due = self.start + self.piece.saturating_mul(done as u32);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

fn write_file(bytes: usize) -> std::io::Result<()> {
    let mut file = File::create(FILE)?;
    let piece = vec![0xa5; PIECE];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(PIECE);
        file.write_all(&piece[..part])?;
        left -= part;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read() {
        let steps =
            Step::parse_all("rest:500ms,grow:300M:5s,hold:2s:random,release,file:128M,remove").unwrap();
        assert_eq!(
            steps,
            [
                Step::Rest(Duration::from_millis(500)),
                Step::Grow(300 << 20, Duration::from_secs(5)),
                Step::Hold(Duration::from_secs(2), Pattern::Random),
                Step::Release(Duration::ZERO),
                Step::File(128 << 20),
                Step::Remove,
            ]
        );
    }

    #[test]
    fn wrong_steps_are_refused() {
        for text in ["grow", "grow:5", "grow:M", "hold:2", "hold:2s:up", "rest:-1s", "grow:99999999999G"] {
            assert!(Step::parse_all(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_load_takes_and_gives_back() {
        let mut load = Load::default();
        for step in Step::parse_all("grow:3M,hold:1ms:random,hold:1ms").unwrap() {
            load.run(&step).unwrap();
        }
        assert_eq!(load.blocks.len(), 3);
        load.run(&Step::Release(Duration::ZERO)).unwrap();
        assert!(load.blocks.is_empty());
    }
}
