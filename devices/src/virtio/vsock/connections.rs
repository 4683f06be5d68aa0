//! All connections of a guest, and whose turn it is to send to it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Answers, Connection, Data, Turn};
use super::packet::{Address, HEADER, HOST_CID, Operation, Packet};
use crate::virtio::queue::{Chain, IoVectors, Verdict};

/// Connections of one guest at a time.
pub const MOST_CONNECTIONS: usize = 128;

/// Resets that wait to be sent. More are not: their senders find out by themselves.
const MOST_RESETS: usize = 256;

/// The first of the host's ports that connections from the host come from.
const FIRST_PORT: u32 = 1 << 30;

/// Tokens of streams are pairs of ports; this one is no pair, as port -1 is none (`VMADDR_PORT_ANY`).
pub const NO_STREAM: u64 = u64::MAX;

/// The two ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Ports {
    host: u32,
    guest: u32,
}

impl Ports {
    fn token(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    fn of_token(token: u64) -> Self {
        Self { host: (token >> 32) as u32, guest: token as u32 }
    }
}

struct Entry {
    connection: Connection,
    /// It stands in the line of those that have something to send.
    has_turn: bool,
}

/// Opens a connection to the program on the host that serves a port.
pub type Dial = Box<dyn FnMut(u32) -> io::Result<UnixStream> + Send>;

/// The connections of a guest.
pub struct Connections {
    guest_cid: u64,
    dial: Dial,
    entries: BTreeMap<Ports, Entry>,
    turns: VecDeque<Ports>,
    resets: VecDeque<(Address, Address)>,
    epoll: Epoll,
    next_port: u32,
}

impl Connections {
    /// None yet, for the guest of `guest_cid`. What it wants of the host, `dial` opens.
    ///
    /// # Errors
    /// No descriptor can be had.
    pub fn new(guest_cid: u64, dial: Dial) -> io::Result<Self> {
        let (entries, turns, resets) = Default::default();
        Ok(Self { guest_cid, dial, entries, turns, resets, epoll: Epoll::new()?, next_port: FIRST_PORT })
    }

    /// Becomes readable when one of the streams is ready.
    pub fn readiness(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Watches something else as well, whose events have the token [`NO_STREAM`].
    pub fn watch_also(&self, descriptor: &impl AsRawFd) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, NO_STREAM);
        self.epoll.ctl(ControlOperation::Add, descriptor.as_raw_fd(), event)
    }

    /// A program on the host wants to speak to the guest's `port`.
    pub fn ask(&mut self, port: u32, stream: UnixStream, mut answers: Answers) {
        if self.entries.len() >= MOST_CONNECTIONS {
            return Connection::asked_by_host(stream, answers).refuse();
        }
        // More ports than connections: one is free.
        let mut ports = Ports { host: self.next_port, guest: port };
        while self.entries.contains_key(&ports) || ports.host == u32::MAX {
            ports.host = if ports.host >= u32::MAX - 1 { FIRST_PORT } else { ports.host + 1 };
        }
        self.next_port = if ports.host >= u32::MAX - 1 { FIRST_PORT } else { ports.host + 1 };
        if answers.names_port {
            answers.accepted.extend_from_slice(format!("{}\n", ports.host).as_bytes());
        }
        self.insert(ports, Connection::asked_by_host(stream, answers));
    }

    fn insert(&mut self, ports: Ports, connection: Connection) {
        // Told once of each change; what each knows of its stream is kept.
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(set, ports.token());
        if let Err(error) = self.epoll.ctl(ControlOperation::Add, connection.stream().as_raw_fd(), event) {
            tracing::warn!("a connection of a guest's sockets can't be watched: {error}");
            self.reset(ports);
            return connection.refuse();
        }
        self.entries.insert(ports, Entry { connection, has_turn: false });
        self.give_turn(ports);
    }

    fn give_turn(&mut self, ports: Ports) {
        if let Some(entry) = self.entries.get_mut(&ports).filter(|entry| !entry.has_turn) {
            entry.has_turn = true;
            self.turns.push_back(ports);
        }
    }

    /// What is ready, at most so much as fits into `events`; [`ready`](Self::ready) takes them one by one.
    pub fn wait(&self, events: &mut [EpollEvent]) -> usize {
        self.epoll.wait(0, events).unwrap_or(0)
    }

