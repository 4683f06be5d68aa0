//! `ballast vsock` and `ballast console` between a guest and programs that do not take turns.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(30);

/// More than all buffers on the way have room for.
const MUCH: usize = 8 << 20;

/// A VM whose guest has `serve` behind each of its ports.
fn vm(directory: &Path, serve: fn(UnixStream)) {
    let listener = UnixListener::bind(directory.join("web.sock")).expect("a socket");
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
            let Some(request) = lines.find(|line| line.starts_with("GET ")) else { continue };
            // What follows it are headers; the command says nothing more before it has its answer.
            let _ = lines.find(String::is_empty);
            drop(lines);
            let answer =
                "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: ballast-vsock\r\n\r\n";
            assert!(request.contains("port=7"), "{request}");
            (&stream).write_all(answer.as_bytes()).expect("it listens");
            thread::spawn(move || serve(stream));
        }
    });
}

/// Gives all of it back, and reads no further before that is taken.
fn echo(stream: UnixStream) {
    let mut chunk = [0; 1 << 16];
    while let Ok(count @ 1..) = (&stream).read(&mut chunk) {
        if (&stream).write_all(&chunk[..count]).is_err() {
            return;
        }
    }
}

/// Reads nothing, and stays.
fn deaf(stream: UnixStream) {
    thread::sleep(PATIENCE);
    drop(stream);
}

/// Says a lot, and reads nothing.
fn flood(mut stream: UnixStream) {
    let _ = stream.write_all(&vec![b'x'; MUCH]);
    deaf(stream);
}

fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    command.args(["vsock", "web", "7"]).env("BALLAST_RUNTIME_DIR", directory).stderr(Stdio::null());
    command
}

fn wait(child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().expect("it is a child") {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    None
}

#[test]
fn a_guest_that_answers_before_it_has_read_all_is_heard() {
    let directory = tempfile::tempdir().expect("a directory");
    vm(directory.path(), echo);
    let bytes: Vec<u8> = (0..MUCH).map(|index| (index % 251) as u8).collect();
    let (input, output) = (directory.path().join("input"), directory.path().join("output"));
    std::fs::write(&input, &bytes).expect("written");
    let mut command = command(directory.path());
    command.stdin(File::open(&input).expect("there")).stdout(File::create(&output).expect("a file"));
    let mut child = command.spawn().expect("it runs");
    let status = wait(&mut child).expect("neither side waits for the other");
    assert!(status.success(), "{status}");
    assert!(std::fs::read(&output).expect("there") == bytes, "what came back is not what was sent");
}

/// Waits until no more is moved, sends SIGTERM, and expects the end.
fn stops(mut child: Child, moved: &str) {
    let io = || {
        let told = std::fs::read_to_string(format!("/proc/{}/io", child.id())).expect("it runs");
        let count = told.lines().find_map(|line| line.strip_prefix(moved)).expect("Linux counts it");
        count.trim().parse::<usize>().expect("a number")
    };
    let deadline = Instant::now() + PATIENCE;
    let mut last = 0;
    while last < 32 << 10 || io() != last {
        assert!(Instant::now() < deadline, "nothing stands still: {last}");
        last = io();
        thread::sleep(Duration::from_millis(200));
    }
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    assert!(wait(&mut child).is_some(), "a signal does not end it");
}

#[test]
fn a_guest_that_reads_nothing_keeps_nobody_from_stopping() {
    let directory = tempfile::tempdir().expect("a directory");
    vm(directory.path(), deaf);
    let mut command = command(directory.path());
    command.stdin(File::open("/dev/zero").expect("there")).stdout(Stdio::null());
    stops(command.spawn().expect("it runs"), "rchar:");
}

#[test]
fn a_reader_that_stands_still_keeps_nobody_from_stopping() {
    let directory = tempfile::tempdir().expect("a directory");
    vm(directory.path(), flood);
    let (read, write) = rustix::pipe::pipe().expect("a pipe");
    let mut command = command(directory.path());
    command.stdin(Stdio::null()).stdout(write);
    let child = command.spawn().expect("it runs");
    drop(command);
    stops(child, "wchar:");
    drop(read);
}
