//! Clients that look at a running VM's console, and one of them that may write to it.
//!
//! They come over the VM's API and go as they like. Whoever comes gets the last output first. No client holds the
//! guest back: one that is slow misses some, and a mark stands where that is.

use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::platform::serial::{FLUSH_AFTER, Port, missing};
use event_manager::{EventOps, EventSet, Events};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::client;

/// Clients at a time.
pub const MOST_ATTACHED: usize = 8;

/// Bytes read from a client, or written to one, at a time.
const CHUNK: usize = 4 << 10;

/// Chunks written to one client before the others have their turn.
const MOST_CHUNKS: usize = 16;

/// How long the end of a VM waits until all clients together have its last output.
const PATIENCE: Duration = Duration::from_secs(1);

const SUPERSEDED: &[u8] = b"\r\n[ballast: another client writes to this console now; you watch it]\r\n";

/// What a client wants of the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To see output.
    Watch,
    /// To write as well, if no other client does.
    Write,
    /// To write in the place of whoever does now.
    TakeOver,
}

impl Mode {
    /// As it is written in a request.
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "watch" => Some(Self::Watch),
            "write" => Some(Self::Write),
            "take-over" => Some(Self::TakeOver),
            _ => None,
        }
    }
}

/// Why a client can't be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// Too many are.
    #[error("{MOST_ATTACHED} clients are attached to this console, and no more may be: end one of them")]
    Full,
    /// Another one writes.
    #[error(
        "another client writes to this console: watch it (`ballast console --watch`), or take over (`--take-over`)"
    )]
    HasWriter,
}

/// Places for clients of a console. Shared by the API, where they come, and the event loop that serves them.
pub struct Attachments {
    state: Mutex<State>,
    event: EventFd,
}

#[derive(Default)]
struct State {
    newcomers: Vec<Newcomer>,
    taken: usize,
    /// Which place belongs to the client that writes.
    writer: Option<u64>,
    next: u64,
}

struct Newcomer {
    place: Place,
    stream: UnixStream,
    greeting: Vec<u8>,
    input: Vec<u8>,
}

/// A client's place. It is free again once this goes.
pub struct Place {
    attachments: Arc<Attachments>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.attachments.state.lock();
        state.taken = state.taken.saturating_sub(1);
        state.writer.take_if(|writer| *writer == self.number);
    }
}

impl Place {
    /// Hands over the client's connection: it is sent `greeting`, then output. What it has sent already is `input`.
    pub fn serve(self, stream: UnixStream, greeting: Vec<u8>, input: Vec<u8>) {
        let attachments = Arc::clone(&self.attachments);
        attachments.state.lock().newcomers.push(Newcomer { place: self, stream, greeting, input });
        // The one failure is a full counter, which is readable.
        let _ = attachments.event.write(1);
    }

    fn writes(&self) -> bool {
        self.attachments.state.lock().writer == Some(self.number)
    }

    fn write_no_more(&self) {
        self.attachments.state.lock().writer.take_if(|writer| *writer == self.number);
    }
}

impl Attachments {
    /// Nobody is attached yet.
    ///
    /// # Errors
    /// No descriptor can be had.
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Arc::new(Self { state: Mutex::default(), event }))
    }

    /// A place for one more client.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn place(self: &Arc<Self>, mode: Mode) -> Result<Place, AttachError> {
        let mut state = self.state.lock();
        if state.taken >= MOST_ATTACHED {
            return Err(AttachError::Full);
        }
        if mode == Mode::Write && state.writer.is_some() {
            return Err(AttachError::HasWriter);
        }
        state.taken += 1;
        let number = state.next;
        state.next += 1;
        if mode != Mode::Watch {
            state.writer = Some(number);
        }
        Ok(Place { attachments: Arc::clone(self), number })
    }
}

/// The clients that are served, on the event loop of the console's input.
pub(super) struct Attached {
    attachments: Arc<Attachments>,
    port: Arc<Port>,
    /// Fires when output has come together that is to be sent: not each byte is a wake-up.
    timer: TimerFd,
    clients: Vec<Client>,
}

struct Client {
    place: Place,
    stream: UnixStream,
    /// Where in the port's output it is; `None` before its first byte.
    position: Option<u64>,
    unsent: Vec<u8>,
    sent: usize,
    /// Input that the port had no room for: at most one chunk.
    input: Vec<u8>,
    sends: bool,
    /// It writes, as far as it knows.
    writes: bool,
    /// There may be more for it, once its socket takes it.
    has_more: bool,
    watched: EventSet,
}

/// A client has gone.
struct Gone;

