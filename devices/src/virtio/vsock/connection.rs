//! One connection between a program in the guest and one on the host.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vm_memory::GuestMemoryMmap;

use super::credit::{BUFFER, Credit};
use super::packet::{Address, HEADER, NO_MORE_RECEIVED, NO_MORE_SENT, Operation, Packet};
use crate::virtio::queue::{Chain, IoVectors, Reader};

/// Bytes of data in a packet to the guest at most: as Linux sends them.
const MOST_DATA: u32 = 64 << 10;

/// What a program on the host is told of the connection that it asked for, before any data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Where the guest accepts it.
    pub accepted: Vec<u8>,
    /// Behind that comes the port of the host that the connection has, and the end of the line.
    pub names_port: bool,
    /// Where it refuses, or does not answer.
    pub refused: Vec<u8>,
}

/// How far a connection is.
#[derive(Debug)]
enum State {
    /// The host asks for it.
    Asking { answers: Answers, asked: bool },
    /// The guest has asked for it, and is to hear that it is granted.
    Granting,
    /// Both sides know of it.
    Open,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    state: State,
    credit: Credit,
    /// Data for the host's program that it has not taken yet: at most [`BUFFER`] bytes.
    waiting: VecDeque<u8>,
    /// The stream may have something to read.
    readable: bool,
    /// The host's program sends no more.
    host_has_sent_all: bool,
    /// The host's program has closed its end.
    host_has_gone: bool,
    /// The guest sends no more.
    guest_has_sent_all: bool,
    /// The guest receives no more.
    guest_is_deaf: bool,
    owes_credit: bool,
    owes_shutdown: bool,
    /// The stream's writing side is closed.
    is_closed: bool,
    /// The guest knows it no more; what it had sent before is still to be handed over.
    is_left: bool,
}

/// What became of a connection's turn to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It has nothing to send.
    Nothing,
    /// It has written a packet into the chain, of so many bytes in all. It may have another.
    Packet(u32),
}

/// The connection is over, and the guest has to be told by a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Over;

impl Connection {
    /// One that a program on the host asks for.
    pub fn asked_by_host(stream: UnixStream, answers: Answers) -> Self {
        Self::new(stream, State::Asking { answers, asked: false })
    }

    /// One that the guest asks for, and gets.
    pub fn granted_to_guest(stream: UnixStream) -> Self {
        Self::new(stream, State::Granting)
    }

    fn new(stream: UnixStream, state: State) -> Self {
        Self {
            stream,
            state,
            credit: Credit::default(),
            waiting: VecDeque::new(),
            readable: true,
            host_has_sent_all: false,
            host_has_gone: false,
            guest_has_sent_all: false,
            guest_is_deaf: false,
            owes_credit: false,
            owes_shutdown: false,
            is_closed: false,
            is_left: false,
        }
    }

    /// The host's end.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The guest says what it has room for.
    pub fn hear(&mut self, packet: &Packet) {
        self.credit.heard(packet.buffer, packet.forwarded);
    }

    /// The guest has reset the connection. Returns whether it had sent all before that, and some of it still waits for
    /// the host's program.
    pub fn leave(&mut self) -> bool {
        self.is_left = self.guest_has_sent_all && !self.waiting.is_empty() && !self.host_has_gone;
        self.is_left
    }

    /// Whether the guest knows it no more.
    pub fn is_left(&self) -> bool {
        self.is_left
    }

    /// Takes a packet of the guest's, with its data.
    ///
    /// # Errors
    /// [`Over`] where it makes no sense here, or ends the connection.
    pub fn take(&mut self, packet: &Packet, data: &Data<'_>, vectors: &mut IoVectors) -> Result<(), Over> {
        self.hear(packet);
        match (packet.operation, &mut self.state) {
            (Some(Operation::Response), State::Asking { answers, asked: true }) => {
                // Nothing was written before: there is room for it, or nobody.
                self.host_has_gone = (&self.stream).write_all(&answers.accepted).is_err();
                self.owes_shutdown = self.host_has_gone;
                self.state = State::Open;
                Ok(())
            }
            (Some(Operation::Data), State::Open | State::Granting) if !self.guest_has_sent_all => {
                self.take_data(data, vectors)
            }
            (Some(Operation::CreditUpdate), State::Open | State::Granting) => Ok(()),
            (Some(Operation::CreditRequest), State::Open | State::Granting) => {
                self.owes_credit = true;
                Ok(())
            }
            (Some(Operation::Shutdown), State::Open | State::Granting) => {
                self.guest_has_sent_all |= packet.flags & NO_MORE_SENT != 0;
                self.guest_is_deaf |= packet.flags & NO_MORE_RECEIVED != 0;
                self.flush()
            }
            _ => Err(Over),
        }
    }

    fn take_data(&mut self, data: &Data<'_>, vectors: &mut IoVectors) -> Result<(), Over> {
        if !self.credit.received(data.length) {
            return Err(Over);
        }
        let mut went = 0;
        if self.waiting.is_empty() && !self.host_has_gone {
            vectors.clear();
            data.reader(0).vectors(data.length as usize, vectors);
            match vectors.write_message(self.stream.as_fd(), &[]) {
                Ok(count) => went = count,
                Err(error) if waits(&error) => {}
                Err(_) => self.host_has_gone = true,
            }
            self.forwarded(went);
        }
        if self.host_has_gone {
            // Nobody takes it, of which the guest is told by a shutdown.
            self.forwarded((data.length as usize).saturating_sub(went));
            self.waiting.clear();
            self.owes_shutdown = true;
            return Ok(());
        }
        let mut reader = data.reader(went);
        let mut left = (data.length as usize).saturating_sub(went);
        let mut piece = [0; 4096];
        while let Some(part) = piece.get_mut(..left.min(4096)).filter(|part| !part.is_empty()) {
            let count = reader.read(part);
            if count == 0 {
                break;
            }
            self.waiting.extend(part.iter().take(count));
            left = left.saturating_sub(count);
        }
        Ok(())
    }

