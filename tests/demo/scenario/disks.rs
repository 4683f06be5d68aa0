//! Two stock guests on disks, and a budget that has no room for the page caches of both: one reads files and rests,
//! the other then needs memory for itself.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use api::units::Bytes;
use lab::DebianImage;

use super::{Children, end_daemon, size, start_daemon, start_guest, watch};
use crate::history::{Guest, History};
use crate::view::View;

/// Each guest starts with this, and keeps at least [`MIN`].
const STARTUP: Bytes = Bytes::mib(416);
const MIN: Bytes = Bytes::mib(256);
const MAX: Bytes = Bytes::mib(832);
/// What they may hold together.
const BUDGET: Bytes = Bytes::mib(900);

/// What reads files.
const FILES: &str = "files";
/// What needs memory afterwards.
const BUSY: &str = "busy";

/// What is read, and what is filled later.
const READ: Bytes = Bytes::mib(300);
const FILL: Bytes = Bytes::mib(380);
/// So much memory moves at least.
const MOVED: Bytes = Bytes::mib(100);

/// Where guests call for orders (`guest.py`).
const PORT: u32 = 5000;
const PROGRAM: &str = include_str!("guest.py");

/// How long all is left alone between two steps.
const REST: Duration = Duration::from_secs(20);
/// How long one step may take in an emulated host.
const STEP: Duration = Duration::from_secs(1200);
/// How long all may take.
const LIMIT: Duration = Duration::from_secs(5400);
/// How often to look whether a guest calls.
const LOOK: Duration = Duration::from_millis(200);

/// When something began or ended, since the first guest was started.
#[derive(Clone, Copy, Debug)]
struct Story {
    read: Bytes,
    filling: Duration,
    filled: Duration,
    released: Duration,
    /// Of each guest, in the order of [`History::guests`].
    oom_kills: [u64; 2],
}

/// Runs it all and tells what was seen; logs lie in `out`.
pub fn run(out: &Path, terminal: bool) -> Result<History> {
    let directory = tempfile::tempdir()?;
    let image = DebianImage::bookworm()?.disk();
    let user_data = directory.path().join("user-data");
    fs::write(&user_data, self::user_data())?;
    let daemon = start_daemon(out, BUDGET)?;
    let mut vms = Children(Vec::new());
    let mut calls = Vec::new();
    for name in [FILES, BUSY] {
        let socket = directory.path().join(format!("{name}.orders"));
        let listener = UnixListener::bind(&socket)?;
        listener.set_nonblocking(true)?;
        calls.push(listener);
        let disk = directory.path().join(format!("{name}.qcow2"));
        let created = Command::new(guests::ballast())
            .args(["disk", "create"])
            .arg(&disk)
            .arg("--backing")
            .arg(&image)
            .output()?;
        ensure!(
            created.status.success(),
            "no disk for guest {name}: {}",
            String::from_utf8_lossy(&created.stderr)
        );
        vms.0.push(start_guest(out, name, |command| {
            command.args(["--disk", &format!("{},backing=allow", disk.display())]);
            command.args(["--memory", &format!("{},min={},max={}", size(STARTUP), size(MIN), size(MAX))]);
            command.arg("--cloud-init").arg(&user_data);
            command.args(["--vsock-serve", &format!("{PORT}:{}", socket.display())]);
            // It has no network to wait for.
            command.args(["--append", "systemd.mask=systemd-networkd-wait-online.service"]);
        })?);
    }
    let guest = |name, gain| Guest { name, min: MIN, max: MAX, gain, exit: None, oom_kills: None };
    let mut history = History {
        budget: BUDGET,
        guests: vec![guest(FILES, Bytes::ZERO), guest(BUSY, MOVED)],
        samples: Vec::new(),
        settled: None,
    };
    println!("Two guests boot a stock Debian each. In an emulated host that takes some minutes.");
    let (has_failed, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let start = Instant::now();
    let story = thread::scope(|scope| {
        let story = scope.spawn(|| {
            let told = tell(&calls, start, &is_over);
            has_failed.store(told.is_err(), Ordering::Relaxed);
            told
        });
        let watched = watch(&mut history, &mut vms, &mut View::new(terminal), LIMIT, &has_failed);
        is_over.store(true, Ordering::Relaxed);
        if watched.is_err() {
            // Whoever waits for a guest's answer hears that there will be none.
            drop(Children(std::mem::take(&mut vms.0)));
        }
        let told = story.join().map_err(|_| anyhow!("the demo itself has failed"))?;
        watched.and(told)
    })?;
    for (guest, kills) in history.guests.iter_mut().zip(story.oom_kills) {
        guest.oom_kills = Some(kills);
    }
    end_daemon(daemon)?;
    say(&history, &story)?;
    Ok(history)
}

/// Has a guest's cloud-init start the program.
fn user_data() -> String {
    let mut text = "#cloud-config\nwrite_files:\n- path: /opt/guest.py\n  content: |\n".to_owned();
    for line in PROGRAM.lines() {
        text.push_str(&format!("    {line}\n"));
    }
    text.push_str("runcmd:\n- [systemd-run, --no-block, python3, /opt/guest.py]\n");
    text
}

/// The guest that calls at `listener`.
fn called(listener: &UnixListener, is_over: &AtomicBool) -> Result<BufReader<UnixStream>> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(STEP))?;
                return Ok(BufReader::new(stream));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        ensure!(!is_over.load(Ordering::Relaxed), "a guest has ended before it called");
        thread::sleep(LOOK);
    }
}

