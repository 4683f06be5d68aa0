//! VMs that misbehave in ways in which a real one can't be made to.
//!
//! Each is a socket that speaks just enough HTTP/1.1 to be talked to. What a
//! sound VM does is tested with real ones, in the lab.
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use api::agent::{EventKind, MemoryEvent};
use api::limits::Limits;
use api::report::Report;
use api::status::{
    AgedReport, DriverState, MemoryStatus, PauseRequest, Pauser, TargetRequest, VmState, VmStatus,
};
use api::units::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

/// How a fake answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// As a sound VM.
    Sound,
    /// Takes the request and hangs up in the middle of the answer.
    DiesMidAnswer,
    /// Bytes that are not HTTP.
    Garbage,
    /// HTTP, but the body is not JSON.
    NotJson,
    /// JSON of another shape.
    WrongJson,
    /// Limits that contradict each other.
    WrongLimits,
    /// Never a byte.
    Silent,
    /// A body that never ends.
    EndlessBody,
    /// A head that never ends.
    EndlessHead,
    /// Every answer takes this many milliseconds.
    Slow(u64),
    /// Closes the connection behind every answer without a word about it.
    OneAnswerAConnection,
    /// 409 to each PUT.
    RefusesTargets,
    /// 500 to each pause.
    RefusesPauses,
    /// Does what it is told, and hangs up without a word.
    ActsMutely,
}

/// What a fake is, and what it has seen.
pub struct State {
    pub manner: Manner,
    pub memory: MemoryStatus,
    /// What the guest uses; reports follow from it.
    pub used: Bytes,
    /// Whether the guest moves to its target at once, or never.
    pub follows: bool,
    /// Whether it reports; the last report ages otherwise.
    pub report_age: Option<Duration>,
    pub requests: u64,
    pub connections: u64,
    /// How often its power button was pressed.
    pub presses: u64,
    /// How often it was asked to pause or to run on.
    pub steered: u64,
    /// How long it might wait for its guest's report each time that it was asked how it stands, in
    /// milliseconds; `None` where any report would do.
    pub patience: Vec<Option<u64>>,
    /// Every target it was asked for.
    pub targets: Vec<Bytes>,
    /// What somebody else sets its target to before each answer.
    pub set_anew: Option<Bytes>,
    /// Who waits for its events.
    listeners: Vec<UnboundedSender<EventKind>>,
    /// How much of the way to its target the guest goes between two reports; all of it without.
    pub pace: Option<Bytes>,
    /// Where each change of what the VM may hold is written down.
    pub journal: Option<Journal>,
}

/// What the VMs of one host may hold, after each change, as (VM, amount).
#[derive(Clone, Default)]
pub struct Journal(pub Arc<Mutex<Vec<(String, Bytes)>>>);

impl Journal {
    fn write(&self, vm: &str, amount: Bytes) {
        self.0.lock().unwrap().push((vm.to_owned(), amount));
    }

    /// The largest sum that there ever was.
    pub fn most(&self) -> Bytes {
        let mut held = std::collections::BTreeMap::new();
        let mut most = Bytes::ZERO;
        for (vm, amount) in self.0.lock().unwrap().iter() {
            held.insert(vm.clone(), *amount);
            most = most.max(held.values().copied().sum());
        }
        most
    }
}

/// A fake VM; gone when dropped.
pub struct FakeVm {
    pub state: Arc<Mutex<State>>,
    name: String,
    socket: PathBuf,
    task: JoinHandle<()>,
}

impl FakeVm {
    /// Listens at `directory/name.sock` with these limits, using `used`.
    pub fn start(directory: &Path, name: &str, limits: &str, used: Bytes) -> Self {
        let socket = directory.join(format!("{name}.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        Self::listening(listener, socket, name, limits, used)
    }

    /// As [`FakeVm::start`], on a socket that somebody else may have made.
    pub fn listening(listener: UnixListener, socket: PathBuf, name: &str, limits: &str, used: Bytes) -> Self {
        let limits: Limits = limits.parse().unwrap();
        let memory = MemoryStatus {
            given: None,
            most: None,
            followed: Some(true),
            host_rss: Some(limits.startup()),
            driver: DriverState::Active,
            ..MemoryStatus::before_the_start(limits, limits.startup())
        };
        let state = Arc::new(Mutex::new(State {
            manner: Manner::Sound,
            memory,
            used,
            follows: true,
            report_age: Some(Duration::from_millis(100)),
            requests: 0,
            connections: 0,
            presses: 0,
            steered: 0,
            patience: Vec::new(),
            targets: Vec::new(),
            set_anew: None,
            listeners: Vec::new(),
            pace: None,
            journal: None,
        }));
        let shared = Arc::clone(&state);
        let vm_name = name.to_owned();
        let name = name.to_owned();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                shared.lock().unwrap().connections += 1;
                tokio::spawn(serve(stream, Arc::clone(&shared), vm_name.clone()));
            }
        });
        Self { state, name, socket, task }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends as by `kill -9`: its socket stays behind.
    pub fn kill(self) {
        self.end();
        std::mem::forget(self);
    }