    /// So many bytes are the host's program's.
    fn forwarded(&mut self, bytes: usize) {
        // Below what has been received, whose count has 32 bits.
        self.credit.forwarded(bytes as u32);
        self.owes_credit |= self.credit.is_low();
    }

    /// Hands what waits to the host's program, as far as it takes it, and ends what is to end then.
    ///
    /// # Errors
    /// [`Over`] where that was the last of it.
    pub fn flush(&mut self) -> Result<(), Over> {
        while !self.waiting.is_empty() && !self.host_has_gone {
            let (front, _) = self.waiting.as_slices();
            match (&self.stream).write(front) {
                Ok(count) => {
                    self.waiting.drain(..count);
                    self.forwarded(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => {
                    self.host_has_gone = true;
                    self.owes_shutdown = true;
                }
            }
        }
        if self.host_has_gone {
            self.forwarded(self.waiting.len());
            self.waiting = VecDeque::new();
        }
        if self.guest_has_sent_all && self.guest_is_deaf || self.is_left {
            return Err(Over);
        }
        if self.guest_has_sent_all && !self.is_closed {
            self.is_closed = true;
            // It may have gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// The stream has something, or takes more, or its other end is closed both ways.
    ///
    /// # Errors
    /// [`Over`].
    pub fn ready(&mut self, has_gone: bool) -> Result<(), Over> {
        self.readable = true;
        if has_gone {
            if matches!(self.state, State::Asking { .. }) {
                return Err(Over);
            }
            self.host_has_gone = true;
            self.owes_shutdown = true;
        }
        self.flush()
    }

    /// Writes its next packet into `chain`, which has room for a header, between `from` and `to`.
    pub fn send(
        &mut self,
        (from, to): (Address, Address),
        memory: &GuestMemoryMmap,
        chain: &Chain,
        vectors: &mut IoVectors,
    ) -> Turn {
        let (operation, length) = match &mut self.state {
            State::Asking { asked: true, .. } => return Turn::Nothing,
            State::Asking { asked, .. } => {
                *asked = true;
                (Operation::Request, 0)
            }
            State::Granting => {
                self.state = State::Open;
                (Operation::Response, 0)
            }
            State::Open if self.is_left => return Turn::Nothing,
            State::Open => match self.next(memory, chain, vectors) {
                Some(next) => next,
                None => return Turn::Nothing,
            },
        };
        let mut packet = Packet { length, ..Packet::new(from, to, operation) };
        (packet.buffer, packet.forwarded) = (BUFFER, self.credit.tell());
        self.owes_credit = false;
        if operation == Operation::Shutdown {
            packet.flags = NO_MORE_SENT | if self.host_has_gone { NO_MORE_RECEIVED } else { 0 };
        }
        chain.writer(memory).write(&packet.encode());
        // Both are bounded.
        Turn::Packet(HEADER as u32 + length)
    }

    /// What to send next on an open connection; data is in its place in `chain` already.
    fn next(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
        vectors: &mut IoVectors,
    ) -> Option<(Operation, u32)> {
        if self.readable && !self.host_has_sent_all && !self.guest_is_deaf {
            let most = self.credit.free().min(MOST_DATA);
            let mut writer = chain.writer(memory);
            writer.skip(HEADER);
            vectors.clear();
            if most > 0 && writer.vectors(most as usize, vectors) > 0 {
                match vectors.read_message(self.stream.as_fd(), &mut [], &mut []) {
                    Ok(count @ 1..) => {
                        // At most what there was room for.
                        let count = count as u32;
                        self.credit.sent(count);
                        return Some((Operation::Data, count));
                    }
                    Err(error) if waits(&error) => self.readable = false,
                    Ok(0) | Err(_) => {
                        self.host_has_sent_all = true;
                        self.owes_shutdown = true;
                    }
                }
            }
        }
        if self.owes_credit {
            return Some((Operation::CreditUpdate, 0));
        }
        let told_all = self.host_has_sent_all || self.guest_is_deaf;
        if self.owes_shutdown && told_all {
            self.owes_shutdown = false;
            return Some((Operation::Shutdown, 0));
        }
        None
    }

    /// The guest does not want it, or is no more: tells the host's program, where it has not been told otherwise.
    pub fn refuse(mut self) {
        if let State::Asking { answers, .. } = &self.state {
            // As above.
            let _ = (&self.stream).write_all(&answers.refused);
        }
        // What it does not take now it goes without.
        let _ = self.flush();
    }
}

/// Data of a packet, where it lies.
pub struct Data<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemoryMmap,
    /// The packet: its header, then the data.
    pub chain: &'a Chain,
    /// Bytes of data, all of which are there.
    pub length: u32,
}

impl Data<'_> {
    /// The data but for the first bytes.
    fn reader(&self, skipped: usize) -> Reader<'_> {
        let mut reader = self.chain.reader(self.memory);
        reader.skip(HEADER.saturating_add(skipped));
        reader
    }
}

fn waits(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock
}
