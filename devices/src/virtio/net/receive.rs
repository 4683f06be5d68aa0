//! Frames on their way to the guest (virtio 1.2, section 5.1.6.3).
//!
//! Buffers are taken from the driver before there is a frame for them, so that the kernel can write a frame right
//! into guest memory. Where the driver has left too few for the largest frame, one comes into memory of our own
//! first, and waits there for buffers: no frame is lost because the driver is slow.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::GuestMemoryMmap;

use super::backend::Backend;
use super::counters::{Counters, Direction};
use super::gate::Gate;
use super::stream::{Lost, Stream};
use super::tap::Tap;
use super::{ETHERNET, HEADER, MOST_FRAME, RX};
use crate::virtio::device::{Active, Progress};
use crate::virtio::queue::{Budget, Chain, Faults, IoVectors, Verdict, complete_together, put_back, serve};

/// Frames of one event.
const FRAMES: usize = 64;

/// Buffers taken from the queue in one go.
const CHAINS: u16 = 64;

/// Buffers are taken for so many bytes more than are needed, as each look at the queue has its cost.
const AHEAD: usize = 32 << 10;

/// Descriptors of buffers that are taken at most; for a frame beyond them there never is room.
const MOST_DESCRIPTORS: usize = 512;

/// Once there are so many pieces of memory for a frame, no buffer is added: one may have hundreds, and the kernel
/// takes 1,024.
const MOST_VECTORS: usize = 256;

/// What an event left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing is to be done until the backend has more.
    Nothing,
    /// Frames wait, and the driver has left no room: its next notification says when to look again.
    Starved,
    /// The limits let no more frames pass for now.
    Held,
    /// The driver has broken the protocol.
    Broken,
    /// The backend is of no more use.
    Lost,
}

/// What became of one frame.
enum Delivery {
    Done,
    /// There will be room.
    Waits,
    /// There never will be.
    TooLarge,
}

/// The way to the guest.
pub struct Receiver {
    /// Buffers that the driver left for frames, in its order.
    spare: VecDeque<Chain>,
    /// Bytes and descriptors of them.
    room: usize,
    descriptors: usize,
    /// Buffers with frames in them, not yet given back.
    filled: Vec<(Chain, u32)>,
    vectors: Option<IoVectors>,
    /// A frame may lie in several buffers.
    merges: bool,
    /// Bytes of the largest frame that is to come.
    largest: usize,
    /// A frame of a tap, or what did not fit in the guest's buffers.
    own: Box<[u8]>,
    /// Its header and length, where it waits.
    waiting: Option<([u8; HEADER], usize)>,
}

impl Receiver {
    /// No driver is there.
    pub fn new(backend: &Backend) -> Self {
        let own = match backend {
            Backend::Tap(_) => MOST_FRAME,
            // It has room of its own.
            Backend::Stream(_) => 0,
        };
        Self {
            spare: VecDeque::new(),
            room: 0,
            descriptors: 0,
            filled: Vec::new(),
            vectors: None,
            merges: false,
            largest: MOST_FRAME,
            own: vec![0; own].into_boxed_slice(),
            waiting: None,
        }
    }

    /// A driver is there, and packets have `mtu` bytes at most where that is known.
    pub fn activate(&mut self, active: &Active, mtu: Option<u16>) {
        let has = |feature: u32| active.features & 1 << feature != 0;
        self.vectors = Some(IoVectors::new(Arc::clone(&active.memory)));
        self.merges = has(VIRTIO_NET_F_MRG_RXBUF);
        let joined = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
        // A tag of 4 bytes may be in front of the packet.
        let single = mtu.map_or(MOST_FRAME, |mtu| usize::from(mtu) + ETHERNET + 4);
        self.largest = if joined { MOST_FRAME } else { single.min(MOST_FRAME) };
    }

    /// The driver has gone.
    pub fn reset(&mut self) {
        self.forget();
        self.vectors = None;
        self.waiting = None;
    }

    /// Leaves what is not filled in the queue.
    pub fn drain(&mut self, active: &mut Active) {
        let spare = std::mem::take(&mut self.spare);
        put_back(active, RX, spare.into_iter());
        self.forget();
    }

