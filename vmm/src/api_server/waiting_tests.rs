//! Requests whose answers take time, and what becomes of the other clients meanwhile.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use api::status::{Pauser, VmState, VmStatus};
use api::units::Bytes;
use balloon::device::Balloon;
use balloon::discard::Discard;
use balloon::mechanism::steering::Steering;

use super::super::http::{Answer, Response};
use super::tests::{Running, ask, receive, sentence};
use super::*;
use crate::config::{self, MemoryOptions};
use crate::console::{self, Attachments};
use crate::control::Parts;
use crate::memory::Ram;
use crate::vcpu_set::{Admission, PATIENCE, Standing, VcpuSet};

/// A server that answers `/slow` when it is told to, or when the time is over; anything else at once.
struct Slow {
    path: PathBuf,
    stop: EventFd,
    wake: EventFd,
    state: Arc<SlowState>,
    thread: Option<JoinHandle<io::Result<()>>>,
    _directory: tempfile::TempDir,
}

#[derive(Default)]
struct SlowState {
    ready: AtomicBool,
    /// Times that an answer of `/slow` was asked for.
    asked: AtomicUsize,
}

impl Slow {
    fn start(limit: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let server = Server::bind(&path).unwrap();
        let stop = server.stopper().unwrap();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let state = Arc::new(SlowState::default());
        let (shared, waker) = (Arc::clone(&state), wake.try_clone().unwrap());
        let thread = thread::spawn(move || {
            server.serve(&waker, &|request| {
                let response = Response::text("text/plain", request.path.to_owned());
                if request.path != "/slow" {
                    return response.into();
                }
                let shared = Arc::clone(&shared);
                Answer::within(limit, move |waited| {
                    shared.asked.fetch_add(1, Ordering::SeqCst);
                    (shared.ready.load(Ordering::SeqCst) || waited >= limit).then(|| response.clone())
                })
            })
        });
        Self { path, stop, wake, state, thread: Some(thread), _directory: directory }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// A client whose request waits by now, as one of `count`.
    fn waiting(&self, count: usize) -> UnixStream {
        let mut client = self.connect();
        client.write_all(b"GET /slow HTTP/1.1\r\n\r\n").unwrap();
        self.until_asked(count);
        client
    }

    fn until_asked(&self, count: usize) {
        while self.state.asked.load(Ordering::SeqCst) < count {
            thread::yield_now();
        }
    }

    fn ready(&self) {
        self.state.ready.store(true, Ordering::SeqCst);
        self.wake.write(1).unwrap();
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

fn body(client: &mut UnixStream) -> String {
    let (status, _, body) = receive(client);
    assert_eq!(status, 200);
    String::from_utf8(body).unwrap()
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn a_request_that_waits_is_answered_when_what_it_waits_for_has_come() {
    let server = Slow::start(HOUR);
    let mut client = server.waiting(1);
    // What is sent meanwhile has its turn, and other clients wait for nobody.
    client.write_all(b"GET /next HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(ask(&mut server.connect(), "GET /other HTTP/1.1\r\n\r\n").0, 200);
    assert_eq!(server.state.asked.load(Ordering::SeqCst), 1, "nothing has come that it may wait for");
    server.wake.write(1).unwrap();
    server.until_asked(2);
    assert_eq!(ask(&mut server.connect(), "GET /other HTTP/1.1\r\n\r\n").0, 200);
    client.set_nonblocking(true).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    client.set_nonblocking(false).unwrap();

    // One that will send no more still wants its answer.
    client.shutdown(Shutdown::Write).unwrap();
    server.ready();
    assert_eq!([body(&mut client), body(&mut client)], ["/slow", "/next"]);
    assert_eq!(server.state.asked.load(Ordering::SeqCst), 3);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_request_that_has_waited_long_enough_is_answered_and_its_connection_goes_on() {
    let limit = Duration::from_millis(50);
    let server = Slow::start(limit);
    let mut client = server.connect();
    for turn in 1..=3 {
        let begun = Instant::now();
        client.write_all(b"GET /slow HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(body(&mut client), "/slow");
        assert!(begun.elapsed() >= limit);
        // Once as it came, and once when its time was over: nobody looked again and again.
        assert_eq!(server.state.asked.load(Ordering::SeqCst), 2 * turn);
    }
}

#[test]
fn clients_that_wait_keep_their_places_until_they_hang_up() {
    let server = Slow::start(HOUR);
    let mut clients: Vec<UnixStream> = (1..=MOST_CONNECTIONS).map(|count| server.waiting(count)).collect();
    let mut other = server.connect();
    other.write_all(b"GET /other HTTP/1.1\r\n\r\n").unwrap();
    // Only the end of one of them can make room.
    drop(clients.remove(3));
    assert_eq!(body(&mut other), "/other");
    assert_eq!(server.state.asked.load(Ordering::SeqCst), MOST_CONNECTIONS);
    server.ready();
    for mut client in clients {
        assert_eq!(body(&mut client), "/slow");
    }
}

/// A VM whose guest runs, on one vCPU that nobody runs: the test does what its thread would do.
fn running_guest() -> (Running, Arc<VcpuSet>) {
    running_guest_with(None)
}

fn running_guest_with(attachments: Option<Arc<Attachments>>) -> (Running, Arc<VcpuSet>) {
    let server = Running::start();
    let map = Bytes::mib(64);
    let ram = Arc::new(Ram::new(map, MemoryOptions::default()).unwrap());
    // SAFETY: there is no memory that it could drop.
    let discard = unsafe { Discard::new(Vec::new()) };
    let config = balloon::device::Config {
        map,
        target: map,
        deflate_on_oom: true,
        reporting: true,
        statistics_interval: Duration::ZERO,
        refills: false,
    };
    let (_balloon, handle) = Balloon::new(config, discard).unwrap();
    let vcpu_set = VcpuSet::new(1).unwrap();
    server.control.attach(Parts {
        vcpu_set: Arc::clone(&vcpu_set),
        ram,
        disks: Vec::new(),
        virtio: Vec::new(),
        steering: Steering::by_balloon(handle),
        power: EventFd::new(EFD_NONBLOCK).unwrap(),
        console: None,
        attachments,
        vsock: None,
        nets: Vec::new(),
        shares: Vec::new(),
    });
    server.control.start();
    assert!(matches!(vcpu_set.admit(0), Admission::Enter { .. }));
    (server, vcpu_set)
}

const PAUSE: &str = "POST /v1/vm/pause HTTP/1.1\r\n\r\n";

fn state(server: &Running) -> VmState {
    let (status, _, body) = ask(&mut server.connect(), "GET /v1/vm HTTP/1.1\r\n\r\n");
    assert_eq!(status, 200);
    serde_json::from_slice::<VmStatus>(&body).unwrap().state
}

/// Until some client's request has reached the VM.
fn until(standing: Standing, vcpu_set: &VcpuSet) {
    while vcpu_set.standing() != standing {
        thread::yield_now();
    }
}

#[test]
fn a_vcpu_that_takes_its_time_to_stop_keeps_nobody_else_waiting() {
    let (server, vcpu_set) = running_guest();
    let mut client = server.connect();
    client.write_all(PAUSE.as_bytes()).unwrap();
    until(Standing::Holding, &vcpu_set);
    assert_eq!(state(&server), VmState::Running, "a vCPU is inside");
    let vcpu = thread::spawn({
        let vcpu_set = Arc::clone(&vcpu_set);
        move || matches!(vcpu_set.admit(0), Admission::Enter { .. })
    });
    assert_eq!(receive(&mut client).0, 204);
    assert_eq!(state(&server), VmState::Paused { by: Pauser::Operator });
    assert_eq!(ask(&mut client, "POST /v1/vm/resume HTTP/1.1\r\n\r\n").0, 204);
    assert!(vcpu.join().unwrap());

    // A signal that ends the VM resumes it first, and is as little kept waiting.
    client.write_all(PAUSE.as_bytes()).unwrap();
    until(Standing::Holding, &vcpu_set);
    server.control.resume(Pauser::Operator).unwrap();
    let (status, _, body) = receive(&mut client);
    assert_eq!((status, state(&server)), (409, VmState::Running));
    assert!(sentence(&body).contains("was resumed"), "{}", sentence(&body));
}

#[test]
fn a_vm_is_not_paused_for_who_has_gone_meanwhile() {
    let (server, vcpu_set) = running_guest();
    let mut client = server.connect();
    client.write_all(PAUSE.as_bytes()).unwrap();
    until(Standing::Holding, &vcpu_set);
    drop(client);
    while vcpu_set.standing() == Standing::Holding {
        thread::yield_now();
    }
    assert_eq!(vcpu_set.standing(), Standing::Running { stuck: None });
    assert!(matches!(vcpu_set.admit(0), Admission::Enter { .. }), "it goes on at once");
    assert_eq!(state(&server), VmState::Running);
}

/// The last vCPU may come out just before the client goes: it is the server's turn that tells.
#[test]
fn a_pause_that_nobody_was_told_of_is_ended_also_once_it_is_complete() {
    let (server, vcpu_set) = running_guest();
    server.control.pause(Pauser::Operator).unwrap();
    let vcpu = thread::spawn({
        let vcpu_set = Arc::clone(&vcpu_set);
        move || matches!(vcpu_set.admit(0), Admission::Enter { .. })
    });
    until(Standing::Held, &vcpu_set);
    server.control.abandon_pause(Pauser::Operator);
    assert!(vcpu.join().unwrap());
    assert_eq!(state(&server), VmState::Running);
}

#[test]
fn a_vm_whose_vcpu_does_not_stop_runs_on_and_says_which_one_it_was() {
    let (server, _vcpu_set) = running_guest();
    let begun = Instant::now();
    let (status, _, body) = ask(&mut server.connect(), PAUSE);
    assert_eq!((status, state(&server)), (500, VmState::Running));
    assert!(begun.elapsed() >= PATIENCE);
    assert!(sentence(&body).contains("vCPU 0 has not come out of the guest"), "{}", sentence(&body));
}

#[test]
fn a_vcpu_that_can_not_be_looked_at_keeps_nobody_else_waiting() {
    let (server, _vcpu_set) = running_guest();
    let translate = "POST /v1/vm/translate HTTP/1.1\r\nContent-Length: 16\r\n\r\n{\"address\":4096}";
    let (mut patient, mut other) = (server.connect(), server.connect());
    patient.write_all(translate.as_bytes()).unwrap();
    assert_eq!(state(&server), VmState::Running);
    let (status, _, body) = receive(&mut patient);
    assert_eq!(status, 500);
    assert!(sentence(&body).contains("vCPU 0 has not come out of the guest"), "{}", sentence(&body));

    other.write_all(translate.as_bytes()).unwrap();
    assert_eq!(state(&server), VmState::Running);
    server.control.shutdown().unwrap();
    let (status, _, body) = receive(&mut other);
    assert_eq!(status, 409);
    assert!(sentence(&body).contains("is stopped"), "{}", sentence(&body));
}

/// The head of an answer without a body.
fn head(stream: &mut UnixStream) -> String {
    receive(stream).1
}

#[test]
fn a_connection_goes_on_as_the_consoles() {
    let console = console::tests::Running::open(&config::Console::None);
    let (server, _vcpu_set) = running_guest_with(Some(Arc::clone(&console.console.attachments)));
    console.say(b"login: ");
    let upgrade = |query: &str| {
        format!(
            "GET /v1/vm/console{query} HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: ballast-console\r\n\r\n"
        )
    };
    let mut client = server.connect();
    // Input that is not held back until the answer.
    client.write_all((upgrade("?mode=write") + "root\n").as_bytes()).unwrap();
    let answer = head(&mut client);
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert!(answer.contains("Upgrade: ballast-console\r\n"), "{answer}");
    assert_eq!(console.hear(5), b"root\n");
    console.say(b"Password: ");
    let mut output = [0; 17];
    client.read_exact(&mut output).unwrap();
    assert_eq!(&output, b"login: Password: ");

    let mut second = server.connect();
    let (status, _, body) = ask(&mut second, &upgrade("?mode=write"));
    assert_eq!(status, 409);
    assert!(sentence(&body).contains("another client writes"), "{}", sentence(&body));
    assert_eq!(ask(&mut second, &upgrade("?mode=shout")).0, 400);
    let (status, head_of_refusal, _) = ask(&mut second, "GET /v1/vm/console HTTP/1.1\r\n\r\n");
    assert_eq!(status, 426);
    assert!(head_of_refusal.contains("Upgrade: ballast-console\r\n"), "{head_of_refusal}");
    assert!(
        head({
            second.write_all(upgrade("?mode=watch").as_bytes()).unwrap();
            &mut second
        })
        .starts_with("HTTP/1.1 101 ")
    );
    assert_eq!(state(&server), VmState::Running, "the API goes on");
    console.devices.stop();
}