    fn end(&self) {
        self.task.abort();
        let mut state = self.state();
        state.manner = Manner::DiesMidAnswer;
        if let Some(journal) = state.journal.take() {
            journal.write(&self.name, Bytes::ZERO);
        }
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.end();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl State {
    /// The guest can't wait: tells everybody who listens. False where nobody does.
    pub fn call(&mut self) -> bool {
        self.tell(EventKind::Distress)
    }

    /// Tells everybody who listens what has happened. False where nobody does.
    pub fn tell(&mut self, event: EventKind) -> bool {
        self.listeners.retain(|listener| listener.send(event).is_ok());
        !self.listeners.is_empty()
    }

    /// Sets limits, target and actual as if the VM had just started so.
    pub fn place(&mut self, target: Bytes, actual: Bytes) {
        self.memory.target = target;
        self.memory.actual = actual;
    }

    /// Goes a part of the way to the target, and writes down what it may hold now.
    fn walk(&mut self, name: &str) {
        let (target, actual) = (self.memory.target, self.memory.actual);
        if self.follows {
            let pace = self.pace.unwrap_or(Bytes(u64::MAX));
            self.memory.actual = if actual > target {
                target.max(actual.saturating_sub(pace))
            } else {
                target.min(actual.saturating_add(pace))
            };
        }
        // What the guest gave up the host no longer holds.
        self.memory.host_rss = self.memory.host_rss.map(|held| held.min(self.memory.actual));
        if let Some(journal) = &self.journal {
            journal.write(name, self.memory.target.max(self.memory.actual));
        }
    }

    fn memory(&mut self) -> MemoryStatus {
        self.memory.report = self.report_age.map(|age| AgedReport {
            age_ms: age.as_millis() as u64,
            had: None,
            managed: None,
            statistics: Report {
                total: Some(self.memory.actual),
                available: Some(self.memory.actual.saturating_sub(self.used)),
                free: Some(self.memory.actual.saturating_sub(self.used)),
                ..Report::default()
            },
        });
        self.memory.clone()
    }
}

async fn serve(mut stream: UnixStream, shared: Arc<Mutex<State>>, name: String) {
    while let Some((head, body)) = read_request(&mut stream).await {
        let manner = {
            let mut state = shared.lock().unwrap();
            state.requests += 1;
            state.manner
        };
        if let Manner::Slow(milliseconds) = manner {
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        }
        match manner {
            Manner::Silent => std::future::pending::<()>().await,
            Manner::Garbage => {
                let _ = stream.write_all(b"\x00\xffnot http at all\r\n\r\n").await;
                return;
            }
            Manner::DiesMidAnswer => {
                let _ =
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n{\"limits\":").await;
                return;
            }
            Manner::EndlessBody => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n").await;
                while stream.write_all(&[b' '; 65536]).await.is_ok() {}
                return;
            }
            Manner::EndlessHead => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
                while stream.write_all(b"X-More: and more\r\n").await.is_ok() {}
                return;
            }
            _ => {}
        }
        // As a VM does.
        let head = head.replacen(" /v1/", " /", 1);
        if head.starts_with("get /memory/events ") {
            return tell_events(&mut stream, &shared).await;
        }
        let answer = answer(&shared, manner, &name, &head, &body);
        let ends = answer.is_empty() || manner == Manner::OneAnswerAConnection;
        if stream.write_all(&answer).await.is_err() || ends {
            return;
        }
    }
}

