//! One client: reading a request, waiting for its answer, or writing it, one after the other.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::epoll::EventSet;

use super::http::{self, Answer, HandOver, Later, Parsed, Request, Response};
use super::stream::Stream;

/// How long a client may say nothing between two requests.
pub const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// How long one request may take to arrive, or one response to be fetched.
pub const TRANSFER_LIMIT: Duration = Duration::from_secs(10);

/// How long a client has its place to itself, from when it came, from the first byte of its request and from
/// its answer. After that the place goes to another that waits for one.
pub const TURN: Duration = Duration::from_secs(2);

/// How long a client that was turned away may go on sending.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// Steps of one client before the others have their turn.
const MOST_STEPS: usize = 16;

/// A client that waits for events may do so for as long as it likes.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

const CHUNK: usize = 4 << 10;

/// What is to happen with a connection next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing until its socket is ready or its time is over.
    Wait,
    /// It has more to do at once, after the others.
    Again,
    /// It has ended.
    Close,
    /// Somebody else goes on with it: [`Connection::hand_over`].
    HandOver,
}

enum State {
    /// Waiting for a request, or for the rest of one.
    Reading,
    /// The last request can't be answered yet; its answer is asked for when something has come, or its
    /// time is over.
    Waiting { since: Instant, later: Later, framing: Framing },
    /// Somebody else is to go on with it.
    HandingOver(HandOver),
    /// Sending a response.
    Writing { response: Vec<u8>, sent: usize, keep_alive: bool },
    /// Sending lines as they come; `unsent` is what the socket has not taken yet.
    Streaming { stream: Stream, unsent: Vec<u8>, sent: usize },
    /// The last response is out. Closing while the client still sends would make
    /// its next write fail before it could read that response.
    Draining,
}

/// What of a request tells how its answer is sent.
#[derive(Clone, Copy)]
struct Framing {
    keep_alive: bool,
    without_body: bool,
}

/// Answers a request.
pub type Answering<'a> = dyn Fn(Request<'_>) -> Answer + 'a;

/// One client's connection.
pub struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    state: State,
    deadline: Instant,
    /// From when on its place may be given to another; `None` while something is done for it.
    turn_ends: Option<Instant>,
}

