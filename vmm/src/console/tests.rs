//! A console between a guest, which these tests play, and whoever is at its other end.

use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use vm_device::DevicePio;
use vm_device::bus::PioAddress;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::events::EventThread;

/// Longer than anything here takes.
pub(crate) const LONG: Duration = Duration::from_secs(60);

const COM1: PioAddress = PioAddress(0x3f8);
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const RTS: u8 = 2;

fn interrupt() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

/// A console that runs, and the loop that serves it.
pub(crate) struct Running {
    pub(crate) console: Console,
    vcpu_set: Arc<VcpuSet>,
    pub(crate) devices: EventThread,
}

impl Running {
    pub(crate) fn open(config: &config::Console) -> Self {
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        let console = Console::open(config, interrupt(), &vcpu_set).expect("a console");
        Self::run(console, vcpu_set)
    }

    /// As on standard input and output.
    fn between(input: File, typed: bool, output: File) -> Self {
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        let port = Arc::new(Port::new(interrupt(), FirstReader::Present).expect("a port"));
        let source = Source::Stdin { input, escape: Escape::Plain, typed };
        let input = Input::new(source, Arc::clone(&port), Arc::clone(&vcpu_set)).expect("descriptors");
        let attachments = input.attachments();
        let input = Arc::new(Mutex::new(input));
        let sink = Some(Sink::File(output));
        Self::run(Console { port, input, attachments, sink, _terminal: None }, vcpu_set)
    }

    fn run(mut console: Console, vcpu_set: Arc<VcpuSet>) -> Self {
        console.start(&vcpu_set).expect("a thread");
        let devices = EventThread::start("devices", vec![console.input.clone()], &vcpu_set);
        let devices = devices.expect("a thread");
        Self { console, vcpu_set, devices }
    }

    /// The kernel prints.
    pub(crate) fn say(&self, text: &[u8]) {
        text.iter().for_each(|byte| self.console.port.pio_write(COM1, 0, &[*byte]));
    }

    /// What a guest reads that expects so much.
    pub(crate) fn hear(&self, count: usize) -> Vec<u8> {
        let port = &self.console.port;
        let read = |register| {
            let mut data = [0];
            port.pio_read(COM1, register, &mut data);
            data[0]
        };
        port.pio_write(COM1, MODEM_CONTROL, &[RTS]);
        let (mut heard, begin) = (Vec::new(), Instant::now());
        while heard.len() < count {
            assert!(begin.elapsed() < LONG, "{} of {count} bytes came", heard.len());
            if read(LINE_STATUS) & 1 != 0 {
                heard.push(read(0));
            } else {
                thread::yield_now();
            }
        }
        heard
    }

    fn assert_ended_by_keys(self) {
        let (ends, ended) = mpsc::channel();
        let vcpu_set = Arc::clone(&self.vcpu_set);
        thread::spawn(move || ends.send(vcpu_set.wait_for_end()));
        assert_eq!(ended.recv_timeout(LONG), Ok(Exit::ConsoleQuit));
        self.devices.stop();
    }
}

fn piped() -> (File, PipeWriter) {
    let (reader, writer) = pipe().expect("a pipe");
    (File::from(OwnedFd::from(reader)), writer)
}

/// A pipe into which nothing more goes, and where it could be read.
fn full_pipe() -> (PipeReader, File) {
    let (reader, writer) = pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("a flag of a pipe");
    while (&writer).write_all(&[0; 512]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("a flag of a pipe");
    (reader, File::from(OwnedFd::from(writer)))
}

fn null() -> File {
    File::options().write(true).open("/dev/null").expect("it is everywhere")
}

pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < LONG, "waited for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn text(count: usize) -> Vec<u8> {
    (0..).flat_map(|number| format!("{number}\n").into_bytes()).take(count).collect()
}

fn read_exactly(mut from: impl Read, count: usize) -> Vec<u8> {
    let mut read = vec![0; count];
    from.read_exact(&mut read).expect("it is all there");
    read
}

#[test]
fn output_that_nobody_reads_keeps_no_vcpu_and_no_key() {
    let (input, mut keys) = piped();
    let (unread, output) = full_pipe();
    let console = Running::between(input, false, output);
    console.say(&text(100_000));
    keys.write_all(b"a\x01x").expect("they are read");
    console.console.finish(&Exit::ConsoleQuit);
    assert_eq!(console.console.port.output_counts().written, 0, "nobody has read");
    console.assert_ended_by_keys();
    drop(unread);
}

#[test]
fn a_reader_who_goes_takes_no_guest_with_him() {
    let (input, _keys) = piped();
    let (reader, writer) = pipe().expect("a pipe");
    drop(reader);
    let console = Running::between(input, false, File::from(OwnedFd::from(writer)));
    console.say(b"some\n");
    wait_for("the loss", || console.console.port.output_counts().lost == 5);
    console.say(b"more\n");
    assert_eq!(console.console.port.output_counts().lost, 10);
    console.devices.stop();
}

#[test]
fn keys_end_a_vm_whose_guest_reads_none() {
    let (input, mut keys) = piped();
    let console = Running::between(input, true, null());
    keys.write_all(&[b'a'; 20_000]).expect("they are read");
    keys.write_all(b"\x01x").expect("they are read");
    console.assert_ended_by_keys();
}

#[test]
fn what_is_typed_ahead_is_there_when_the_guest_reads() {
    let (input, mut keys) = piped();
    let console = Running::between(input, true, null());
    let typed = text(60_000);
    keys.write_all(&typed).expect("they are read");
    wait_for("the keys", || rustix::io::ioctl_fionread(&keys).is_ok_and(|left| left == 0));
    assert!(console.hear(typed.len()) == typed);
    console.devices.stop();
}

