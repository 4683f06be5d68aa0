//! How a command ends, and what is wrong with that.

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::Instant;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};

use crate::conditions::{Condition, Directory};
use crate::samples::Sample;
use crate::scene::{Fixture, Scene};
use crate::{PATIENCE, wait_for};

/// What any command may end with; 130 is kept for Ctrl-C, and `run` has more for what guests do.
const DOCUMENTED: [i32; 4] = [0, 1, 2, 3];

/// More lines than this on standard error are no sentences any more; help has as many as it needs.
const MOST_LINES: usize = 12;

/// Runs `sample` under `condition`.
///
/// # Errors
/// What is wrong with how it ended.
pub fn run(sample: &Sample, condition: &Condition, fixture: &Fixture) -> Result<(), String> {
    let (mut scene, mut command) = Scene::new(sample, fixture);
    let mut ends = condition.befall(&mut command, &mut scene);
    let mut child = command.spawn().map_err(|error| format!("it can't be started: {error}"))?;
    // What it was given is not open here as well.
    drop(command);
    let errors = child.stderr.take();
    let reading = thread::spawn(move || {
        let mut text = Vec::new();
        let _ = errors.map(|mut errors| errors.read_to_end(&mut text));
        String::from_utf8_lossy(&text).into_owned()
    });
    if sample.serves {
        ask_to_end(&mut child, *condition, &scene);
    }
    if condition.is_output_stalled() {
        wait_for("write that waits", || (has_ended(&mut child) || waits_to_write(&child)).then_some(()));
        ends.output = None;
    }
    let status = end(&mut child);
    let group = Pid::from_child(&child);
    let left = test_kill_process_group(group) != Err(Errno::SRCH);
    if left || status.is_err() {
        let _ = kill_process_group(group, Signal::KILL);
        let _ = child.wait();
    }
    drop(ends);
    let said = reading.join().unwrap();
    let status = status?;
    let told = |what: &str| Err(format!("{what} ({status}); it said:\n{said}"));
    if left {
        return told("it left a process behind");
    }
    if let Some(complaint) = judge(sample, *condition, status, &said) {
        return told(complaint);
    }
    remains(&scene, *condition).map_or(Ok(()), |found| told(&format!("it left {found} behind")))
}

fn judge(sample: &Sample, condition: Condition, status: ExitStatus, said: &str) -> Option<&'static str> {
    // What the standard library does where there is no heap, or no signal stack for a thread.
    let no_heap = condition.is_short_of_memory()
        && status.signal() == Some(libc::SIGABRT)
        && ["memory allocation of", "stack_overflow.rs"].iter().any(|words| said.contains(words));
    if said.contains("panicked at") && !no_heap {
        return Some("it panicked");
    }
    let Some(code) = status.code() else {
        // What ends at a signal by itself has none to catch it.
        let asked = sample.serves && matches!(status.signal(), Some(libc::SIGTERM | libc::SIGINT));
        return (!no_heap && !asked).then_some("a signal ended it");
    };
    if !DOCUMENTED.contains(&code) {
        return Some("no such exit code is documented");
    }
    if matches!(condition, Condition::Usual) && !sample.usual.contains(&code) {
        return Some("it ends so where nothing is wrong");
    }
    if !condition.is_heard() {
        return None;
    }
    if code != 0 && said.trim().is_empty() {
        return Some("it failed without a word");
    }
    let help = code == 2 && said.contains("Usage:");
    (!help && said.lines().count() > MOST_LINES).then_some("it said too much")
}

/// What is there and should not be.
fn remains(scene: &Scene, condition: Condition) -> Option<String> {
    let mut found = listed(&scene.temporary());
    let made_by_us = matches!(condition, Condition::Runtime(Directory::Long(_) | Directory::Missing));
    if !made_by_us {
        // Whom a lock belongs to can't be told once its file is gone.
        let kept = ["balancer", "balancer/lock"].map(|name| scene.own_runtime().join(name));
        let more = listed(&scene.own_runtime()).into_iter();
        found.extend(more.filter(|path| !kept.iter().any(|kept| kept == Path::new(path))));
    }
    let torn = |path: &String| {
        let path = Path::new(path);
        let empty = fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == 0);
        empty || path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
    };
    found.extend(listed(&scene.work()).into_iter().filter(torn));
    (!found.is_empty()).then(|| found.join(", "))
}

/// All below a directory, as paths.
fn listed(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        found.push(path.display().to_string());
        if path.is_dir() {
            found.extend(listed(&path));
        }
    }
    found
}

fn has_ended(child: &mut Child) -> bool {
    child.try_wait().unwrap().is_some()
}

fn end(child: &mut Child) -> Result<ExitStatus, String> {
    let deadline = Instant::now() + PATIENCE;
    while !has_ended(child) {
        if Instant::now() > deadline {
            return Err(format!("it has not ended within {PATIENCE:?}"));
        }
        thread::sleep(std::time::Duration::from_millis(2));
    }
    child.wait().map_err(|error| error.to_string())
}

/// Whether it waits in a write to standard output.
fn waits_to_write(child: &Child) -> bool {
    let call = fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap_or_default();
    call.starts_with(&format!("{} 0x1 ", libc::SYS_write))
}

/// Has a command that serves do some of it, and asks it to end.
fn ask_to_end(child: &mut Child, condition: Condition, scene: &Scene) {
    serves_on(child, 10);
    if matches!(condition, Condition::Runtime(Directory::Removed)) {
        fs::remove_dir_all(scene.runtime()).unwrap();
        serves_on(child, 20);
    }
    for (signal, number) in [(Signal::TERM, libc::SIGTERM), (Signal::INT, libc::SIGINT)] {
        if has_ended(child) {
            break;
        }
        kill_process(Pid::from_child(child), signal).unwrap();
        if !condition.ignores(number) {
            break;
        }
        serves_on(child, 10);
    }
}

/// Waits until it has been woken so many times more, or can't go on, or has ended.
fn serves_on(child: &mut Child, times: u64) {
    let woken = |child: &Child| -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let woken = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        woken.map_or(0, |woken| woken.trim().parse().unwrap())
    };
    let before = woken(child);
    let lives =
        |child: &mut Child| has_ended(child) || waits_to_write(child) || woken(child) >= before + times;
    wait_for("sign of life", || lives(child).then_some(()));
}