    fn forget(&mut self) {
        self.spare.clear();
        self.filled.clear();
        (self.room, self.descriptors) = (0, 0);
    }

    /// Hands frames of `backend` to the driver, as many as one event may.
    pub fn receive(
        &mut self,
        active: &mut Active,
        backend: &mut Backend,
        faults: &mut Faults,
        counters: &Counters,
        gate: &mut Gate,
    ) -> Left {
        let left = match backend {
            Backend::Tap(tap) => self.take_from_tap(active, tap, faults, counters, gate),
            Backend::Stream(stream) => self.take_from_stream(active, stream, faults, counters, gate),
        };
        complete_together(active, RX, self.filled.drain(..));
        left
    }

    fn take_from_tap(
        &mut self,
        active: &mut Active,
        tap: &Tap,
        faults: &mut Faults,
        counters: &Counters,
        gate: &mut Gate,
    ) -> Left {
        for _ in 0..FRAMES {
            if !gate.is_open(counters) {
                return Left::Held;
            }
            if let Some((header, len)) = self.waiting {
                let own = std::mem::take(&mut self.own);
                let frame = own.get(..len).unwrap_or_default();
                let delivered = self.deliver(active, faults, header, frame, counters);
                self.own = own;
                match delivered {
                    Ok(Delivery::Waits) => return Left::Starved,
                    Ok(_) => {
                        self.waiting = None;
                        gate.passed(len);
                        continue;
                    }
                    Err(left) => return left,
                }
            }
            if let Err(left) = self.gather(active, faults, HEADER + self.largest) {
                return left;
            }
            // What comes while there is no room at all is better kept by the kernel.
            if self.spare.is_empty() {
                return Left::Starved;
            }
            let mut header = [0; HEADER];
            let Some(mut vectors) = self.vectors.take() else { return Left::Nothing };
            let room = self.describe(&active.memory, &mut vectors);
            let read = tap.receive(&mut header, &mut vectors, &mut self.own);
            vectors.clear();
            self.vectors = Some(vectors);
            match read {
                Ok(len) if room == 0 => self.waiting = Some((header, len)),
                Ok(len) if (ETHERNET..=room).contains(&len) => {
                    self.fill(active, header, len, None);
                    gate.passed(len);
                    counters.passed(Direction::Received, len);
                }
                // The interface may carry longer packets than when the guest was told.
                Ok(_) => counters.dropped(Direction::Received),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Left::Nothing,
                // The frame is gone; that of another length may fit.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL | libc::ENOMEM)) =>
                {
                    counters.dropped(Direction::Received);
                }
                Err(error) => {
                    tracing::warn!("the tap {} gives no more frames: {error}", tap.name());
                    return Left::Lost;
                }
            }
        }
        // Readiness tells of the rest, even of one that waits in memory of our own: there is room for it.
        match self.waiting {
            Some(_) => Left::Starved,
            None => Left::Nothing,
        }
    }

