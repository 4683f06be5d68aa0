//! The agent as a program: what it makes of its arguments, and of readers who have gone.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Runs the agent with `argument`, and nobody at the other end of its pipes; gives its exit code.
fn unheard(argument: &str) -> Option<i32> {
    let pipe = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let mut agent = Command::new(env!("CARGO_BIN_EXE_ballast-agent"));
    agent.arg(argument).stdout(pipe()).stderr(pipe()).status().unwrap().code()
}

#[test]
fn closed_pipes_end_nothing() {
    assert_eq!(unheard("--help"), Some(0));
    assert_eq!(unheard("--nonsense"), Some(2));
}

#[test]
fn an_argument_that_is_no_unicode_is_named_as_any_other() {
    let mut agent = Command::new(env!("CARGO_BIN_EXE_ballast-agent"));
    let output = agent.arg(OsStr::from_bytes(b"--\xff")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("is no option"), "{said}");
}

#[test]
fn a_log_that_takes_nothing_holds_nothing_up() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    // What a pipe holds (pipe(7)).
    writer.write_all(&[0; 64 << 10]).unwrap();
    let mut agent = Command::new(env!("CARGO_BIN_EXE_ballast-agent"));
    let mut agent = agent.arg("--nonsense").stderr(writer).spawn().unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = agent.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > Duration::from_secs(30) {
            agent.kill().unwrap();
            panic!("it waits for whoever reads its log");
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(2));
    drop(reader);
}
