//! What comes in from the console's other end, on the event loop of the devices.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use devices::events::Subscriber;
use devices::platform::serial::Port;
use event_manager::{EventOps, EventSet, Events, Result as EventResult};
use vmm_sys_util::timerfd::TimerFd;

use super::attached::{Attached, Attachments};
use super::client::{self, Client};
use super::escape::Escape;
use crate::api_server::{CLIENT_COMES, Listening};
use crate::exit::Exit;
use crate::vcpu_set::VcpuSet;

/// Bytes read at a time.
const CHUNK: usize = 1024;

/// Clients that are taken or turned away at a time.
const AT_ONCE: usize = 64;

/// What may be typed ahead of a guest that does not read, in bytes. Keys are read even then: the next
/// ones may be those that end its VM.
const MOST_TYPED_AHEAD: usize = 1 << 20;

/// Where input comes from.
pub(super) enum Source {
    /// From nowhere.
    Nothing,
    /// Standard input.
    Stdin {
        input: File,
        escape: Escape,
        /// A person types it.
        typed: bool,
    },
    /// Whoever connects.
    Socket {
        socket: Listening,
        /// When to look whether the socket's file is still there.
        timer: TimerFd,
        client: Arc<Client>,
    },
}

/// Brings input to the port, as far as the guest takes it, and lets the port go on after a rest.
pub struct Input {
    source: Source,
    /// Clients that look at the console beside the source.
    attached: Attached,
    port: Arc<Port>,
    vcpu_set: Arc<VcpuSet>,
    /// Input that the port had no room for: at most one chunk, but for what is typed.
    left: Vec<u8>,
    /// What is watched for input now, and the client that it belongs to: its number is nobody else's meanwhile.
    watched: Option<(RawFd, Option<Arc<UnixStream>>)>,
    /// The source has ended, or that of the client who is there.
    ended: bool,
    /// The source can't be watched: it never makes anyone wait.
    is_file: bool,
}

impl Input {
    /// # Errors
    /// No descriptors can be had.
    pub(super) fn new(source: Source, port: Arc<Port>, vcpu_set: Arc<VcpuSet>) -> io::Result<Self> {
        let attached = Attached::new(Attachments::new()?, Arc::clone(&port))?;
        let (left, watched) = (Vec::new(), None);
        Ok(Self { source, attached, port, vcpu_set, left, watched, ended: false, is_file: false })
    }

    /// Where clients of the API are attached.
    pub(crate) fn attachments(&self) -> Arc<Attachments> {
        Arc::clone(self.attached.attachments())
    }

    /// The VM has ended: whoever is attached gets the last output.
    pub(super) fn finish(&mut self) {
        self.attached.finish();
    }

    fn is_typed(&self) -> bool {
        matches!(self.source, Source::Stdin { typed: true, .. })
    }

    /// Watches the source while there is room for what it brings.
    fn watch(&mut self, ops: &mut EventOps) {
        let wanted = match &self.source {
            _ if self.ended || self.is_file || !(self.left.is_empty() || self.is_typed()) => None,
            Source::Nothing => None,
            Source::Stdin { input, .. } => Some((input.as_raw_fd(), None)),
            Source::Socket { client, .. } => {
                client.current().map(|stream| (stream.as_raw_fd(), Some(stream)))
            }
        };
        let fd = wanted.as_ref().map(|(fd, _)| *fd);
        if fd == self.watched.as_ref().map(|(fd, _)| *fd) {
            return;
        }
        self.unwatch(ops);
        let Some((fd, stream)) = wanted else { return };
        match ops.add(Events::new_raw(fd, EventSet::IN)) {
            Ok(()) => self.watched = Some((fd, stream)),
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EPERM => {
                self.is_file = true;
                self.read_file();
            }
            Err(error) => tracing::warn!("the console's input can't be watched: {error}"),
        }
    }

    fn unwatch(&mut self, ops: &mut EventOps) {
        if let Some((fd, _)) = &self.watched {
            let _ = ops.remove(Events::empty_raw(*fd));
        }
        self.watched = None;
    }

    /// Reads on until the port has no more room.
    fn read_file(&mut self) {
        while self.left.is_empty() && !self.ended {
            self.read();
        }
    }