#[test]
fn a_file_is_read_to_its_end() {
    let mut input = tempfile::tempfile().expect("a file");
    let script = text(100_000);
    input.write_all(&script).expect("there is room");
    std::io::Seek::rewind(&mut input).expect("it is a file");
    let console = Running::between(input, false, null());
    assert!(console.hear(script.len()) == script);
    assert!(!console.vcpu_set.has_ended(), "the end of its input is not the end of a VM");
    console.devices.stop();
}

#[test]
fn what_was_in_the_file_stays() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("console");
    fs::write(&path, "before\n").expect("a file");
    let console = Running::open(&config::Console::File(path.clone()));
    console.say(b"after\nprompt> ");
    console.console.finish(&Exit::PoweredOff);
    assert_eq!(fs::read_to_string(&path).expect("it is there"), "before\nafter\nprompt> ");
    console.devices.stop();
}

#[test]
fn a_full_disk_ends_and_stops_nothing() {
    let console = Running::open(&config::Console::File("/dev/full".into()));
    console.say(&text(300_000));
    let counts = console.console.port.output_counts();
    assert!(counts.waiting > 0 && counts.lost > 0, "{counts:?}");
    assert_eq!((counts.written, counts.waiting + counts.lost), (0, 300_000));
    let begin = Instant::now();
    console.console.finish(&Exit::PoweredOff);
    assert!(begin.elapsed() < PATIENCE, "nobody will take it");
    console.devices.stop();
}

/// A console with a socket, and where that is.
fn on_socket() -> (Running, PathBuf, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("console");
    (Running::open(&config::Console::Socket(path.clone())), path, directory)
}

#[test]
fn a_client_who_does_not_read_for_a_while_gets_everything() {
    let (console, path, _directory) = on_socket();
    let client = UnixStream::connect(path).expect("it listens");
    console.say(b"hello\n");
    assert_eq!(read_exactly(&client, 6), b"hello\n");
    // Four times what the kernel keeps for it.
    let all = text(800_000);
    console.say(&all);
    thread::sleep(Duration::from_millis(500));
    assert!(read_exactly(&client, all.len()) == all);
    assert_eq!(console.console.port.output_counts().lost, 0);
    console.devices.stop();
}

#[test]
fn a_client_gets_what_was_said_before_it_came() {
    let (console, path, _directory) = on_socket();
    console.say(b"[0.000000] Linux version\n");
    let client = UnixStream::connect(path).expect("it listens");
    assert_eq!(read_exactly(&client, 25), b"[0.000000] Linux version\n");
    console.devices.stop();
}

#[test]
fn a_client_who_has_nothing_more_to_say_still_listens() {
    let (console, path, _directory) = on_socket();
    let mut client = UnixStream::connect(path).expect("it listens");
    client.write_all(b"ls\n").expect("it is read");
    client.shutdown(Shutdown::Write).expect("it is connected");
    assert_eq!(console.hear(3), b"ls\n");
    thread::sleep(Duration::from_millis(50));
    console.say(b"bin\n");
    assert_eq!(read_exactly(&client, 4), b"bin\n");
    console.devices.stop();
}

#[test]
fn one_client_at_a_time_and_one_who_has_gone_keeps_nobody_away() {
    let (console, path, _directory) = on_socket();
    let connect = || UnixStream::connect(&path).expect("it listens");
    let mut first = connect();
    // More than the guest is given, so that it is no longer read.
    first.write_all(&[b'a'; 20_000]).expect("there is room on the way");
    console.say(b"1");
    assert_eq!(read_exactly(&first, 1), b"1");
    assert_eq!(connect().read(&mut [0]).expect("it is turned away"), 0, "the first is still there");
    drop(first);
    let third = connect();
    console.say(b"3");
    assert_eq!(read_exactly(&third, 1), b"3");
    // One that hangs and goes, with a write to it under way.
    console.say(&text(400_000));
    drop(third);
    let fourth = connect();
    assert_eq!(read_exactly(&fourth, 1).len(), 1);
    console.devices.stop();
}

#[test]
fn a_socket_that_somebody_removes_is_made_again() {
    let (console, path, _directory) = on_socket();
    let before = UnixStream::connect(&path).expect("it listens");
    console.say(b"1");
    assert_eq!(read_exactly(&before, 1), b"1");
    fs::remove_file(&path).expect("it is there");
    let begin = Instant::now();
    while !path.exists() {
        assert!(begin.elapsed() < LONG, "it is not there again");
        thread::sleep(Duration::from_millis(20));
    }
    console.say(b"2");
    assert_eq!(read_exactly(&before, 1), b"2", "who is connected stays so");
    drop(before);
    let after = UnixStream::connect(&path).expect("it listens");
    console.say(b"3");
    assert_eq!(read_exactly(&after, 1), b"3");
    console.devices.stop();
}

#[test]
fn a_socket_that_a_dead_process_left_is_replaced_and_a_living_one_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("console");
    drop(UnixListener::bind(&path).expect("a socket"));
    assert!(path.exists(), "nobody has removed it");
    let open = || {
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        Console::open(&config::Console::Socket(path.clone()), interrupt(), &vcpu_set)
    };
    let first = open().expect("it is dead");
    assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
    let refused = open().err().expect("it lives").to_string();
    assert!(refused.contains("another process listens there"), "{refused}");
    fs::remove_file(&path).expect("it is there");
    let second = open().expect("a console");
    drop(first);
    assert!(path.exists(), "it is another's");
    drop(second);
    assert!(!path.exists());
}