    /// A stream is ready.
    pub fn ready(&mut self, event: &EpollEvent) {
        let ports = Ports::of_token(event.data());
        let Some(entry) = self.entries.get_mut(&ports) else { return };
        let has_gone = event.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR);
        if entry.connection.ready(has_gone).is_err() {
            self.end(ports);
        } else {
            self.give_turn(ports);
        }
    }

    /// Ends a connection, and has the guest know.
    fn end(&mut self, ports: Ports) {
        if let Some(entry) = self.entries.remove(&ports) {
            if !entry.connection.is_left() {
                self.reset(ports);
            }
            entry.connection.refuse();
        }
    }

    fn reset(&mut self, ports: Ports) {
        let from = Address { cid: HOST_CID, port: ports.host };
        let to = Address { cid: self.guest_cid, port: ports.guest };
        self.push_reset(from, to);
    }

    fn push_reset(&mut self, from: Address, to: Address) {
        if self.resets.len() < MOST_RESETS {
            self.resets.push_back((from, to));
        }
    }

    /// Takes a packet of the guest's.
    pub fn take(&mut self, memory: &GuestMemoryMmap, chain: &Chain, vectors: &mut IoVectors) -> Verdict {
        let mut header = [0; HEADER];
        let mut reader = chain.reader(memory);
        if !chain.writable().is_empty() || reader.read(&mut header) < HEADER {
            return Verdict::Malformed;
        }
        let packet = Packet::decode(&header);
        // Nobody speaks in another's name.
        if packet.from.cid != self.guest_cid {
            return Verdict::Used(0);
        }
        let is_whole = u64::from(packet.length) <= reader.left();
        let length = if packet.operation == Some(Operation::Data) { packet.length } else { 0 };
        let ports = Ports { host: packet.to.port, guest: packet.from.port };
        let known = self.entries.get(&ports).filter(|entry| !entry.connection.is_left());
        match packet.operation {
            _ if packet.to.cid != HOST_CID => self.refuse(&packet),
            Some(Operation::Reset) => self.take_reset(ports),
            _ if known.is_none() && packet.operation != Some(Operation::Request) => self.refuse(&packet),
            Some(Operation::Request) if self.entries.contains_key(&ports) => self.end(ports),
            Some(Operation::Request) => self.take_request(&packet, ports),
            _ if !is_whole => self.end(ports),
            _ => {
                let Some(entry) = self.entries.get_mut(&ports) else { return Verdict::Used(0) };
                let data = Data { memory, chain, length };
                match entry.connection.take(&packet, &data, vectors) {
                    Ok(()) => self.give_turn(ports),
                    Err(_) => self.end(ports),
                }
            }
        }
        if is_whole { Verdict::Used(0) } else { Verdict::Malformed }
    }

    /// A reset is never answered by one.
    fn refuse(&mut self, packet: &Packet) {
        if packet.operation != Some(Operation::Reset) {
            self.push_reset(packet.to, packet.from);
        }
    }

    fn take_reset(&mut self, ports: Ports) {
        let stays = self.entries.get_mut(&ports).is_some_and(|entry| entry.connection.leave());
        if !stays && let Some(entry) = self.entries.remove(&ports) {
            entry.connection.refuse();
        }
    }

    fn take_request(&mut self, packet: &Packet, ports: Ports) {
        if self.entries.len() >= MOST_CONNECTIONS || ports.token() == NO_STREAM {
            return self.refuse(packet);
        }
        match (self.dial)(ports.host) {
            Ok(stream) => {
                let mut connection = Connection::granted_to_guest(stream);
                connection.hear(packet);
                self.insert(ports, connection);
            }
            Err(error) => {
                tracing::debug!(
                    "a guest's connection to port {} of the host is refused: {error}",
                    ports.host
                );
                self.refuse(packet);
            }
        }
    }

    /// Writes the next packet to the guest into `chain`.
    pub fn send(&mut self, memory: &GuestMemoryMmap, chain: &Chain, vectors: &mut IoVectors) -> Verdict {
        if !chain.readable().is_empty() || chain.writer(memory).left() < HEADER as u64 {
            return Verdict::Malformed;
        }
        if let Some((from, to)) = self.resets.pop_front() {
            chain.writer(memory).write(&Packet::new(from, to, Operation::Reset).encode());
            return Verdict::Used(HEADER as u32);
        }
        while let Some(ports) = self.turns.pop_front() {
            let Some(entry) = self.entries.get_mut(&ports) else { continue };
            entry.has_turn = false;
            let from = Address { cid: HOST_CID, port: ports.host };
            let to = Address { cid: self.guest_cid, port: ports.guest };
            match entry.connection.send((from, to), memory, chain, vectors) {
                Turn::Nothing => {}
                Turn::Packet(written) => {
                    self.give_turn(ports);
                    return Verdict::Used(written);
                }
            }
        }
        Verdict::Later
    }

    /// The driver has gone: no connection is left.
    pub fn end_all(&mut self) {
        self.turns.clear();
        self.resets.clear();
        for entry in std::mem::take(&mut self.entries).into_values() {
            entry.connection.refuse();
        }
    }
}
