//! The API's thread: one event loop over the listening socket and a few clients.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::connection::{Answering, Connection, Next};
use super::routes::route;
use super::socket::{BindError, LOOK_EVERY, Listening};
use crate::control::Control;

/// Clients at a time. A new one takes the place of the one whose turn has been over for longest; while
/// something is done for all of them, or each still has its turn, it waits.
pub const MOST_CONNECTIONS: usize = 16;

/// Tokens below this are slots of connections.
const LISTENER: u64 = MOST_CONNECTIONS as u64;
const STOP: u64 = LISTENER + 1;
const EVENTS: u64 = STOP + 1;

/// How long to leave new clients alone after the kernel could not accept one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An API that clients can connect to; [`Server::run`] answers them.
#[derive(Debug)]
pub struct Server {
    socket: Listening,
    stop: EventFd,
    look_every: Duration,
}

impl Server {
    /// Listens at `path`, mode 0600 from its first moment.
    ///
    /// # Errors
    /// [`BindError`]; a socket that a dead VM left behind is none.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| BindError::Io { path: path.to_owned(), source })?;
        Ok(Self { socket: Listening::at(path)?, stop, look_every: LOOK_EVERY })
    }

    /// The same, looking so often whether somebody has removed the socket.
    #[must_use]
    pub fn looking_every(mut self, interval: Duration) -> Self {
        self.look_every = interval;
        self
    }

    /// A descriptor that ends [`Server::run`] when it is written to.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn stopper(&self) -> io::Result<EventFd> {
        self.stop.try_clone()
    }

    /// Serves `control` until the stopper is written to, then removes the socket.
    ///
    /// # Errors
    /// When the kernel refuses the event loop itself. What clients do is no error.
    pub fn run(self, control: &Arc<Control>) -> io::Result<()> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        control.events().wake_with(wake.try_clone()?);
        self.serve(&wake, &|request| route(request, control))
    }

    /// Makes the socket again if somebody has removed it. True if there is another one to be watched.
    fn look(&mut self, epoll: &Epoll) -> io::Result<bool> {
        let Some(before) = self.socket.look() else { return Ok(false) };
        // To close its only descriptor takes the other one out of the epoll set.
        drop(before);
        let event = EpollEvent::new(EventSet::IN, LISTENER);
        epoll.ctl(ControlOperation::Add, self.socket.listener().as_raw_fd(), event)?;
        Ok(true)
    }

    fn serve(mut self, wake: &EventFd, answer: &Answering<'_>) -> io::Result<()> {
        let epoll = Epoll::new()?;
        let watch = |fd, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token));
        watch(self.stop.as_raw_fd(), STOP)?;
        watch(self.socket.listener().as_raw_fd(), LISTENER)?;
        watch(wake.as_raw_fd(), EVENTS)?;
        let mut clients = Clients::new(&epoll);
        let mut events = [EpollEvent::default(); MOST_CONNECTIONS + 3];
        let mut gate = AcceptGate::Open;
        let mut next_look = Instant::now() + self.look_every;
        loop {
            let count = match epoll.wait(clients.timeout(&gate, next_look, Instant::now()), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let now = Instant::now();
            let mut has_newcomer = false;
            for event in events.iter().take(count) {
                match event.data() {
                    STOP => {
                        clients.finish();
                        return Ok(());
                    }
                    LISTENER => has_newcomer = true,
                    EVENTS => {
                        // Empty already where an earlier event has read it.
                        let _ = wake.read();
                        clients.advance_waiting(now, answer);
                    }
                    slot => clients.socket_ready(slot as usize, now, answer),
                }
            }
            clients.advance_due(now, answer);
            // After the others' turn: a client that has just asked something is not idle.
            if has_newcomer {
                gate = clients.accept(self.socket.listener(), now);
            }
            if next_look <= now {
                next_look = now + self.look_every;
                if self.look(&epoll)? {
                    gate = AcceptGate::Open;
                }
            }
            gate = self.update_gate(&epoll, gate, &clients, now)?;
        }
    }

    /// Watches the listening socket only while a client could be taken on:
    /// it is level-triggered, and would keep the loop spinning otherwise.
    fn update_gate(
        &self,
        epoll: &Epoll,
        gate: AcceptGate,
        clients: &Clients<'_>,
        now: Instant,
    ) -> io::Result<AcceptGate> {
        let (next, events) = match gate {
            AcceptGate::Full if clients.has_room(now) => (AcceptGate::Open, EventSet::IN),
            AcceptGate::Resting { until, .. } if until <= now => (AcceptGate::Open, EventSet::IN),
            AcceptGate::Full => (AcceptGate::Full, EventSet::empty()),
            AcceptGate::Resting { until, watched: true } => {
                (AcceptGate::Resting { until, watched: false }, EventSet::empty())
            }
            gate => return Ok(gate),
        };
        epoll.ctl(
            ControlOperation::Modify,
            self.socket.listener().as_raw_fd(),
            EpollEvent::new(events, LISTENER),
        )?;
        Ok(next)
    }
}

/// Whether new clients are taken on.
#[derive(Clone, Copy, Debug)]
enum AcceptGate {
    Open,
    /// Every place is taken by a client that has its turn.
    Full,
    /// The kernel could not accept (no descriptors left, most likely).
    Resting {
        until: Instant,
        watched: bool,
    },
}

struct Client {
    connection: Connection,
    watched: EventSet,
    again: bool,
}

struct Clients<'a> {
    epoll: &'a Epoll,
    slots: [Option<Client>; MOST_CONNECTIONS],
}

impl<'a> Clients<'a> {
    fn new(epoll: &'a Epoll) -> Self {
        Self { epoll, slots: [const { None }; MOST_CONNECTIONS] }
    }

