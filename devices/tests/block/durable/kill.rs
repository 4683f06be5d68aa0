//! A process that is killed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use devices::virtio::block::raw::{Cache, RawOptions};

use super::super::qcow2;
use super::super::room::{WRITABLE, raw, this_test};
use super::driver::Driver;
use super::history::{Event, History};
use super::{Chance, Files, KINDS, Kind, rounds};

/// What makes this program the process that is killed: its disk, its seed, and whether past the page cache.
const CHILD: &str = "BALLAST_KILLED_DISK";
const MOST_REQUESTS: u64 = 100_000;

/// Says what happens on its standard output until it is killed; a test only where another started it.
#[test]
fn the_one_that_is_killed() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let [disk, seed, cache, events] = what.split(' ').collect::<Vec<_>>()[..] else { panic!("{what}") };
    let cache = if cache == "direct" { Cache::Direct } else { Cache::Buffered };
    let opened = if disk.ends_with(".img") {
        raw(disk.as_ref(), RawOptions { cache, ..WRITABLE })
    } else {
        qcow2::open(disk.as_ref(), cache)
    };
    // What is written to a file stays when its writer is killed.
    let mut events = File::options().append(true).open(events).unwrap();
    Driver::new(opened).run(seed.parse().unwrap(), MOST_REQUESTS, |event| {
        let word = match event {
            Event::Asked(number) => (number as u32) << 1,
            Event::Answered(number) => (number as u32) << 1 | 1,
        };
        events.write_all(&word.to_le_bytes()).unwrap();
    });
}

/// Starts a process, kills it after some requests, and looks at what it left. Returns the flushes before.
fn round(kind: Kind, seed: u64) -> usize {
    let files = Files::new(kind);
    let mut chance = Chance(seed);
    let cache = if chance.below(2) == 0 { "direct" } else { "buffered" };
    let (disk, log) = (files.disk(), files.path("events"));
    File::create(&log).unwrap();
    let what = format!("{} {seed} {cache} {}", disk.display(), log.display());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([&this_test(module_path!(), "the_one_that_is_killed"), "--exact"])
        .env(CHILD, what)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let end = 4 * (60 + chance.below(360));
    while fs::metadata(&log).unwrap().len() < end {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if matches!(kind, Kind::Raw) {
        // The next process has it at once, and then nothing of the last one comes any more.
        drop(raw(&disk, WRITABLE));
    }
    let mut words = Vec::new();
    File::open(&log).unwrap().read_to_end(&mut words).unwrap();
    let events = words.as_chunks::<4>().0.iter().map(|word| {
        let word = u32::from_le_bytes(*word);
        let number = u64::from(word >> 1);
        if word & 1 == 0 { Event::Asked(number) } else { Event::Answered(number) }
    });
    History::new(seed, events).check(&files.contents(&disk))
}

fn kill(rounds: u64) {
    for kind in KINDS {
        let flushes: usize = (0..rounds).map(|seed| round(kind, seed)).sum();
        assert!(flushes > 0, "nothing was flushed in {kind:?}");
        println!("{kind:?}: killed {rounds} times after {flushes} flushes");
    }
}

#[test]
fn what_was_flushed_outlives_its_process() {
    kill(rounds(2));
}

#[test]
#[ignore = "a few minutes: 1,000 processes are killed"]
fn what_was_flushed_outlives_a_thousand_processes() {
    kill(rounds(167));
}
