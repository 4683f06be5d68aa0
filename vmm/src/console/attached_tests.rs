//! Clients at a console, between a guest, which these tests play, and the API, which they play too.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use devices::platform::serial::MOST_RECENT;

use super::tests::{LONG, Running, text, wait_for};
use super::*;

/// As the API attaches a client.
fn attach(console: &Running, mode: Mode) -> Result<UnixStream, AttachError> {
    let (here, there) = UnixStream::pair().expect("sockets");
    there.set_nonblocking(true).expect("a socket");
    here.set_read_timeout(Some(LONG)).expect("a socket");
    console.console.attachments.place(mode)?.serve(there, b"hello\n".to_vec(), Vec::new());
    Ok(here)
}

fn expect(client: &mut UnixStream, expected: &[u8]) {
    let mut read = vec![0; expected.len()];
    client.read_exact(&mut read).expect("it comes");
    assert_eq!(read.escape_ascii().to_string(), expected.escape_ascii().to_string());
}

fn expect_place(console: &Running, mode: Mode) {
    wait_for("a free place", || console.console.attachments.place(mode).is_ok());
}

#[test]
fn whoever_comes_sees_the_last_output_and_then_the_next() {
    let console = Running::open(&config::Console::None);
    console.say(b"booted\nlogin: ");
    let mut first = attach(&console, Mode::Watch).expect("a place");
    expect(&mut first, b"hello\nbooted\nlogin: ");
    console.say(b"root\n");
    let mut second = attach(&console, Mode::Write).expect("a place");
    expect(&mut first, b"root\n");
    expect(&mut second, b"hello\nbooted\nlogin: root\n");
    console.devices.stop();
}

#[test]
fn a_long_history_begins_with_a_line() {
    let console = Running::open(&config::Console::None);
    for line in 0..2 * MOST_RECENT / 8 {
        console.say(format!("{line:07}\n").as_bytes());
    }
    let client = attach(&console, Mode::Watch).expect("a place");
    let mut lines = BufReader::new(client).lines().map(|line| line.expect("it comes"));
    assert_eq!(lines.next().as_deref(), Some("hello"));
    let first: usize = lines.next().expect("a line").parse().expect("a whole line");
    for line in first + 1..2 * MOST_RECENT / 8 {
        assert_eq!(lines.next(), Some(format!("{line:07}")));
    }
    assert!(2 * MOST_RECENT / 8 - first >= MOST_RECENT / 8 - 1);
    console.devices.stop();
}

#[test]
fn one_client_writes() {
    let console = Running::open(&config::Console::None);
    let mut watcher = attach(&console, Mode::Watch).expect("a place");
    let mut writer = attach(&console, Mode::Write).expect("a place");
    assert_eq!(attach(&console, Mode::Write).err(), Some(AttachError::HasWriter));
    watcher.write_all(b"not heard").expect("it is there");
    let typed = text(20_000);
    writer.write_all(&typed).expect("it is there");
    assert!(console.hear(typed.len()) == typed);

    let mut next = attach(&console, Mode::TakeOver).expect("a place");
    next.write_all(b"next").expect("it is there");
    assert_eq!(console.hear(4), b"next");
    writer.write_all(b"late").expect("it is there");
    console.say(b"\n");
    let mut told = String::new();
    while !told.contains("another client writes to this console now") {
        let mut chunk = [0; 64];
        let count = writer.read(&mut chunk).expect("it is told");
        told.push_str(&String::from_utf8_lossy(&chunk[..count]));
    }
    next.write_all(b"on").expect("it is there");
    assert_eq!(console.hear(2), b"on");

    drop(next);
    expect_place(&console, Mode::Write);
    console.devices.stop();
}

#[test]
fn who_has_said_all_may_still_listen_and_another_one_writes() {
    let console = Running::open(&config::Console::None);
    let mut first = attach(&console, Mode::Write).expect("a place");
    first.write_all(b"reboot\n").expect("it is there");
    first.shutdown(Shutdown::Write).expect("it is there");
    assert_eq!(console.hear(7), b"reboot\n");
    expect_place(&console, Mode::Write);
    console.say(b"rebooting\n");
    expect(&mut first, b"hello\nrebooting\n");
    console.devices.stop();
}

#[test]
fn places_are_bounded_and_free_again() {
    let console = Running::open(&config::Console::None);
    let clients: Vec<_> =
        (0..MOST_ATTACHED).map(|_| attach(&console, Mode::Watch).expect("a place")).collect();
    assert_eq!(attach(&console, Mode::Watch).err(), Some(AttachError::Full));
    drop(clients);
    expect_place(&console, Mode::Watch);
    console.devices.stop();
}

#[test]
fn a_client_that_stands_still_holds_nobody_back_and_is_told_what_it_missed() {
    let console = Running::open(&config::Console::None);
    let mut slow = attach(&console, Mode::Watch).expect("a place");
    let mut quick = attach(&console, Mode::Watch).expect("a place");
    expect(&mut slow, b"hello\n");
    expect(&mut quick, b"hello\n");
    let said = text(4 << 20);
    for piece in said.chunks(MOST_RECENT / 4) {
        console.say(piece);
        expect(&mut quick, piece);
    }
    let reader = thread::spawn(move || {
        let mut seen = Vec::new();
        slow.read_to_end(&mut seen).map(|_| seen)
    });
    console.console.finish(&Exit::PoweredOff);
    let seen = reader.join().expect("no panic").expect("the end comes");
    let seen = String::from_utf8_lossy(&seen);
    assert!(seen.contains("bytes of console output are missing here]"), "{} bytes", seen.len());
    assert!(seen.ends_with(&*String::from_utf8_lossy(&said[said.len() - 1000..])));
    console.devices.stop();
}

#[test]
fn the_last_output_comes_before_the_end() {
    let console = Running::open(&config::Console::None);
    let mut client = attach(&console, Mode::Write).expect("a place");
    expect(&mut client, b"hello\n");
    console.say(b"reboot: Power down");
    console.console.finish(&Exit::PoweredOff);
    let mut seen = String::new();
    client.read_to_string(&mut seen).expect("the end comes");
    assert_eq!(seen, "reboot: Power down");
    console.devices.stop();
}
