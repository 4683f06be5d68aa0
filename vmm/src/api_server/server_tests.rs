//! The server on a real socket, with the control of a real VM that has not been started.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use api::agent::{EventKind, MemoryEvent};
use api::status::{MemoryStatus, VmState, VmStatus};
use api::units::Bytes;
use serde_json::Value;

use super::super::connection::{TRANSFER_LIMIT, TURN};
use super::super::http::LONGEST_BODY;
use super::*;
use crate::event_stream::MOST_READERS;

pub(super) struct Running {
    path: PathBuf,
    stop: EventFd,
    pub(super) control: Arc<Control>,
    thread: Option<JoinHandle<io::Result<()>>>,
    _directory: tempfile::TempDir,
}

impl Running {
    pub(super) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        // Tests wait for what comes of a look, and not for its time.
        let server = Server::bind(&path).unwrap().looking_every(Duration::from_millis(5));
        let stop = server.stopper().unwrap();
        let control = super::super::document::control();
        let served = Arc::clone(&control);
        let thread = Some(thread::spawn(move || server.run(&served)));
        Self { path, stop, thread, control, _directory: directory }
    }

    pub(super) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        // A bound on a broken server, not a wait: every answer is at hand at once.
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap().unwrap();
        assert!(!self.path.exists(), "the socket outlived the server");
    }
}

fn receive_head(stream: &mut impl Read) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("the server closed in the middle of a response");
        head.extend(byte);
    }
    String::from_utf8(head).unwrap()
}

/// Reads one response: status, head, body.
pub(super) fn receive(stream: &mut impl Read) -> (u16, String, Vec<u8>) {
    let head = receive_head(stream);
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    (status, head, body)
}

pub(super) fn ask(stream: &mut UnixStream, request: &str) -> (u16, String, Vec<u8>) {
    stream.write_all(request.as_bytes()).unwrap();
    receive(stream)
}