impl Attached {
    pub(super) fn new(attachments: Arc<Attachments>, port: Arc<Port>) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self { attachments, port, timer, clients: Vec::new() })
    }

    /// Where the API gets places for clients.
    pub(super) fn attachments(&self) -> &Arc<Attachments> {
        &self.attachments
    }

    pub(super) fn init(&self, ops: &mut EventOps) -> event_manager::Result<()> {
        ops.add(Events::new(&self.attachments.event, EventSet::IN))?;
        ops.add(Events::new(self.port.recent_event(), EventSet::IN))?;
        ops.add(Events::new(&self.timer, EventSet::IN))
    }

    /// Returns whether the event was for one of the clients, or for all of them.
    pub(super) fn process(&mut self, events: &Events, ops: &mut EventOps) -> bool {
        let fd = events.fd();
        if fd == self.attachments.event.as_raw_fd() {
            let _ = self.attachments.event.read();
            self.take_in(ops);
        } else if fd == self.port.recent_event().as_raw_fd() {
            let _ = self.port.recent_event().read();
            // Without a timer the clients would be told at the next output.
            let _ = self.timer.reset(FLUSH_AFTER, None);
        } else if fd == self.timer.as_raw_fd() {
            let _ = self.timer.wait();
            self.serve_all(ops, |client, port| client.send(port));
        } else if self.clients.iter().any(|client| client.fd() == fd) {
            let set = events.event_set();
            self.serve_all(ops, |client, port| {
                if client.fd() != fd {
                    return Ok(());
                }
                if set.intersects(EventSet::HANG_UP.union(EventSet::ERROR)) {
                    return Err(Gone);
                }
                if set.contains(EventSet::IN) {
                    client.read(port)?;
                }
                client.send(port)
            });
        } else {
            return false;
        }
        true
    }

    /// The port has room for input again.
    pub(super) fn has_room(&mut self, ops: &mut EventOps) {
        self.serve_all(ops, |client, port| {
            client.deliver(port);
            Ok(())
        });
    }

    /// The VM has ended: sends what is left, and lets all clients go.
    pub(super) fn finish(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let newcomers = std::mem::take(&mut self.attachments.state.lock().newcomers);
        self.clients.extend(newcomers.into_iter().map(Client::new));
        for mut client in self.clients.drain(..) {
            while client.send(&self.port).is_ok() && client.has_unsent() {
                if !client.is_writable_before(deadline) {
                    break;
                }
            }
        }
    }

    fn take_in(&mut self, ops: &mut EventOps) {
        let newcomers = std::mem::take(&mut self.attachments.state.lock().newcomers);
        for newcomer in newcomers {
            let client = Client::new(newcomer);
            if let Err(error) = ops.add(Events::new_raw(client.fd(), EventSet::empty())) {
                tracing::warn!("a client of the console can't be served: {error}");
                continue;
            }
            self.clients.push(client);
        }
        self.serve_all(ops, |client, port| {
            client.deliver(port);
            client.send(port)
        });
    }

    fn serve_all(
        &mut self,
        ops: &mut EventOps,
        mut serve: impl FnMut(&mut Client, &Port) -> Result<(), Gone>,
    ) {
        let port = &self.port;
        self.clients.retain_mut(|client| {
            let stays = serve(client, port).is_ok() && client.watch(ops);
            if !stays {
                let _ = ops.remove(Events::empty_raw(client.fd()));
            }
            stays
        });
    }
}

impl Client {
    fn new(newcomer: Newcomer) -> Self {
        let Newcomer { place, stream, greeting, input } = newcomer;
        Self {
            writes: place.writes(),
            place,
            stream,
            position: None,
            unsent: greeting,
            sent: 0,
            input,
            sends: true,
            has_more: false,
            watched: EventSet::empty(),
        }
    }

    fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    fn has_unsent(&self) -> bool {
        self.has_more || self.sent < self.unsent.len()
    }

    /// Watches its socket for what can be done. That it has gone is told unasked. Returns whether that worked.
    fn watch(&mut self, ops: &mut EventOps) -> bool {
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, self.sends && self.input.is_empty());
        wanted.set(EventSet::OUT, self.has_unsent());
        if wanted == self.watched {
            return true;
        }
        self.watched = wanted;
        ops.modify(Events::new_raw(self.fd(), wanted)).is_ok()
    }

    /// Takes what it sends. Only the one that writes is heard.
    fn read(&mut self, port: &Port) -> Result<(), Gone> {
        if !self.sends || !self.input.is_empty() {
            return Ok(());
        }
        let mut chunk = [0; CHUNK];
        match client::read(&self.stream, &mut chunk) {
            Ok(0) => {
                // Who has nothing more to say may still listen.
                self.sends = false;
                self.place.write_no_more();
            }
            Ok(count) => {
                self.input.extend(chunk.iter().take(count));
                self.deliver(port);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return Err(Gone),
        }
        Ok(())
    }

    fn deliver(&mut self, port: &Port) {
        if self.input.is_empty() {
            return;
        }
        if !self.place.writes() {
            self.input.clear();
            return;
        }
        let taken = port.enqueue(&self.input);
        self.input.drain(..taken.min(self.input.len()));
    }

    /// Sends as much as its socket takes, within bounds.
    fn send(&mut self, port: &Port) -> Result<(), Gone> {
        if self.writes && self.sends && !self.place.writes() {
            self.writes = false;
            self.unsent.extend_from_slice(SUPERSEDED);
        }
        for _ in 0..MOST_CHUNKS {
            if self.sent >= self.unsent.len() && !self.fill(port) {
                self.has_more = false;
                return Ok(());
            }
            match (&self.stream).write(self.unsent.get(self.sent..).unwrap_or_default()) {
                Ok(0) => return Err(Gone),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Err(Gone),
            }
        }
        self.has_more = true;
        Ok(())
    }

    /// Gets the next output. Where there is none, it will be told of it.
    fn fill(&mut self, port: &Port) -> bool {
        (self.unsent, self.sent) = (Vec::new(), 0);
        let mut output = Vec::new();
        let read = port.read_recent(self.position.unwrap_or(0), CHUNK, &mut output);
        if self.position.is_none() && read.missed > 0 {
            // What it sees first begins with a line.
            let end = output.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            output.drain(..end);
        } else if read.missed > 0 {
            self.unsent = missing(read.missed);
        }
        self.position = Some(read.next);
        self.unsent.append(&mut output);
        if self.unsent.is_empty() {
            port.await_recent(read.next);
        }
        !self.unsent.is_empty()
    }

    fn is_writable_before(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(left) else { return false };
        let mut watched = [PollFd::new(&self.stream, PollFlags::OUT)];
        poll(&mut watched, Some(&timeout)).is_ok_and(|ready| ready > 0)
    }
}
