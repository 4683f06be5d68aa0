//! Every command of `ballast` under conditions that others would die or hang of.
//!
//! `samples` has arguments for each command of the program's own tree, `conditions` what goes wrong; each of
//! one meets each of the other. However a command ends then, it does so by itself, with a documented code and
//! a sentence, and leaves nothing behind.

mod conditions;
mod judge;
mod log;
mod samples;
mod scene;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use conditions::{Condition, Directory, State};
use samples::{HELPERS, SAMPLES};
use scene::Fixture;

/// How long anything may take on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

const BALLAST: &str = env!("CARGO_BIN_EXE_ballast");

/// Commands at a time: most of them wait.
const AT_A_TIME: usize = 16;

/// Waits until `ready` gives something.
fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}");
        sleep(Duration::from_millis(5));
    }
}

fn ballast(arguments: &[&str]) -> Output {
    Command::new(BALLAST).args(arguments).output().unwrap()
}

/// Every sample under each of these.
fn all_under(conditions: &[Condition]) {
    let fixture = Fixture::new();
    let (next, complaints) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let (sample, condition) = (at % SAMPLES.len(), at / SAMPLES.len());
            let (Some(sample), Some(condition)) = (SAMPLES.get(sample), conditions.get(condition)) else {
                return;
            };
            if let Err(complaint) = judge::run(sample, condition, &fixture) {
                let told = format!("ballast {sample} under {condition:?}: {complaint}");
                complaints.lock().unwrap().push(told);
            }
        }
    };
    thread::scope(|scope| {
        (0..AT_A_TIME).for_each(|_| drop(scope.spawn(work)));
    });
    let complaints = complaints.into_inner().unwrap();
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

#[test]
fn every_command_has_a_sample() {
    let script = String::from_utf8(ballast(&["completions", "bash"]).stdout).unwrap();
    let labels = script.lines().filter_map(|line| line.trim().strip_suffix(')'));
    let commands: BTreeSet<String> = labels
        .filter_map(|label| label.strip_prefix("ballast__subcmd__"))
        .filter(|path| !path.contains(','))
        .map(|path| path.replace("__subcmd__", " "))
        .chain([String::new()])
        .collect();
    assert!(commands.contains("slat run") && commands.contains("slat vm"), "{commands:?}");
    // The script writes a `-` of a name as it writes the end of one.
    let sampled = SAMPLES.iter().map(|sample| sample.command).chain(HELPERS.iter().copied());
    let sampled = sampled.map(|command| command.replace('-', " ")).collect();
    assert_eq!(commands, sampled, "`samples.rs` needs arguments for each command, hidden ones too");
}

#[test]
fn where_nothing_is_wrong() {
    all_under(&[Condition::Usual]);
}

#[test]
fn with_streams_that_are_closed_or_full_or_stand_still() {
    let states = [State::Closed, State::Full, State::Stalled];
    let each = states.into_iter().flat_map(|state| (0..3).map(move |fd| Condition::Stream(fd, state)));
    all_under(&each.chain([Condition::NoStreams]).collect::<Vec<_>>());
}

#[test]
fn with_few_descriptors() {
    // From those that a process is born with to those that each command can do with.
    all_under(&(3..15).map(Condition::Descriptors).collect::<Vec<_>>());
}

#[test]
fn with_no_thread_nor_process_to_be_had() {
    all_under(&[Condition::NoThreads]);
}

#[test]
fn with_files_that_may_not_grow() {
    all_under(&[Condition::FileSize(0), Condition::FileSize(100)]);
}

#[test]
fn with_little_address_space() {
    let least = conditions::least_memory_mib();
    // The fourth has room for the stack of a thread, the fifth for that of another.
    all_under(&[1, 2, 4, 6, 10].map(|more| Condition::Memory(least + more)));
}

#[test]
fn with_signals_ignored() {
    all_under(&[
        Condition::Ignored(&[libc::SIGHUP, libc::SIGINT, libc::SIGPIPE, libc::SIGXFSZ]),
        Condition::Ignored(&[libc::SIGTERM]),
    ]);
}

#[test]
fn with_runtime_directories_that_are_of_no_use() {
    let directories = [
        Directory::Long(84),
        Directory::Long(107),
        Directory::Long(200),
        Directory::Long(5000),
        Directory::Missing,
        Directory::Unreadable,
        Directory::ReadOnly,
        Directory::AFile,
        Directory::Removed,
    ];
    all_under(&directories.map(Condition::Runtime));
}

#[test]
fn with_other_directories_gone() {
    all_under(&[Condition::NoWorkDirectory, Condition::NoTemporaryDirectory]);
}

#[test]
fn a_balancer_whose_address_is_taken_leaves_no_socket() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(BALLAST);
    command.args(["balancer", "--budget", "64M", "--beside-others"]);
    command.args(["--metrics", &taken.local_addr().unwrap().to_string()]);
    let output = command.env("BALLAST_RUNTIME_DIR", directory.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let socket: PathBuf = directory.path().join("balancer/balancer.sock");
    assert!(!socket.try_exists().unwrap(), "a socket was left behind");
}

/// It would wait for a reader at each of its words.
#[test]
fn work_whose_progress_nobody_reads_goes_on() {
    let words = "slat run --payload warm-touch --rounds 1 --passes 7";
    let mut command = Command::new(BALLAST);
    command.args(words.split(' ')).stdout(Stdio::null());
    let (read, write) = conditions::full_pipe();
    command.stderr(write);
    let mut child = command.spawn().unwrap();
    let status = wait_for("end of the measurement", || child.try_wait().unwrap());
    assert!(matches!(status.code(), Some(0 | 3)), "{status}");
    drop(read);
}