fn put(path: &str, body: &str) -> String {
    format!("PUT {path} HTTP/1.1\r\nHost: vm\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

pub(super) fn sentence(body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap();
    value["detail"].as_str().unwrap().to_owned()
}

#[test]
fn one_connection_carries_many_requests() {
    let server = Running::start();
    let mut client = server.connect();
    for _ in 0..3 {
        let (status, head, body) = ask(&mut client, "GET /v1/vm HTTP/1.1\r\nHost: vm\r\n\r\n");
        assert_eq!(status, 200, "{head}");
        let vm: VmStatus = serde_json::from_slice(&body).unwrap();
        assert_eq!((vm.name.as_str(), vm.cpus, vm.state), ("test", 2, VmState::Created));
        assert_eq!(vm.pid, std::process::id());
    }
    let (status, _, body) = ask(&mut client, "GET /v1/memory HTTP/1.1\r\n\r\n");
    assert_eq!(status, 200);
    let memory: MemoryStatus = serde_json::from_slice(&body).unwrap();
    assert_eq!(memory.limits.max(), Bytes::gib(1));
}

#[test]
fn limits_are_changed_within_the_mapping() {
    let server = Running::start();
    let mut client = server.connect();
    let limits = r#"{"startup":268435456,"min":134217728,"max":536870912,"weight":7}"#;
    assert_eq!(ask(&mut client, &put("/v1/memory/limits", limits)).0, 204);
    let (_, _, body) = ask(&mut client, "GET /v1/memory HTTP/1.1\r\n\r\n");
    let memory: MemoryStatus = serde_json::from_slice(&body).unwrap();
    assert_eq!((memory.limits.max(), memory.limits.weight()), (Bytes::mib(512), 7));

    let beyond = r#"{"startup":268435456,"min":134217728,"max":1073745920}"#;
    let (status, _, body) = ask(&mut client, &put("/v1/memory/limits", beyond));
    assert_eq!(status, 400);
    assert!(sentence(&body).contains("larger max"), "{}", sentence(&body));
}

#[test]
fn limits_that_somebody_else_changed_are_not_overwritten() {
    let server = Running::start();
    let mut client = server.connect();
    let tag = |head: &str| head.lines().find_map(|line| line.strip_prefix("ETag: ")).unwrap().to_owned();
    let put = |max: u64, tag: &str| {
        let body = format!("{{\"startup\":268435456,\"min\":134217728,\"max\":{max}}}");
        let length = body.len();
        format!("PUT /v1/memory/limits HTTP/1.1\r\nIf-Match: {tag}\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    let (_, head, _) = ask(&mut client, "GET /v1/memory/limits HTTP/1.1\r\n\r\n");
    let read = tag(&head);
    let (status, head, _) = ask(&mut client, &put(536870912, &read));
    assert_eq!(status, 204);
    let set = tag(&head);
    // The same once more, as where the answer was lost: nothing changes by it.
    let (status, head, _) = ask(&mut client, &put(536870912, &set));
    assert_eq!((status, tag(&head)), (204, set.clone()));
    // Who has read what was there before is told.
    let (status, head, body) = ask(&mut client, &put(1073741824, &read));
    assert_eq!((status, tag(&head)), (412, set));
    assert!(sentence(&body).contains("read it again"), "{}", sentence(&body));
    let (_, _, body) = ask(&mut client, "GET /v1/memory/limits HTTP/1.1\r\n\r\n");
    assert_eq!(serde_json::from_slice::<Value>(&body).unwrap()["max"], 536870912);
    assert_eq!(ask(&mut client, &put(1073741824, "*")).0, 204);
}

#[test]
fn paths_without_a_version_are_answered_as_before_and_say_that_they_end() {
    let server = Running::start();
    let mut client = server.connect();
    for (path, status) in [("/memory", 200), ("/memory?x=1", 400), ("/vm/pause", 405), ("/nothing", 404)] {
        let (found, head, body) = ask(&mut client, &format!("GET {path} HTTP/1.1\r\n\r\n"));
        assert_eq!(found, status, "{path}");
        let successor = path.split('?').next().unwrap();
        for line in [
            "Deprecation: @1796083200\r\n",
            "Sunset: Tue, 01 Jun 2027 00:00:00 GMT\r\n",
            &format!("Link: </v1{successor}>; rel=\"successor-version\"\r\n"),
            "Content-Type: application/json\r\n",
        ] {
            assert!(head.contains(line), "{line} is not in {head}");
        }
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["error"].is_string(), status != 200, "{body}");
        let (_, head, _) = ask(&mut client, &format!("GET /v1{path} HTTP/1.1\r\n\r\n"));
        assert!(!head.contains("Deprecation"), "{head}");
    }
}

#[test]
fn refusals_say_why() {
    let server = Running::start();
    let mut client = server.connect();
    // No guest runs, so there is no driver that could follow: a conflict, not a mistake.
    let (status, _, body) = ask(&mut client, &put("/v1/memory/target", r#"{"target":268435456}"#));
    assert_eq!(status, 409, "{}", sentence(&body));
    assert_eq!(ask(&mut client, &put("/v1/memory/target", r#"{"target":4096}"#)).0, 409);
    assert_eq!(ask(&mut client, "POST /v1/vm/resume HTTP/1.1\r\n\r\n").0, 409);
    for body in ["", "{", "[]", "{\"target\":-1}", "{\"target\":1,\"x\":2}", "{\"target\":\"1G\"}", "\u{0}"] {
        let (status, _, answer) = ask(&mut client, &put("/v1/memory/target", body));
        assert_eq!(status, 400, "{body}");
        assert!(!sentence(&answer).is_empty());
    }
    let (status, head, body) = ask(&mut client, "DELETE /v1/vm HTTP/1.1\r\n\r\n");
    assert_eq!(status, 405);
    assert!(head.contains("\r\nAllow: GET, HEAD\r\n"), "{head}");
    assert!(sentence(&body).contains("/v1/vm takes GET, HEAD"));
    assert_eq!(ask(&mut client, "GET /v1/nothing HTTP/1.1\r\n\r\n").0, 404);
}

#[test]
fn requests_may_be_sent_ahead_and_are_answered_in_order() {
    let server = Running::start();
    let mut client = server.connect();
    let ahead = "GET /v1/vm HTTP/1.1\r\n\r\nGET /v1/nothing HTTP/1.1\r\n\r\nGET /v1/memory HTTP/1.1\r\n\r\n"
        .repeat(50);
    client.write_all(ahead.as_bytes()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    for _ in 0..50 {
        let statuses = [receive(&mut client).0, receive(&mut client).0, receive(&mut client).0];
        assert_eq!(statuses, [200, 404, 200]);
    }
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_can_not_be_read_is_answered_once_and_the_connection_ends() {
    let server = Running::start();
    let huge = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(20_000));
    for (request, expected) in [
        ("hello\r\n\r\n", 400),
        (huge.as_str(), 431),
        ("PUT /v1/memory/target HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n{", 413),
        ("PUT /v1/memory/target HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        ("PUT /v1/memory/target HTTP/1.1\r\n\r\n", 411),
        ("\u{16}\u{3}\u{1}", 400),
    ] {
        let mut client = server.connect();
        let (status, head, body) = ask(&mut client, request);
        assert_eq!(status, expected, "{request:.40}");
        assert!(head.contains("Connection: close"), "{head}");
        assert!(!sentence(&body).is_empty());
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "closed after {request:.40}");
    }
}

#[test]
fn a_client_that_sends_on_still_gets_its_refusal() {
    let server = Running::start();
    let mut client = server.connect();
    client.write_all(b"PUT /v1/memory/target HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n").unwrap();
    for _ in 0..64 {
        client.write_all(&[b'x'; 8192]).unwrap();
    }
    assert_eq!(receive(&mut client).0, 413);
}

#[test]
fn the_largest_body_is_taken_in_small_pieces() {
    let server = Running::start();
    let mut client = server.connect();
    let request = put("/v1/memory/target", &" ".repeat(LONGEST_BODY));
    for piece in request.as_bytes().chunks(1000) {
        client.write_all(piece).unwrap();
    }
    assert_eq!(receive(&mut client).0, 400);
    assert_eq!(ask(&mut client, "GET /v1/vm HTTP/1.1\r\n\r\n").0, 200);
}

#[test]
fn slow_and_idle_clients_stand_in_nobodys_way() {
    let server = Running::start();
    // Each holds a place with half a request, but for one that is idle.
    let slow: Vec<UnixStream> = (1..MOST_CONNECTIONS)
        .map(|_| {
            let mut client = server.connect();
            client.write_all(b"GET /v1/vm HT").unwrap();
            client
        })
        .collect();
    let mut idle = server.connect();
    assert_eq!(ask(&mut idle, "GET /v1/vm HTTP/1.1\r\n\r\n").0, 200);
    let mut other = server.connect();
    assert_eq!(ask(&mut other, "GET /v1/vm HTTP/1.1\r\n\r\n").0, 200);
    // The idle one had to go.
    assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    drop(slow);
}

/// As many clients as there are places, each with half a request.
fn half_sent(server: &Running) -> Vec<UnixStream> {
    let connect = |_| {
        let mut client = server.connect();
        client.write_all(b"GET /v1/vm HT").unwrap();
        client
    };
    (0..MOST_CONNECTIONS).map(connect).collect()
}

#[test]
fn requests_that_never_end_keep_nobody_out_for_long() {
    let server = Running::start();
    let mut slow = half_sent(&server);
    let mut patient = server.connect();
    let begun = Instant::now();
    assert_eq!(ask(&mut patient, "GET /v1/vm HTTP/1.1\r\n\r\n").0, 200);
    assert!(begun.elapsed() >= TURN / 2, "nobody had to wait: are the places counted?");
    assert!(begun.elapsed() < TRANSFER_LIMIT / 2, "others had their places for {:?}", begun.elapsed());
    assert_eq!(slow.first_mut().unwrap().read(&mut [0]).unwrap(), 0);
}

#[test]
fn answers_that_nobody_fetches_keep_nobody_out_for_long() {
    let server = Running::start();
    let requests = "GET /v1/metrics HTTP/1.1\r\n\r\n".repeat(1000);
    let connect = |_| {
        let client = server.connect();
        client.set_nonblocking(true).unwrap();
        while (&client).write(requests.as_bytes()).is_ok() {}
        client
    };
    let deaf: Vec<UnixStream> = (0..MOST_CONNECTIONS).map(connect).collect();
    let begun = Instant::now();
    assert_eq!(ask(&mut server.connect(), "GET /v1/vm HTTP/1.1\r\n\r\n").0, 200);
    assert!(begun.elapsed() < TRANSFER_LIMIT / 2, "others had their places for {:?}", begun.elapsed());
    drop(deaf);
}

#[test]
fn who_has_come_is_not_put_out_before_it_had_its_time_to_ask() {
    let server = Running::start();
    let mut clients: Vec<UnixStream> = (0..MOST_CONNECTIONS + 4).map(|_| server.connect()).collect();
    thread::sleep(TURN * 3 / 4);
    for client in &mut clients {
        client.write_all(b"GET /v1/vm HTTP/1.1\r\n\r\n").unwrap();
    }
    for mut client in clients {
        assert_eq!(receive(&mut client).0, 200);
    }
}

#[test]
fn what_somebody_asked_for_who_has_gone_is_not_done() {
    let server = Running::start();
    let slow = half_sent(&server);
    let limits = r#"{"startup":268435456,"min":134217728,"max":536870912}"#;
    server.connect().write_all(put("/v1/memory/limits", limits).as_bytes()).unwrap();
    // It came after the other, which has had its place by the time of this answer.
    let (_, _, body) = ask(&mut server.connect(), "GET /v1/memory HTTP/1.1\r\n\r\n");
    let memory: MemoryStatus = serde_json::from_slice(&body).unwrap();
    assert_eq!(memory.limits.max(), Bytes::gib(1));
    drop(slow);
    // Who says no more and stays to hear is served.
    let mut client = server.connect();
    client.write_all(put("/v1/memory/limits", limits).as_bytes()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(receive(&mut client).0, 204);
}

#[test]
fn head_is_answered_as_get_without_the_body() {
    let server = Running::start();
    let mut client = server.connect();
    for (path, status) in [
        ("/v1/vm", 200),
        ("/v1/memory/events", 200),
        ("/v1/memory?x=1", 400),
        ("/v1/vm/pause", 405),
        ("/v1/nothing", 404),
    ] {
        client.write_all(format!("HEAD {path} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
        let head = receive_head(&mut client);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {head}");
        assert_eq!(head.contains("Content-Length: "), path != "/v1/memory/events", "{path}: {head}");
        assert_eq!(ask(&mut client, "GET /v1/vm HTTP/1.1\r\n\r\n").0, 200, "after {path}");
    }
    client.write_all(b"HEAD /v1/vm HTTP/1.1\r\nExpect: x\r\n\r\n").unwrap();
    assert!(receive_head(&mut client).starts_with("HTTP/1.1 417 "));
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_client_that_never_reads_does_not_stop_the_others() {
    let server = Running::start();
    let deaf = server.connect();
    deaf.set_nonblocking(true).unwrap();
    let requests = "GET /v1/metrics HTTP/1.1\r\n\r\n".repeat(1000);
    // Sends until neither side takes any more.
    while (&deaf).write(requests.as_bytes()).is_ok() {}
    for _ in 0..10 {
        assert_eq!(ask(&mut server.connect(), "GET /v1/vm HTTP/1.1\r\n\r\n").0, 200);
    }
}

#[test]
fn metrics_are_text_that_names_the_vm() {
    let server = Running::start();
    let mut client = server.connect();
    let (status, head, body) = ask(&mut client, "GET /v1/metrics HTTP/1.1\r\n\r\n");
    let text = String::from_utf8(body).unwrap();
    assert_eq!(status, 200);
    assert!(head.contains("Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{head}");
    for line in [
        "# TYPE ballast_memory_max_bytes gauge",
        "ballast_memory_max_bytes{vm=\"test\"} 1073741824",
        "ballast_balloon_inflated_bytes_total{vm=\"test\"} 0",
        "ballast_vm_state{vm=\"test\",state=\"created\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
}

const EVENTS: &str = "GET /v1/memory/events HTTP/1.1\r\n\r\n";

/// Begins to listen for events, past the first line.
fn listen(server: &Running) -> BufReader<UnixStream> {
    let mut client = BufReader::new(server.connect());
    client.get_mut().write_all(EVENTS.as_bytes()).unwrap();
    let (status, head, _) = receive(&mut client);
    assert_eq!(status, 200);
    assert!(head.contains("application/jsonl") && !head.contains("Content-Length"), "{head}");
    assert_eq!(event(&mut client).unwrap().event, EventKind::Subscribed);
    client
}

/// The next line; `None` at the end, which may be in the middle of one.
fn event(client: &mut impl BufRead) -> Option<MemoryEvent> {
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    line.ends_with('\n').then(|| serde_json::from_str(&line).unwrap())
}

#[test]
fn events_reach_everyone_who_listens_as_they_happen() {
    let server = Running::start();
    let mut clients = [listen(&server), listen(&server)];
    for kind in [EventKind::Distress, EventKind::Figures] {
        server.control.events().push(kind, None);
        for client in &mut clients {
            assert_eq!(event(client).unwrap().event, kind);
        }
    }
    assert_eq!(ask(&mut server.connect(), "GET /v1/vm HTTP/1.1\r\n\r\n").0, 200);
}

#[test]
fn few_may_listen_and_who_goes_makes_room() {
    let server = Running::start();
    let mut clients: Vec<_> = (0..MOST_READERS).map(|_| listen(&server)).collect();
    let (status, _, body) = ask(&mut server.connect(), EVENTS);
    assert_eq!(status, 503);
    assert!(sentence(&body).contains("end one of them"));
    clients.pop();
    // The server hears of it in its own time.
    while ask(&mut server.connect(), EVENTS).0 != 200 {
        thread::yield_now();
    }
}

#[test]
fn who_does_not_keep_up_is_sent_away_and_costs_the_others_nothing() {
    let server = Running::start();
    let (mut slow, mut quick) = (listen(&server), listen(&server));
    // More than the kernel buffers for one socket.
    for sequence in 1..=20_000 {
        server.control.events().push(EventKind::Figures, None);
        assert_eq!(event(&mut quick).unwrap().sequence, sequence);
    }
    let mut last = 0;
    while let Some(event) = event(&mut slow) {
        assert_eq!(event.sequence, last + 1, "no gap that nobody told of");
        last = event.sequence;
    }
    assert!(last < 20_000, "it got all");
}

/// Waits until clients are served anew.
fn connect_again(running: &Running) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok(mut stream) = UnixStream::connect(&running.path) {
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            assert_eq!(ask(&mut stream, "GET /v1/vm HTTP/1.1\r\nHost: x\r\n\r\n").0, 200);
            return stream;
        }
        assert!(Instant::now() < deadline, "the socket is not there again");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_socket_that_somebody_removes_is_made_again_and_connections_last() {
    let running = Running::start();
    let mut before = running.connect();
    assert_eq!(ask(&mut before, "GET /v1/vm HTTP/1.1\r\nHost: x\r\n\r\n").0, 200);
    for _ in 0..3 {
        std::fs::remove_file(&running.path).unwrap();
        connect_again(&running);
    }
    // The whole directory, which somebody makes again some time.
    let directory = running.path.parent().unwrap().to_owned();
    std::fs::remove_dir_all(&directory).unwrap();
    std::fs::create_dir(&directory).unwrap();
    connect_again(&running);
    assert_eq!(ask(&mut before, "GET /v1/vm HTTP/1.1\r\nHost: x\r\n\r\n").0, 200);
}
