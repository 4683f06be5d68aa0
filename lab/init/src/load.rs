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
//! random:COUNT              reads 64 bytes from /dev/hwrng so often: each is one request to the device
//! kernel                    says where the kernel lies (see `show`)
//! show                      says where a page of this process is (see `show`)
//! keep:SIZE:SEED            takes SIZE and fills it with a pattern that it remembers
//! check                     looks whether all that is kept is as it was
//! forget                    gives back what is kept
//! write-disk:DISK:SIZE:SEED fills the first SIZE of /dev/DISK with a pattern, and flushes it
//! read-disk:DISK:SIZE:SEED  looks whether it is there, past the guest's cache
//! discard-disk:DISK:SIZE    tells the disk that the first SIZE of it are not needed
//! install:PARTITION:OLD:NEW  has a kernel's files in the ext4 of /dev/PARTITION a second time, with another version
//! vsock-echo:PORT           says back what is said to this port of the guest, from now on
//! vsock-send:PORT:SIZE      sends SIZE to a port of the host, which says it back
//! capture:KERNEL:INITRD     has the kernel on /dev/KERNEL take over when this one crashes
//! hog                       has another process take memory until the kernel kills it
//! unbind:DRIVER             takes its device from a virtio driver, such as virtio_balloon
//! bind:DRIVER               gives it back
//! set:FILE:VALUE            writes a value into a file of the kernel's
//! run:COMMAND               has the shell do it, where there is one; what it says is on the console
//! get:FILE                  prints what is in such a file
//! ```
//! SIZE is a number with K, M or G; TIME a number with ms or s.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::capture;
use crate::disk;
use crate::guest::oom_kills;
use crate::memory::Block;
use crate::show;
use crate::vsock;

/// In what pieces memory is taken and given back; small against every guest.
const PIECE: usize = 1 << 20;
/// Where a `file` step writes.
const FILE: &str = "/tmp/file";
/// What Linux asks a device of random numbers for at a time (drivers/char/hw_random: a cache line).
const REQUEST: usize = 64;
/// A guest has begun to wait for memory when its tasks have waited this long, in microseconds.
const ONSET_US: u64 = 1000;
/// How long a `hold` rests between two passes over its memory.
const BETWEEN_PASSES: Duration = Duration::from_millis(200);

/// Virtio drivers of which a guest has one device each, with the device's number (virtio 1.2,
/// section 5) as sysfs writes it.
const DRIVERS: [(&str, &str); 4] = [
    ("virtio_balloon", "0x0005"),
    ("virtio_mem", "0x0018"),
    ("virtio_net", "0x0001"),
    ("virtiofs", "0x001a"),
];

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

fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("`{text}` is no number"))
}

fn block(bytes: usize) -> Result<Block, String> {
    Block::new(bytes).map_err(|error| format!("the kernel gave no memory: {error}"))
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time: use a number with ms or s");
    if let Some(number) = text.strip_suffix("ms") {
        return number.parse().map(Duration::from_millis).map_err(|_| wrong());
    }
    let number = text.strip_suffix('s').ok_or_else(wrong)?;
    number.parse().map(Duration::from_secs).map_err(|_| wrong())
}

fn shell(command: &str) -> Result<(), String> {
    let status =
        Command::new("/bin/sh").args(["-c", command]).env("PATH", "/bin").stdin(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`{command}` ended with {status}")),
        Err(error) => Err(format!("there is no shell: {error}")),
    }
}

fn ask_for_random(count: usize) -> io::Result<()> {
    let mut device = File::open("/dev/hwrng")?;
    (0..count).try_for_each(|_| device.read_exact(&mut [0; REQUEST]))
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
}

impl Load {
    /// Does steps with commas between them, and returns when they are done.
    ///
    /// # Errors
    /// A sentence, where one is none, or the kernel refused memory or a file.
    pub fn run_all(&mut self, steps: &str) -> Result<(), String> {
        steps.split(',').filter(|step| !step.is_empty()).try_for_each(|step| self.run(step))
    }