    fn take_from_stream(
        &mut self,
        active: &mut Active,
        stream: &mut Stream,
        faults: &mut Faults,
        counters: &Counters,
        gate: &mut Gate,
    ) -> Left {
        let lost = |error: Lost| {
            tracing::warn!("the other end of a guest's network is of no more use: {error}");
            Left::Lost
        };
        // What has come before, then what has come since: no more than there is room for.
        for fills in [true, false] {
            loop {
                let frame = match stream.frame() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(error) => return lost(error),
                };
                let len = frame.len();
                if !gate.is_open(counters) {
                    return Left::Held;
                }
                match self.deliver(active, faults, [0; HEADER], frame, counters) {
                    Ok(Delivery::Waits) => return Left::Starved,
                    Ok(_) => {
                        stream.taken(len);
                        gate.passed(len);
                    }
                    Err(left) => return left,
                }
            }
            if fills {
                match stream.fill() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => return lost(error),
                }
            }
        }
        Left::Nothing
    }

    /// Takes buffers from the driver for `bytes`, if they are to be had.
    fn gather(&mut self, active: &mut Active, faults: &mut Faults, bytes: usize) -> Result<(), Left> {
        while self.room < bytes && self.descriptors < MOST_DESCRIPTORS {
            let wanted = bytes.saturating_add(AHEAD).saturating_sub(self.room);
            let budget = Budget { chains: CHAINS, bytes: wanted as u64 };
            let Self { spare, room, descriptors, .. } = self;
            let progress = serve(active, RX, faults, budget, |_, chain| {
                let len = usize::try_from(chain.len()).unwrap_or(usize::MAX);
                if !chain.readable().is_empty() || len < HEADER {
                    return Verdict::Malformed;
                }
                *room = room.saturating_add(len);
                *descriptors += chain.writable().len();
                spare.push_back(chain.keep());
                Verdict::Kept
            });
            match progress {
                Progress::More => {}
                Progress::Done => break,
                Progress::Broken => return Err(Left::Broken),
            }
        }
        Ok(())
    }

    /// Lists the room for a frame behind its header in `vectors`, and says how much it is: none, where it may not
    /// do for the largest.
    fn describe(&self, memory: &GuestMemoryMmap, vectors: &mut IoVectors) -> usize {
        let buffers = if self.merges { self.spare.len() } else { 1 };
        let mut room = 0;
        for (number, chain) in self.spare.iter().take(buffers).enumerate() {
            if room >= self.largest || vectors.as_slice().len() >= MOST_VECTORS {
                break;
            }
            let mut writer = chain.writer(memory);
            if number == 0 {
                writer.skip(HEADER);
            }
            room += writer.vectors(MOST_FRAME, vectors);
        }
        if room < self.largest {
            vectors.clear();
            return 0;
        }
        room
    }

    /// Copies a frame into buffers of the driver, with what is missing of them.
    fn deliver(
        &mut self,
        active: &mut Active,
        faults: &mut Faults,
        header: [u8; HEADER],
        frame: &[u8],
        counters: &Counters,
    ) -> Result<Delivery, Left> {
        let bytes = HEADER + frame.len();
        self.gather(active, faults, bytes)?;
        let first = self.spare.front().map(|chain| usize::try_from(chain.len()).unwrap_or(usize::MAX));
        let Some(first) = first else { return Ok(Delivery::Waits) };
        let room = if self.merges { self.room } else { first };
        if room >= bytes && frame.len() >= ETHERNET {
            self.fill(active, header, frame.len(), Some(frame));
            counters.passed(Direction::Received, frame.len());
            return Ok(Delivery::Done);
        }
        // With all of its queue in our hands the driver can't leave more.
        let size = active.queues.get(RX).map_or(0, |queue| usize::from(queue.size()));
        let can_grow = self.merges && self.descriptors < size.min(MOST_DESCRIPTORS);
        if can_grow && frame.len() >= ETHERNET {
            return Ok(Delivery::Waits);
        }
        counters.dropped(Direction::Received);
        Ok(Delivery::TooLarge)
    }

    /// Takes the buffers of a frame of `len` bytes, which lies in them already or is copied from `frame`. There is
    /// room for it.
    fn fill(&mut self, active: &Active, mut header: [u8; HEADER], len: usize, frame: Option<&[u8]>) {
        let (start, mut left) = (self.filled.len(), HEADER + len);
        let mut rest = frame.unwrap_or_default();
        while left > 0 {
            let Some(chain) = self.spare.pop_front() else { break };
            let room = usize::try_from(chain.len()).unwrap_or(usize::MAX);
            self.room = self.room.saturating_sub(room);
            self.descriptors = self.descriptors.saturating_sub(chain.writable().len());
            let used = room.min(left);
            if !rest.is_empty() {
                let mut writer = chain.writer(&active.memory);
                if self.filled.len() == start {
                    writer.skip(HEADER);
                }
                let written = writer.write(rest);
                rest = rest.get(written..).unwrap_or_default();
            }
            left -= used;
            self.filled.push((chain, u32::try_from(used).unwrap_or(u32::MAX)));
        }
        let buffers = u16::try_from(self.filled.len() - start).unwrap_or(u16::MAX);
        if let Some(place) = header.last_chunk_mut() {
            *place = buffers.to_le_bytes();
        }
        if let Some((chain, _)) = self.filled.get(start) {
            chain.writer(&active.memory).write(&header);
        }
    }
}