    /// The source has something, or has ended.
    fn read(&mut self) {
        let mut chunk = [0; CHUNK];
        let result = match &mut self.source {
            Source::Nothing => return,
            Source::Stdin { input, .. } => input.read(&mut chunk),
            Source::Socket { client, .. } => match client.current() {
                Some(stream) => client::read(&stream, &mut chunk),
                None => return,
            },
        };
        match result {
            Ok(count @ 1..) => {
                let bytes = chunk.get(..count).unwrap_or_default();
                match &mut self.source {
                    Source::Stdin { escape, .. } => {
                        if escape.filter(bytes, &mut self.left) {
                            self.vcpu_set.end(Exit::ConsoleQuit);
                        }
                    }
                    Source::Socket { .. } | Source::Nothing => self.left.extend_from_slice(bytes),
                }
                self.deliver();
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Ok(_) | Err(_) => {
                self.ended = true;
                // Who has nothing more to say may still listen.
                if let Source::Socket { client, .. } = &self.source
                    && let Some(stream) = client.current()
                    && client::has_gone(&stream)
                {
                    client.leave(&stream, &self.port);
                }
            }
        }
    }

    fn deliver(&mut self) {
        let taken = self.port.enqueue(&self.left);
        self.left.drain(..taken.min(self.left.len()));
        if self.left.len() > MOST_TYPED_AHEAD {
            tracing::warn!("the guest does not read its console: what is typed is lost");
            self.left.truncate(MOST_TYPED_AHEAD);
        }
    }

    /// Makes the socket again if somebody has removed it.
    fn look(&mut self, ops: &mut EventOps) -> EventResult<()> {
        let Source::Socket { socket, timer, .. } = &mut self.source else { return Ok(()) };
        let _ = timer.wait();
        if let Some(before) = socket.look() {
            ops.remove(Events::empty(&before))?;
            ops.add(Events::new(socket.listener(), CLIENT_COMES))?;
        }
        self.accept(ops);
        Ok(())
    }

    /// Takes clients, or turns them away while there is one. One that has gone, and whose input the guest does
    /// not read, keeps nobody away.
    fn accept(&mut self, ops: &mut EventOps) {
        for _ in 0..AT_ONCE {
            let Source::Socket { socket, client, .. } = &self.source else { return };
            let stream = match socket.next_client() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                // Until the next look.
                Err(error) => return tracing::warn!("the console can't take on a client yet: {error}"),
            };
            if client.replace(stream, &self.port) {
                self.ended = false;
                self.unwatch(ops);
            }
        }
    }
}

impl Subscriber for Input {
    fn init(&mut self, ops: &mut EventOps) -> EventResult<()> {
        ops.add(Events::new(self.port.room_event(), EventSet::IN))?;
        ops.add(Events::new_raw(self.port.timer(), EventSet::IN))?;
        if let Source::Socket { socket, timer, .. } = &self.source {
            ops.add(Events::new(socket.listener(), CLIENT_COMES))?;
            ops.add(Events::new_raw(timer.as_raw_fd(), EventSet::IN))?;
        }
        self.attached.init(ops)?;
        self.watch(ops);
        Ok(())
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) -> EventResult<()> {
        if self.attached.process(&events, ops) {
            return Ok(());
        }
        let fd = events.fd();
        let room = self.port.room_event();
        let (is_listener, is_look) = match &self.source {
            Source::Socket { socket, timer, .. } => {
                (socket.listener().as_raw_fd() == fd, timer.as_raw_fd() == fd)
            }
            Source::Stdin { .. } | Source::Nothing => (false, false),
        };
        if fd == self.port.timer() {
            self.port.wake();
        } else if fd == room.as_raw_fd() {
            let _ = room.read();
            self.deliver();
            self.attached.has_room(ops);
            if self.is_file {
                self.read_file();
            }
        } else if is_look {
            self.look(ops)?;
        } else if is_listener {
            self.accept(ops);
        } else if self.watched.as_ref().is_some_and(|(watched, _)| *watched == fd) {
            self.read();
        }
        self.watch(ops);
        Ok(())
    }
}
