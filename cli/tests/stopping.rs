//! Commands that a user stops: any of the signals that ask for it does, once is enough, and what was done by then
//! is kept.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A simulation that would take hours.
fn simulation(ignored: Option<libc::c_int>) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    command.args(["sim", "--vms", "2..6", "--seeds", "1..50000"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(signal) = ignored {
        // SAFETY: signal(2) may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::signal(signal, libc::SIG_IGN);
                Ok(())
            });
        }
    }
    command.spawn().unwrap()
}

/// Whether the process takes this signal by a handler of its own.
fn catches(child: &Child, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim();
    u64::from_str_radix(mask, 16).unwrap() & 1 << (signal.as_raw() - 1) != 0
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Waits until it can be stopped.
fn wait_until_it_listens(child: &mut Child, signal: Signal) {
    while !catches(child, signal) {
        assert_eq!(child.try_wait().unwrap(), None, "it has ended");
        std::thread::yield_now();
    }
}

fn end(mut child: Child) -> (ExitStatus, String, String) {
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        err.push_str(&line.unwrap());
    }
    (child.wait().unwrap(), out, err)
}

#[test]
fn any_signal_that_asks_for_it_stops_what_runs_and_a_second_one_costs_nothing() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        let mut child = simulation(None);
        wait_until_it_listens(&mut child, signal);
        send(&child, signal);
        send(&child, signal);
        let (status, out, err) = end(child);
        assert_eq!(status.code(), Some(130), "{signal:?}: {status}: {err}");
        assert!(out.contains("Ended early") && err.contains("stopped"), "{signal:?}: {out}{err}");
    }
}

#[test]
fn a_signal_that_is_ignored_from_the_start_stops_nothing() {
    let mut child = simulation(Some(libc::SIGHUP));
    wait_until_it_listens(&mut child, Signal::INT);
    assert!(!catches(&child, Signal::HUP));
    send(&child, Signal::HUP);
    send(&child, Signal::INT);
    assert_eq!(end(child).0.code(), Some(130));
}
