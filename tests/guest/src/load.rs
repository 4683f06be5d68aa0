//! What a guest's memory does, in steps.
//!
//! ```text
//! rest:TIME                 nothing
//! grow:SIZE[:TIME]          takes SIZE more and touches it, spread over TIME
//! spike:SIZE[:TIME]         as grow; prints when tasks of the guest began to wait for memory
//! clock                     prints the guest's clock
//! kills                     prints how many processes the kernel has killed for lack of memory
//! hold:TIME[:PATTERN]       keeps touching all it holds: sequential (default) or random
//! release[:TIME]            gives all of it back, spread over TIME
//! file:SIZE                 writes a file of SIZE into memory (tmpfs)
//! remove                    removes that file
//! plugged                   prints in how many places there is memory that virtio_mem has added
//! show                      says where a page of this process is (see `show`)
//! keep:SIZE:SEED            takes SIZE and fills it with a pattern that it remembers
//! check                     looks whether all that is kept is as it was
//! forget                    gives back what is kept
//! hog                       has another process take memory until the kernel kills it
//! unbind:DRIVER             takes its device from a virtio driver, such as virtio_balloon
//! bind:DRIVER               gives it back
//! ```
//! SIZE is a number with K, M or G; TIME a number with ms or s.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::guest::oom_kills;
use crate::memory::Block;
use crate::show;

/// In what pieces memory is taken and given back; small against every guest.
const PIECE: usize = 1 << 20;
/// Where a `file` step writes.
const FILE: &str = "/tmp/file";
/// A guest has begun to wait for memory when its tasks have waited this long, in microseconds.
const ONSET_US: u64 = 1000;
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
    /// The same, and tells when the guest began to wait for memory.
    Spike(usize, Duration),
    /// Tells what time it is.
    Clock,
    /// Tells how many processes were killed for lack of memory.
    Kills,
    /// Touches what is held for this long.
    Hold(Duration, Pattern),
    /// Gives back all, spread over a time.
    Release(Duration),
    /// Writes a file of bytes.
    File(usize),
    /// Removes it.
    Remove,
    /// Says in how many places there is memory that virtio_mem has added.
    Plugged,
    /// Says where a page of this process is.
    Show,
    /// Takes bytes and fills them with the pattern of a seed.
    Keep(usize, u64),
    /// Verifies all patterns.
    Check,
    /// Gives back what has patterns.
    Forget,
    /// Runs the guest out of memory.
    Hog,
    /// Takes its device from a virtio driver.
    Unbind(Driver),
    /// Gives it back.
    Bind(Driver),
}

/// A virtio driver of which the guest has one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// `virtio_balloon`.
    Balloon,
    /// `virtio_mem`.
    Mem,
}

impl Driver {
    fn named(text: &str) -> Result<Self, String> {
        match text {
            "virtio_balloon" => Ok(Self::Balloon),
            "virtio_mem" => Ok(Self::Mem),
            _ => Err(format!("`{text}` is no driver: use virtio_balloon or virtio_mem")),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Balloon => "virtio_balloon",
            Self::Mem => "virtio_mem",
        }
    }