async fn tell_events(stream: &mut UnixStream, shared: &Mutex<State>) {
    let (sender, mut calls) = unbounded_channel();
    {
        let mut state = shared.lock().unwrap();
        state.listeners.push(sender);
        // What is counted are the daemon's questions, not its ear.
        state.requests -= 1;
        state.connections -= 1;
    }
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/jsonl\r\nConnection: close\r\n\r\n";
    let mut open = stream.write_all(head.as_bytes()).await.is_ok();
    let mut sequence = 0;
    while let (true, Some(event)) = (open, calls.recv().await) {
        sequence += 1;
        let event = MemoryEvent { sequence, event, agent: None };
        let line = serde_json::to_string(&event).unwrap() + "\n";
        open = stream.write_all(line.as_bytes()).await.is_ok();
    }
}

async fn read_request(stream: &mut UnixStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    let length: usize = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .map_or(0, |value| value.trim().parse().unwrap());
    while bytes.len() < head + length {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    Some((text, bytes[head..head + length].to_vec()))
}

fn answer(shared: &Mutex<State>, manner: Manner, name: &str, head: &str, body: &[u8]) -> Vec<u8> {
    let mut state = shared.lock().unwrap();
    let line = head.lines().next().unwrap_or_default();
    let text = match manner {
        Manner::NotJson => return http(200, "<html>hello</html>"),
        Manner::WrongJson => return http(200, r#"{"surprise":[1,2,3]}"#),
        Manner::WrongLimits => {
            let mut json = serde_json::to_value(state.memory()).unwrap();
            json["limits"]["min"] = u64::MAX.into();
            return http(200, &json.to_string());
        }
        _ => line,
    };
    if text.starts_with("get /vm ") {
        let status = VmStatus {
            name: name.to_owned(),
            pid: 1,
            state: state.memory.paused_by.map_or(VmState::Running, |by| VmState::Paused { by }),
            cpus: 1,
            uptime_ms: 1,
            version: "0".to_owned(),
            disks: Vec::new(),
            nets: Vec::new(),
            shares: Vec::new(),
            console: None,
        };
        return http(200, &serde_json::to_string(&status).unwrap());
    }
    if let Some(query) = text.strip_prefix("get /memory").filter(|rest| rest.starts_with([' ', '?'])) {
        state.patience.push(query.split_once("wait_ms=").map(|(_, rest)| {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap()
        }));
        state.memory.target = state.set_anew.unwrap_or(state.memory.target);
        state.walk(name);
        return http(200, &serde_json::to_string(&state.memory()).unwrap());
    }
    if text.starts_with("put /memory/target ") {
        if manner == Manner::RefusesTargets {
            return http(409, "{\"error\":\"no balloon driver\\u001b[2J runs in the guest\"}");
        }
        let TargetRequest { target } = serde_json::from_slice(body).unwrap();
        state.targets.push(target);
        state.memory.target = target;
        if state.pace.is_none() {
            state.walk(name);
        } else if let Some(journal) = &state.journal {
            journal.write(name, target.max(state.memory.actual));
        }
        return http(204, "");
    }
    if text.starts_with("put /memory/limits ") {
        state.memory.limits = serde_json::from_slice(body).unwrap();
        return http(204, "");
    }
    if text.starts_with("post /vm/pause ") || text.starts_with("post /vm/resume ") {
        let asked: PauseRequest =
            if body.is_empty() { PauseRequest::default() } else { serde_json::from_slice(body).unwrap() };
        return steer(&mut state, manner, text.starts_with("post /vm/pause "), asked.by);
    }
    if text.starts_with("post /vm/") {
        state.presses += u64::from(text.starts_with("post /vm/power-button "));
        return done(manner);
    }
    http(404, r#"{"error":"no such thing"}"#)
}

/// As a VM does in simple cases; what a real one does is tested in `vmm::state`.
fn steer(state: &mut State, manner: Manner, pauses: bool, by: Pauser) -> Vec<u8> {
    state.steered += 1;
    if manner == Manner::RefusesPauses {
        return http(500, r#"{"error":"a vCPU hangs"}"#);
    }
    if by == Pauser::Balancer && state.memory.paused_by == Some(Pauser::Operator) {
        return http(409, r#"{"error":"the VM is paused by an operator"}"#);
    }
    state.memory.paused_by = pauses.then_some(by);
    done(manner)
}

fn done(manner: Manner) -> Vec<u8> {
    if manner == Manner::ActsMutely { Vec::new() } else { http(204, "") }
}

fn http(status: u16, body: &str) -> Vec<u8> {
    let length = if status == 204 { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{length}\r\n{body}").into_bytes()
}
