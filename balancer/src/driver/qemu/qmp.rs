//! QEMU's machine protocol over a Unix socket (QEMU, `docs/interop/qmp-spec.rst`).
//!
//! One JSON object a line: a greeting, an answer to each command, and events at any moment. QEMU serves one
//! client at a time. The kernel connects another one, which then waits until the first has gone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use api::client::{Acquaintance, Error, LARGEST_ANSWER, Peer, PeerStream};
use api::text::clean;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::timeout;

/// How many events are kept until they are read; QEMU sends most kinds at most once a second.
const MOST_EVENTS: usize = 64;

/// QEMU's sentences have fields of their own.
static PEER: Peer = Peer {
    version: None,
    sentence: |_| None,
    where_to_look: "",
    should_be: "is it QEMU's machine protocol (-qmp), and not its human monitor?",
};

const BUSY: &str = "QMP serves one client at a time, and another is connected; give the balancer a socket of its \
                    own (-qmp unix:PATH,server=on,wait=off)";

/// One line from QEMU: one of its fields is there.
#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<QmpError>,
    event: Option<String>,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct QmpError {
    class: String,
    desc: String,
}

/// The events of QEMU that matter to the balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The vCPUs stand still.
    Stop,
    /// They run again.
    Resume,
    /// The guest has ended.
    Shutdown,
    /// The guest's kernel has panicked.
    Panicked,
}

impl Event {
    fn named(name: &str) -> Option<Self> {
        match name {
            "STOP" => Some(Self::Stop),
            "RESUME" => Some(Self::Resume),
            "SHUTDOWN" => Some(Self::Shutdown),
            "GUEST_PANICKED" => Some(Self::Panicked),
            _ => None,
        }
    }
}

/// A connection to QEMU.
pub struct Qmp {
    socket: PathBuf,
    timeout: Duration,
    stream: BufReader<PeerStream>,
    /// The beginning of a line.
    line: Vec<u8>,
    greeted: bool,
    next_id: u64,
    events: Vec<Event>,
}

impl Qmp {
    /// Connects; QEMU has not said anything yet.
    pub async fn connect(socket: &Path, within: Duration) -> Result<Self, Error> {
        let stream = PeerStream::connect(socket).await.map_err(|error| {
            if error.kind() == std::io::ErrorKind::WouldBlock {
                return Error::Busy { socket: socket.to_owned(), advice: BUSY };
            }
            Error::unreachable(&PEER, socket, "the connection", &error)
        })?;
        Ok(Self {
            socket: socket.to_owned(),
            timeout: within,
            stream: BufReader::new(stream),
            line: Vec::new(),
            greeted: false,
            next_id: 0,
            events: Vec::new(),
        })
    }

    /// Who is at the other end, by the kernel's word.
    pub fn acquaintance(&self) -> &Acquaintance {
        self.stream.get_ref().acquaintance()
    }

    /// Waits for QEMU's greeting and begins. May be called again after [`Error::Busy`], which it returns
    /// while another client is served.
    pub async fn greet(&mut self) -> Result<(), Error> {
        if self.greeted {
            return Ok(());
        }
        let request = "the greeting";
        let Ok(message) = timeout(self.timeout, self.next(request)).await else {
            return Err(Error::Busy { socket: self.socket.clone(), advice: BUSY });
        };
        if message?.greeting.is_none() {
            return Err(self.nonsense(request, "no greeting"));
        }
        self.greeted = true;
        self.execute::<Value>("qmp_capabilities", json!({})).await.map(drop)
    }

    /// One command and its answer, within the time limit.
    pub async fn execute<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<T, Error> {
        let outcome = timeout(self.timeout, self.exchange(command, arguments)).await;
        let answer = outcome.unwrap_or_else(|_| {
            Err(Error::NotAnswering {
                socket: self.socket.clone(),
                request: command.to_owned(),
                within: self.timeout,
            })
        })?;
        serde_json::from_value(answer).map_err(|error| self.nonsense(command, &error.to_string()))
    }

    /// The events since the last call.
    pub fn events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// An answer that was well-formed and made no sense.
    pub fn nonsense(&self, request: &str, what: &str) -> Error {
        Error::Nonsense {
            peer: &PEER,
            socket: self.socket.clone(),
            request: request.to_owned(),
            what: clean(what),
        }
    }

    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.next_id += 1;
        let id = self.next_id;
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": id }));
        let sent = self.stream.get_mut().write_all(line.as_bytes()).await;
        sent.map_err(|error| self.hung_up(command, &error))?;
        let message = self.next(command).await?;
        if message.id != Some(id) {
            return Err(self.nonsense(command, "an answer to another question"));
        }
        if let Some(QmpError { class, desc }) = message.error {
            return Err(Error::Refused {
                socket: self.socket.clone(),
                request: command.to_owned(),
                status: clean(&class),
                error: clean(&desc),
            });
        }
        message.answer.ok_or_else(|| self.nonsense(command, "neither an answer nor an error"))
    }

    /// The next line that is no event. However many events come first, the bytes are bounded.
    async fn next(&mut self, request: &str) -> Result<Message, Error> {
        let mut left = LARGEST_ANSWER;
        loop {
            // What has come of a line stays here if this is called again after the time limit.
            let length = (&mut self.stream).take(left as u64).read_until(b'\n', &mut self.line).await;
            left = left.saturating_sub(length.map_err(|error| self.hung_up(request, &error))?);
            if !self.line.ends_with(b"\n") {
                return Err(match left {
                    0 => self.nonsense(request, &format!("more than {LARGEST_ANSWER} bytes")),
                    _ => self.hung_up(request, &std::io::ErrorKind::UnexpectedEof.into()),
                });
            }
            let line = std::mem::take(&mut self.line);
            if line.trim_ascii().is_empty() {
                continue;
            }
            let message: Message =
                serde_json::from_slice(&line).map_err(|error| self.nonsense(request, &error.to_string()))?;
            let Some(event) = message.event else { return Ok(message) };
            if let Some(event) = Event::named(&event)
                && self.events.len() < MOST_EVENTS
            {
                self.events.push(event);
            }
        }
    }

    fn hung_up(&self, request: &str, error: &std::io::Error) -> Error {
        Error::HungUp { socket: self.socket.clone(), request: request.to_owned(), cause: error.to_string() }
    }
}