/// Has a guest do something, and waits until it is done.
fn order(guest: &mut BufReader<UnixStream>, word: &str, size: Bytes) -> Result<u64> {
    writeln!(guest.get_mut(), "{word} {}", size.0)?;
    let mut answer = String::new();
    guest.read_line(&mut answer).with_context(|| format!("a guest that was to {word}"))?;
    let result = answer.trim_end().strip_prefix(word).and_then(|rest| rest.trim().parse().ok());
    result.with_context(|| format!("a guest that was to {word} said {answer:?}"))
}

fn tell(calls: &[UnixListener], start: Instant, is_over: &AtomicBool) -> Result<Story> {
    let [files, busy] = calls else { return Err(anyhow!("two guests call")) };
    let mut files = called(files, is_over)?;
    let mut busy = called(busy, is_over)?;
    let read = Bytes(order(&mut files, "read", READ)?);
    thread::sleep(REST);
    let filling = start.elapsed();
    order(&mut busy, "fill", FILL)?;
    let filled = start.elapsed();
    thread::sleep(REST);
    let released = start.elapsed();
    order(&mut busy, "release", Bytes::ZERO)?;
    thread::sleep(REST);
    let oom_kills = [order(&mut files, "end", Bytes::ZERO)?, order(&mut busy, "end", Bytes::ZERO)?];
    Ok(Story { read, filling, filled, released, oom_kills })
}

/// Says who got what, and whether the cache of one made room for the other.
fn say(history: &History, story: &Story) -> Result<()> {
    let at = |guest: usize, time: Duration| {
        let before = history.samples.iter().take_while(|sample| sample.time <= time);
        before.filter_map(|sample| sample.guests[guest]).last().context("no guest answered in time")
    };
    let cache = |guest, time| at(guest, time).map(|sample| sample.cache.unwrap_or_default());
    let [before, after] = [story.filling, story.released];
    let (had, has) = (at(0, before)?.actual, at(0, after)?.actual);
    println!(
        "{FILES} read {} of files, and kept {} of them in its page cache, out of {had} of memory.",
        story.read,
        cache(0, before)?
    );
    println!(
        "{BUSY} then filled {FILL} in {:.0} s. It went from {} to {}.",
        (story.filled - story.filling).as_secs_f64(),
        at(1, before)?.actual,
        at(1, after)?.actual,
    );
    println!("For that {FILES} went from {had} to {has}, and its page cache to {}.", cache(0, after)?);
    ensure!(had.saturating_sub(has) >= MOVED, "{FILES} kept its page cache while {BUSY} waited for memory");
    Ok(())
}