    /// Does one step and returns when it is done.
    ///
    /// # Errors
    /// As [`Load::run_all`].
    pub fn run(&mut self, step: &str) -> Result<(), String> {
        if let Some(command) = step.strip_prefix("run:") {
            return shell(command);
        }
        let file = |error: io::Error| format!("{FILE}: {error}");
        let parts: Vec<&str> = step.split(':').collect();
        match parts.as_slice() {
            ["rest", time] => thread::sleep(duration(time)?),
            ["grow", bytes] => self.grow(size(bytes)?, Duration::ZERO, || ())?,
            ["grow", bytes, time] => self.grow(size(bytes)?, duration(time)?, || ())?,
            ["spike", bytes] => self.spike(size(bytes)?, Duration::ZERO)?,
            ["spike", bytes, time] => self.spike(size(bytes)?, duration(time)?)?,
            ["clock"] => println!("CLOCK us={}", microseconds()),
            ["kills"] => println!("KILLS count={}", oom_kills()),
            ["hold", time] | ["hold", time, "sequential"] => self.hold(duration(time)?, Block::touch_all),
            ["hold", time, "random"] => {
                let mut random = 0;
                self.hold(duration(time)?, |block| block.touch_scattered(&mut random));
            }
            ["release"] => self.release(Duration::ZERO),
            ["release", time] => self.release(duration(time)?),
            ["file", bytes] => write_file(size(bytes)?).map_err(file)?,
            ["remove"] => fs::remove_file(FILE).map_err(file)?,
            ["set", file, value] => {
                fs::write(file, value).map_err(|error| format!("{file} can't be set to {value}: {error}"))?;
            }
            ["get", file] => {
                let value = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
                println!("GOT {file}={}", value.trim_end());
            }
            ["plugged"] => println!("PLUGGED places={}", plugged()?),
            ["random", count] => {
                ask_for_random(number(count)?).map_err(|error| format!("/dev/hwrng: {error}"))?
            }
            ["kernel"] => {
                println!("{}", show::kernel().map_err(|error| format!("no kernel is found: {error}"))?)
            }
            ["show"] => show::show().map_err(|error| format!("no page can be shown: {error}"))?,
            ["keep", bytes, seed] => {
                let (mut block, seed) = (block(size(bytes)?)?, number(seed)?);
                block.fill(seed);
                self.kept.push((seed, block));
            }
            ["check"] => self.check()?,
            ["forget"] => self.kept.clear(),
            ["write-disk", name, bytes, seed] => disk::write(name, size(bytes)?, number(seed)?)?,
            ["read-disk", name, bytes, seed] => disk::read(name, size(bytes)?, number(seed)?)?,
            ["discard-disk", name, bytes] => disk::discard(name, size(bytes)?)?,
            ["install", partition, old, new] => disk::install(partition, old, new)?,
            ["capture", kernel, initrd] => capture::load(kernel, initrd)?,
            ["hog"] => hog()?,
            ["vsock-echo", port] => vsock::echo(number(port)?)?,
            ["vsock-send", port, bytes] => vsock::send(number(port)?, size(bytes)?)?,
            ["unbind" | "bind", driver] => hand_over(driver, parts[0])?,
            _ => {
                return Err(format!(
                    "`{step}` is no step: use rest:TIME, grow:SIZE[:TIME], spike:SIZE[:TIME], clock, \
                     hold:TIME[:sequential|random], release[:TIME], file:SIZE, remove, keep:SIZE:SEED, check, \
                     forget, write-disk:DISK:SIZE:SEED, read-disk:DISK:SIZE:SEED, discard-disk:DISK:SIZE, \
                     install:PARTITION:OLD:NEW, capture:KERNEL:INITRD, hog, vsock-echo:PORT, vsock-send:PORT:SIZE, \
                     unbind:DRIVER, bind:DRIVER, random:COUNT, kernel or show"
                ));
            }
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
            let mut block = block(PIECE.min(bytes - piece * PIECE))?;
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

    fn hold(&mut self, time: Duration, mut touch: impl FnMut(&mut Block)) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            for block in self.blocks.iter_mut().take_while(|_| Instant::now() < end) {
                touch(block);
            }
            thread::sleep(BETWEEN_PASSES.min(end.saturating_duration_since(Instant::now())));
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
    fn open() -> io::Result<Self> {
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
    let refused = |error: io::Error| format!("no process can be run out of memory: {error}");
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(refused)?;
    let mut child = Command::new("/init").args(["rest:200ms,grow:64G", "1", ""]).spawn().map_err(refused)?;
    let preferred = fs::write(format!("/proc/{}/oom_score_adj", child.id()), "1000").map_err(refused);
    let status = child.wait().map_err(refused)?;
    preferred?;
    if status.success() { Err("64 GiB were not too much".to_owned()) } else { Ok(()) }
}

/// Takes the one device of this kind from its driver, or gives it to it.
fn hand_over(driver: &str, verb: &str) -> Result<(), String> {
    let sysfs = |error: io::Error| format!("/sys/bus/virtio: {error}");
    let known = DRIVERS.iter().find(|(name, _)| *name == driver);
    let (_, id) = known.ok_or_else(|| {
        format!("`{driver}` is no driver: use virtio_balloon, virtio_mem, virtio_net or virtiofs")
    })?;
    for device in fs::read_dir("/sys/bus/virtio/devices").map_err(sysfs)? {
        let device = device.map_err(sysfs)?;
        if fs::read_to_string(device.path().join("device")).map_err(sysfs)?.trim() == *id {
            let file = format!("/sys/bus/virtio/drivers/{driver}/{verb}");
            return fs::write(&file, device.file_name().to_string_lossy().as_bytes())
                .map_err(|error| format!("{file}: {error}"));
        }
    }
    Err(format!("the guest has no device for {driver}"))
}

fn write_file(bytes: usize) -> io::Result<()> {
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
    fn what_is_kept_is_checked() {
        let mut load = Load::default();
        assert_eq!(load.run_all("keep:2M:7,keep:1M:8,check"), Ok(()));
        load.kept[1].1.touch(3);
        let error = load.run("check").unwrap_err();
        assert!(error.contains("page 3 ") && error.contains("seed 8"), "{error}");
        assert_eq!(load.run_all("forget,check"), Ok(()));
    }

    #[test]
    fn wrong_steps_are_refused() {
        for text in [
            "jump",
            "grow",
            "grow:5",
            "grow:M",
            "hold:2",
            "hold:2s:up",
            "rest:-1s",
            "grow:99999999999G",
            "unbind:x",
            "keep:1M:x",
            "file:128M:1",
            "",
        ] {
            assert!(Load::default().run(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_load_takes_and_gives_back() {
        let mut load = Load::default();
        let start = Instant::now();
        assert_eq!(load.run_all("grow:3M:30ms,hold:10ms:random,hold:10ms,rest:10ms"), Ok(()));
        assert!(start.elapsed() >= Duration::from_millis(50), "{:?}", start.elapsed());
        assert_eq!(load.blocks.len(), 3);
        assert_eq!(load.run("release"), Ok(()));
        assert!(load.blocks.is_empty());
    }
}