    /// The device's number (virtio 1.2, section 5), as sysfs writes it.
    const fn device_id(self) -> &'static str {
        match self {
            Self::Balloon => "0x0005",
            Self::Mem => "0x0018",
        }
    }
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
            ["spike", bytes] => Ok(Self::Spike(size(bytes)?, Duration::ZERO)),
            ["spike", bytes, time] => Ok(Self::Spike(size(bytes)?, duration(time)?)),
            ["clock"] => Ok(Self::Clock),
            ["kills"] => Ok(Self::Kills),
            ["hold", time] | ["hold", time, "sequential"] => {
                Ok(Self::Hold(duration(time)?, Pattern::Sequential))
            }
            ["hold", time, "random"] => Ok(Self::Hold(duration(time)?, Pattern::Random)),
            ["release"] => Ok(Self::Release(Duration::ZERO)),
            ["release", time] => Ok(Self::Release(duration(time)?)),
            ["file", bytes] => Ok(Self::File(size(bytes)?)),
            ["remove"] => Ok(Self::Remove),
            ["plugged"] => Ok(Self::Plugged),
            ["show"] => Ok(Self::Show),
            ["keep", bytes, seed] => {
                let seed = seed.parse().map_err(|_| format!("`{seed}` is no seed: use a number"))?;
                Ok(Self::Keep(size(bytes)?, seed))
            }
            ["check"] => Ok(Self::Check),
            ["forget"] => Ok(Self::Forget),
            ["hog"] => Ok(Self::Hog),
            ["unbind", driver] => Ok(Self::Unbind(Driver::named(driver)?)),
            ["bind", driver] => Ok(Self::Bind(Driver::named(driver)?)),
            _ => Err(format!(
                "`{text}` is no step: use rest:TIME, grow:SIZE[:TIME], spike:SIZE[:TIME], clock, \
                 hold:TIME[:sequential|random], release[:TIME], file:SIZE, remove, keep:SIZE:SEED, check, \
                 forget, hog, unbind:DRIVER, bind:DRIVER or show"
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

/// Resources of the name that virtio_mem gives what it adds. Linux keeps one with nothing plugged in
/// it where it could not take the memory block offline.
fn plugged() -> Result<usize, String> {
    let resources = fs::read_to_string("/proc/iomem").map_err(|error| format!("/proc/iomem: {error}"))?;
    Ok(resources.lines().filter(|line| line.ends_with("System RAM (virtio_mem)")).count())
}

/// The memory that a guest's load holds.
#[derive(Default)]
pub struct Load {
    blocks: Vec<Block>,
    /// With the seeds of their patterns.
    kept: Vec<(u64, Block)>,
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
            Step::Grow(bytes, time) => self.grow(bytes, time, || ())?,
            Step::Spike(bytes, time) => self.spike(bytes, time)?,
            Step::Clock => println!("CLOCK us={}", microseconds()),
            Step::Kills => println!("KILLS count={}", oom_kills()),
            Step::Hold(time, pattern) => self.hold(time, pattern),
            Step::Release(time) => self.release(time),
            Step::File(bytes) => write_file(bytes).map_err(|error| format!("{FILE}: {error}"))?,
            Step::Remove => fs::remove_file(FILE).map_err(|error| format!("{FILE}: {error}"))?,
            Step::Plugged => println!("PLUGGED places={}", plugged()?),
            Step::Show => show::show().map_err(|error| format!("no page can be shown: {error}"))?,
            Step::Keep(bytes, seed) => {
                let block =
                    Block::new(bytes).map_err(|error| format!("the kernel gave no memory: {error}"))?;
                self.kept.push((seed, block));
                if let Some((seed, block)) = self.kept.last_mut() {
                    block.fill(*seed);
                }
            }
            Step::Check => self.check()?,
            Step::Forget => self.kept.clear(),
            Step::Hog => hog()?,
            Step::Unbind(driver) => hand_over(driver, "unbind")?,
            Step::Bind(driver) => hand_over(driver, "bind")?,
        }
        Ok(())
    }

    /// Grows, and prints `SPIKE onset_us=T waited_us=T`: when the guest began to wait, and for how long it did.
    fn spike(&mut self, bytes: usize, time: Duration) -> Result<(), String> {
        let pressure = Pressure::open().map_err(|error| format!("/proc/pressure/memory: {error}"))?;
        let before = pressure.waited_us();
        let (mut onset, mut last) = (None, microseconds());
        self.grow(bytes, time, || {
            let now = microseconds();
            if onset.is_none() && pressure.waited_us() >= before + ONSET_US {
                onset = Some(last);
            }
            last = now;
        })?;
        let onset = onset.map_or_else(|| "none".to_owned(), |at| at.to_string());
        println!("SPIKE onset_us={onset} waited_us={}", pressure.waited_us() - before);
        Ok(())
    }

    fn grow(&mut self, bytes: usize, time: Duration, mut grown: impl FnMut()) -> Result<(), String> {
        let pieces = bytes.div_ceil(PIECE);
        let pace = Pace::new(time, pieces);
        for piece in 0..pieces {
            let mut block = Block::new(PIECE.min(bytes - piece * PIECE))
                .map_err(|error| format!("the kernel gave no memory: {error}"))?;
            block.touch_all();
            self.blocks.push(block);
            grown();
            pace.wait(piece + 1);
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        match self.kept.iter().find_map(|(seed, block)| Some((seed, block.first_changed(*seed)?))) {
            Some((seed, page)) => Err(format!("page {page} of what was kept with seed {seed} has changed")),
            None => Ok(()),
        }
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

/// The kernel's account of waiting for memory.
struct Pressure(File);

impl Pressure {
    fn open() -> std::io::Result<Self> {
        File::open("/proc/pressure/memory").map(Self)
    }

    /// `some avg10=0.00 avg60=0.00 avg300=0.00 total=N`, its N.
    fn waited_us(&self) -> u64 {
        let mut text = [0; 256];
        let length = self.0.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&text[..length]);
        text.split_whitespace().find_map(|word| word.strip_prefix("total=")?.parse().ok()).unwrap_or(0)
    }
}

/// The guest's clock.
fn microseconds() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// Has a process take memory until the kernel kills it, and it alone.
fn hog() -> Result<(), String> {
    let refused = |error: std::io::Error| format!("no process can be run out of memory: {error}");
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(refused)?;
    let mut child = Command::new("/init").args(["rest:200ms,grow:64G", "1", ""]).spawn().map_err(refused)?;
    let preferred = fs::write(format!("/proc/{}/oom_score_adj", child.id()), "1000").map_err(refused);
    let status = child.wait().map_err(refused)?;
    preferred?;
    if status.success() { Err("64 GiB were not too much".to_owned()) } else { Ok(()) }
}

/// Takes the one device of this kind from its driver, or gives it to it.
fn hand_over(driver: Driver, verb: &str) -> Result<(), String> {
    let sysfs = |error: std::io::Error| format!("/sys/bus/virtio: {error}");
    for device in fs::read_dir("/sys/bus/virtio/devices").map_err(sysfs)? {
        let device = device.map_err(sysfs)?;
        let id = fs::read_to_string(device.path().join("device")).map_err(sysfs)?;
        if id.trim() == driver.device_id() {
            let file = format!("/sys/bus/virtio/drivers/{}/{verb}", driver.name());
            let name = device.file_name();
            return fs::write(&file, name.to_string_lossy().as_bytes())
                .map_err(|error| format!("{file}: {error}"));
        }
    }
    Err(format!("the guest has no device for {}", driver.name()))
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
    fn what_is_kept_is_checked() {
        let mut load = Load::default();
        for step in Step::parse_all("keep:2M:7,keep:1M:8,check").unwrap() {
            load.run(&step).unwrap();
        }
        load.kept[1].1.touch(3);
        let error = load.run(&Step::Check).unwrap_err();
        assert!(error.contains("page 3 ") && error.contains("seed 8"), "{error}");
        load.run(&Step::Forget).unwrap();
        assert_eq!(load.run(&Step::Check), Ok(()));
        assert_eq!("unbind:virtio_mem".parse(), Ok(Step::Unbind(Driver::Mem)));
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