impl Connection {
    /// A client that has just come.
    ///
    /// # Errors
    /// When the socket can't be made non-blocking.
    pub fn new(stream: UnixStream, now: Instant) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (deadline, turn_ends) = (now + IDLE_LIMIT, Some(now + TURN));
        Ok(Self { stream, input: Vec::new(), state: State::Reading, deadline, turn_ends })
    }

    /// The socket, to be watched.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// What the socket is to be watched for.
    pub const fn interest(&self) -> EventSet {
        match self.state {
            State::Reading | State::Draining => EventSet::IN,
            // What it sends meanwhile has time. That it has gone is told unasked (EPOLLHUP).
            State::Waiting { .. } | State::HandingOver(_) => EventSet::empty(),
            State::Writing { .. } => EventSet::OUT,
            // Input is the word that the client has gone.
            State::Streaming { ref unsent, .. } if unsent.is_empty() => EventSet::IN,
            State::Streaming { .. } => EventSet::IN.union(EventSet::OUT),
        }
    }

    /// When the client's patience with us, and ours with it, ends. One that waits is answered then.
    pub const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// From when on its place may be given to another; `None` while something is done for it.
    pub const fn turn_ends(&self) -> Option<Instant> {
        self.turn_ends
    }

    /// Whether it waits for events.
    pub const fn is_stream(&self) -> bool {
        matches!(self.state, State::Streaming { .. })
    }

    /// Whether it waits for an answer.
    pub const fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting { .. })
    }

    /// Goes on as far as the socket allows, a bounded number of steps.
    pub fn advance(&mut self, now: Instant, answer: &Answering<'_>) -> Next {
        for _ in 0..MOST_STEPS {
            let step = match &self.state {
                State::Reading => self.read(now, answer),
                State::Waiting { .. } => self.wait_on(now),
                State::Writing { .. } => self.write(now),
                State::Streaming { .. } => self.stream(now),
                State::Draining => self.drain(),
                State::HandingOver(_) => Ok(Next::HandOver),
            };
            match step {
                Ok(Next::Again) => {}
                Ok(next) => return next,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Wait,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The client is gone; there is nobody left to tell.
                Err(_) => return Next::Close,
            }
        }
        Next::Again
    }

    /// Has whoever answers go on with it. Its socket must be watched no longer.
    pub fn hand_over(self) {
        if let State::HandingOver(hand_over) = self.state {
            hand_over(self.stream, self.input);
        }
    }

    /// Sends what is left of a response; for the moment when the server ends.
    pub fn finish(mut self) {
        if let State::Writing { response, sent, .. } = &self.state {
            let left = response.get(*sent..).unwrap_or_default();
            let sending = self.stream.set_nonblocking(false).and_then(|()| {
                self.stream.set_write_timeout(Some(Duration::from_millis(100)))?;
                self.stream.write_all(left)
            });
            // A client that does not fetch its answer now goes without.
            let _ = sending;
        }
    }

    /// Answers the request at the front of the input.
    fn read(&mut self, now: Instant, answer: &Answering<'_>) -> io::Result<Next> {
        let without_body = self.input.starts_with(b"HEAD ");
        let (answer, keep_alive, taken) = match http::parse(&self.input) {
            // Who has gone was told by its own clock that this failed: it must not be done after all.
            Parsed::Complete { .. } if has_hung_up(&self.stream)? => return Ok(Next::Close),
            Parsed::Complete { request, length, keep_alive } => (answer(request), keep_alive, length),
            Parsed::Malformed(response) => (response.into(), false, self.input.len()),
            Parsed::Incomplete => return self.receive(now),
        };
        self.input.drain(..taken);
        self.input.shrink_to(CHUNK);
        let framing = Framing { keep_alive, without_body };
        match answer {
            Answer::Now(response) => Ok(self.respond(now, &response, framing)),
            Answer::Later(limit, later) => {
                let since = Instant::now();
                self.state = State::Waiting { since, later, framing };
                (self.deadline, self.turn_ends) = (since + limit, None);
                Ok(Next::Wait)
            }
            Answer::HandOver(hand_over) => {
                self.state = State::HandingOver(hand_over);
                Ok(Next::HandOver)
            }
        }
    }

    /// Asks for an answer that was not there yet.
    fn wait_on(&mut self, now: Instant) -> io::Result<Next> {
        let State::Waiting { since, later, framing } = &mut self.state else { return Ok(Next::Again) };
        let (answer, framing) = (later(since.elapsed()), *framing);
        Ok(answer.map_or(Next::Wait, |response| self.respond(now, &response, framing)))
    }

    fn respond(&mut self, now: Instant, response: &Response, framing: Framing) -> Next {
        let Framing { keep_alive, without_body } = framing;
        self.deadline = now + TRANSFER_LIMIT;
        if let Some(stream) = response.stream.clone().filter(|_| !without_body) {
            self.turn_ends = None;
            self.state = State::Streaming { stream, unsent: response.head(false), sent: 0 };
        } else {
            self.turn_ends = Some(now + TURN);
            let mut bytes = response.head(keep_alive);
            if !without_body {
                bytes.extend_from_slice(&response.body);
            }
            self.state = State::Writing { response: bytes, sent: 0, keep_alive };
        }
        Next::Again
    }

    fn receive(&mut self, now: Instant) -> io::Result<Next> {
        let mut chunk = [0; CHUNK];
        let count = self.stream.read(&mut chunk)?;
        if count == 0 {
            return Ok(Next::Close);
        }
        if self.input.is_empty() {
            (self.deadline, self.turn_ends) = (now + TRANSFER_LIMIT, Some(now + TURN));
        }
        self.input.extend(chunk.iter().take(count));
        Ok(Next::Again)
    }

    fn write(&mut self, now: Instant) -> io::Result<Next> {
        let State::Writing { response, sent, keep_alive } = &mut self.state else {
            return Ok(Next::Again);
        };
        while let Some(left) = response.get(*sent..).filter(|left| !left.is_empty()) {
            match self.stream.write(left)? {
                0 => return Ok(Next::Close),
                count => *sent += count,
            }
        }
        if *keep_alive {
            let (limit, turn) =
                if self.input.is_empty() { (IDLE_LIMIT, Duration::ZERO) } else { (TRANSFER_LIMIT, TURN) };
            self.state = State::Reading;
            (self.deadline, self.turn_ends) = (now + limit, Some(now + turn));
        } else {
            self.stream.shutdown(Shutdown::Write)?;
            self.input = Vec::new();
            self.state = State::Draining;
            (self.deadline, self.turn_ends) = (now + DRAIN_LIMIT, None);
        }
        Ok(Next::Again)
    }

    /// Sends what there is, then looks for more. Who does not take it in time is slow,
    /// and slow readers are sent away.
    fn stream(&mut self, now: Instant) -> io::Result<Next> {
        let State::Streaming { stream, unsent, sent } = &mut self.state else {
            return Ok(Next::Again);
        };
        while let Some(left) = unsent.get(*sent..).filter(|left| !left.is_empty()) {
            match self.stream.write(left)? {
                0 => return Ok(Next::Close),
                count => *sent += count,
            }
        }
        let Ok(lines) = stream.lines() else {
            return Ok(Next::Close);
        };
        (*unsent, *sent) = (lines, 0);
        if !unsent.is_empty() {
            self.deadline = now + TRANSFER_LIMIT;
            return Ok(Next::Again);
        }
        self.deadline = now + FOR_EVER;
        // What such a client sends means nothing; that it has ended does.
        let count = self.stream.read(&mut [0; CHUNK])?;
        Ok(if count == 0 { Next::Close } else { Next::Again })
    }

    fn drain(&mut self) -> io::Result<Next> {
        let count = self.stream.read(&mut [0; CHUNK])?;
        Ok(if count == 0 { Next::Close } else { Next::Again })
    }
}

/// Whether the client has closed its end. One that only sends no more still reads.
fn has_hung_up(stream: &UnixStream) -> io::Result<bool> {
    let mut watched = [PollFd::new(stream, PollFlags::empty())];
    poll(&mut watched, Some(&Timespec::default()))?;
    Ok(watched.iter().any(|watched| watched.revents().contains(PollFlags::HUP)))
}