    /// Milliseconds that nothing will happen for by itself, but for the `next_look` at the socket's file.
    fn timeout(&self, gate: &AcceptGate, next_look: Instant, now: Instant) -> i32 {
        let clients = self.slots.iter().flatten();
        let rest = match gate {
            AcceptGate::Resting { until, .. } => Some(*until),
            AcceptGate::Full => self.turns().map(|(ends, _)| ends).min(),
            AcceptGate::Open => None,
        };
        let soonest = clients
            .map(|client| if client.again { now } else { client.connection.deadline() })
            .chain(rest)
            .fold(next_look, Instant::min);
        // Rounded up, or the loop would spin through the last millisecond.
        let wait = soonest.saturating_duration_since(now).as_nanos().div_ceil(1_000_000);
        i32::try_from(wait).unwrap_or(i32::MAX)
    }

    fn has_room(&self, now: Instant) -> bool {
        self.slots.iter().any(Option::is_none) || self.turns().any(|(ends, _)| ends <= now)
    }

    /// When the turns of the clients end that may have to give their places away, and which places.
    fn turns(&self) -> impl Iterator<Item = (Instant, usize)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(index, slot)| Some((slot.as_ref()?.connection.turn_ends()?, index)))
    }

    /// A free place, if need be that of the client whose turn ended first.
    fn place(&mut self, now: Instant) -> Option<usize> {
        if let Some(free) = self.slots.iter().position(Option::is_none) {
            return Some(free);
        }
        let (_, index) = self.turns().min().filter(|(ends, _)| *ends <= now)?;
        self.close(index);
        Some(index)
    }

    fn accept(&mut self, listener: &UnixListener, now: Instant) -> AcceptGate {
        let Some(index) = self.place(now) else {
            return AcceptGate::Full;
        };
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                return match error.kind() {
                    // The client left before it was let in.
                    io::ErrorKind::WouldBlock
                    | io::ErrorKind::Interrupted
                    | io::ErrorKind::ConnectionAborted => AcceptGate::Open,
                    _ => {
                        tracing::warn!("the API can't take on a client: {error}");
                        AcceptGate::Resting { until: now + ACCEPT_PAUSE, watched: true }
                    }
                };
            }
        };
        if let Ok(connection) = Connection::new(stream, now) {
            let watched = connection.interest();
            let event = EpollEvent::new(watched, index as u64);
            if self.epoll.ctl(ControlOperation::Add, connection.fd(), event).is_ok()
                && let Some(slot) = self.slots.get_mut(index)
            {
                *slot = Some(Client { connection, watched, again: false });
            }
        }
        AcceptGate::Open
    }

    fn waits(&self, index: usize) -> bool {
        self.slots.get(index).and_then(Option::as_ref).is_some_and(|client| client.connection.is_waiting())
    }

    /// A client's socket has something.
    fn socket_ready(&mut self, index: usize, now: Instant, answer: &Answering<'_>) {
        // Of one that waits nothing is wanted: all that comes is its end.
        if self.waits(index) {
            self.close(index);
        } else {
            self.advance(index, now, answer);
        }
    }

    fn advance(&mut self, index: usize, now: Instant, answer: &Answering<'_>) {
        let Some(Some(client)) = self.slots.get_mut(index) else {
            return;
        };
        let next = client.connection.advance(now, answer);
        client.again = next == Next::Again;
        let interest = client.connection.interest();
        let gone = next == Next::Close
            || (interest != client.watched && {
                client.watched = interest;
                watch_anew(self.epoll, client.connection.fd(), interest, index).is_err()
            });
        if gone {
            self.close(index);
        } else if next == Next::HandOver {
            self.hand_over(index);
        }
    }

    /// Lets go of a connection that lives on.
    fn hand_over(&mut self, index: usize) {
        let Some(client) = self.slots.get_mut(index).and_then(Option::take) else { return };
        let none = EpollEvent::default();
        if self.epoll.ctl(ControlOperation::Delete, client.connection.fd(), none).is_ok() {
            client.connection.hand_over();
        }
    }

    /// Something has happened that some clients wait for.
    fn advance_waiting(&mut self, now: Instant, answer: &Answering<'_>) {
        for index in 0..MOST_CONNECTIONS {
            let connection = self.slots.get(index).and_then(Option::as_ref).map(|client| &client.connection);
            if connection.is_some_and(|connection| connection.is_stream() || connection.is_waiting()) {
                self.advance(index, now, answer);
            }
        }
    }

    /// Serves those with work left over and those that have waited long enough, and closes the others
    /// whose time is over.
    fn advance_due(&mut self, now: Instant, answer: &Answering<'_>) {
        for index in 0..MOST_CONNECTIONS {
            let Some(Some(client)) = self.slots.get(index) else {
                continue;
            };
            let is_over = client.connection.deadline() <= now;
            if is_over && !client.connection.is_waiting() {
                self.close(index);
            } else if is_over || client.again {
                self.advance(index, now, answer);
            }
        }
    }

    fn close(&mut self, index: usize) {
        // Closing the only descriptor of a socket takes it out of the epoll set.
        if let Some(slot) = self.slots.get_mut(index) {
            *slot = None;
        }
    }

    fn finish(&mut self) {
        for client in self.slots.iter_mut().filter_map(Option::take) {
            client.connection.finish();
        }
    }
}

fn watch_anew(epoll: &Epoll, fd: RawFd, events: EventSet, index: usize) -> io::Result<()> {
    epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(events, index as u64))
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
#[cfg(test)]
#[path = "waiting_tests.rs"]
mod waiting_tests;
