//! An honest driver of a NIC, and what is at the other end of its cable. Shared with the fuzz target.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use devices::bucket::RateLimits;
use devices::testing::{BUFFERS, Carrier, Guest, HIGH};
use devices::virtio::net::backend::Backend;
use devices::virtio::net::counters::{Counters, Direction, Traffic};
use devices::virtio::net::mac::Mac;
use devices::virtio::net::stream::Stream;
use devices::virtio::net::{HEADER, Net};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

pub const RX: usize = 0;
pub const TX: usize = 1;
/// Where frames lie that the guest sends.
pub const OUT: u64 = BUFFERS + 0x1_0000;
/// From one buffer to receive to the next.
pub const STRIDE: u64 = 4096;

pub struct Room {
    pub guest: Guest,
    pub counters: Arc<Counters>,
    pub lost: Arc<AtomicU32>,
    /// Lengths of the buffers that the driver left, by their descriptor.
    lens: [u32; 256],
    /// Descriptors for [`leave_any`](Self::leave_any).
    free: Vec<u16>,
}

pub fn mac() -> Mac {
    "52:54:00:12:34:56".parse().unwrap()
}

/// A NIC whose cable ends in `backend`.
pub fn nic(backend: Backend, lost: &Arc<AtomicU32>) -> Net {
    let lost = Arc::clone(lost);
    let on_lost = move || {
        lost.fetch_add(1, Ordering::Relaxed);
    };
    Net::new(mac(), None, backend, Box::new(on_lost)).unwrap()
}

/// A stream, and its other end.
pub fn stream() -> (Backend, Peer) {
    let (ours, peer) = UnixStream::pair().unwrap();
    peer.set_nonblocking(true).unwrap();
    (Backend::Stream(Stream::new(ours.into()).unwrap()), Peer { socket: peer, came: Vec::new() })
}

impl Room {
    /// A guest whose driver has set the NIC up with all features but `refused`.
    pub fn new(carrier: Carrier, backend: Backend, refused: u64) -> Self {
        Self::limited(carrier, backend, refused, RateLimits::default())
    }

    /// The same with limits.
    pub fn limited(carrier: Carrier, backend: Backend, refused: u64, limits: RateLimits) -> Self {
        let lost = Arc::new(AtomicU32::new(0));
        let net = nic(backend, &lost).limited(limits);
        let counters = net.counters();
        let mut guest = Guest::on(carrier, |_| Box::new(net));
        guest.start(refused);
        guest.run();
        Self { guest, counters, lost, lens: [0; 256], free: (0..256).rev().collect() }
    }

    /// One at a stream.
    pub fn at_stream(carrier: Carrier, refused: u64) -> (Self, Peer) {
        let (backend, peer) = stream();
        (Self::new(carrier, backend, refused), peer)
    }

    /// Leaves a buffer of `len` bytes, at most [`STRIDE`], at descriptor `place`, without a notification.
    pub fn leave(&mut self, place: u16, len: u32) {
        self.lens[usize::from(place)] = len;
        self.guest.describe(RX, place, HIGH + STRIDE * u64::from(place), len, VRING_DESC_F_WRITE, 0);
        self.guest.offer(RX, place);
    }

    /// Leaves a buffer of `len` bytes at a descriptor that no other has.
    pub fn leave_any(&mut self, len: u32) {
        let place = self.free.pop().expect("there are as many as the queue has");
        self.leave(place, len);
    }

    /// Leaves buffers of `len` bytes at these descriptors and says so.
    pub fn leave_all(&mut self, places: std::ops::Range<u16>, len: u32) {
        for place in places {
            self.leave(place, len);
        }
        self.guest.notify(RX);
    }

    /// Frames that came since the last call, each with its header.
    pub fn received(&mut self) -> Vec<([u8; HEADER], Vec<u8>)> {
        self.guest.run();
        let mut used = self.guest.used(RX).into_iter();
        let mut frames = Vec::new();
        while let Some(first) = used.next() {
            let mut bytes = self.filled(first);
            let rest = bytes.split_off(HEADER);
            let header: [u8; HEADER] = bytes.try_into().unwrap();
            let mut frame = rest;
            let buffers = u16::from_le_bytes([header[10], header[11]]);
            assert_ne!(buffers, 0);
            for _ in 1..buffers {
                frame.extend(self.filled(used.next().expect("all of a frame is there at once")));
            }
            frames.push((header, frame));
        }
        frames
    }

    /// The same, of frames with nothing to be said of them.
    pub fn plain(&mut self) -> Vec<Vec<u8>> {
        let plain = |(header, frame): ([u8; HEADER], _)| {
            assert_eq!(header[..10], [0; 10]);
            frame
        };
        self.received().into_iter().map(plain).collect()
    }

    fn filled(&mut self, (head, len): (u32, u32)) -> Vec<u8> {
        self.free.push(head as u16);
        assert!(len <= self.lens[head as usize] && len > 0, "{head}: {len}");
        let mut bytes = vec![0; len as usize];
        self.guest.ram.memory.read_slice(&mut bytes, GuestAddress(HIGH + STRIDE * u64::from(head))).unwrap();
        bytes
    }

    /// Sends a frame behind `header`, in buffers of these lengths and one more for the rest. Whether it has come back.
    pub fn send(&mut self, header: [u8; HEADER], frame: &[u8], cuts: &[u32]) -> bool {
        let bytes = [&header[..], frame].concat();
        self.guest.ram.memory.write_slice(&bytes, GuestAddress(OUT)).unwrap();
        let (mut place, mut at) = (0, 0);
        for &cut in cuts.iter().filter(|&&cut| cut > 0) {
            if at + cut >= bytes.len() as u32 {
                break;
            }
            self.guest.describe(TX, place, OUT + u64::from(at), cut, VRING_DESC_F_NEXT, place + 1);
            (place, at) = (place + 1, at + cut);
        }
        self.guest.describe(TX, place, OUT + u64::from(at), bytes.len() as u32 - at, 0, 0);
        self.guest.send(TX, 0);
        !self.guest.used(TX).is_empty()
    }

    pub fn traffic(&self, direction: Direction) -> Traffic {
        self.counters.traffic(direction)
    }

    /// What the configuration space says of the link.
    pub fn is_up(&self) -> bool {
        self.guest.read(0x104) >> 16 & 1 != 0
    }
}

/// The other end of a stream.
pub struct Peer {
    pub socket: UnixStream,
    came: Vec<u8>,
}

impl Peer {
    /// Sends a frame whole.
    pub fn send(&mut self, frame: &[u8]) {
        let bytes = [&(frame.len() as u32).to_be_bytes()[..], frame].concat();
        self.socket.write_all(&bytes).unwrap();
    }

    /// Whether a frame of any length can be sent without a wait.
    pub fn has_room(&self) -> bool {
        let mut waiting: libc::c_int = 0;
        // SAFETY: the kernel writes one number.
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut waiting) };
        assert_eq!(result, 0);
        waiting < 50_000
    }

    /// Reads at most `most` bytes; how many there were.
    pub fn read(&mut self, most: usize) -> usize {
        let mut bytes = vec![0; most];
        match self.socket.read(&mut bytes) {
            Ok(count) => {
                self.came.extend_from_slice(&bytes[..count]);
                count
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => panic!("{error}"),
        }
    }

    /// Whole frames that have been read.
    pub fn frames(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some((length, rest)) = self.came.split_first_chunk::<4>() {
            let Some(frame) = rest.get(..u32::from_be_bytes(*length) as usize) else { break };
            frames.push(frame.to_vec());
            self.came.drain(..4 + frame.len());
        }
        frames
    }

    /// All that has been sent.
    pub fn all(&mut self) -> Vec<Vec<u8>> {
        while self.read(1 << 20) > 0 {}
        self.frames()
    }
}

/// A frame of `len` bytes that differs from others.
pub fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed).collect()
}

/// Whatever was before: after a reset an honest driver exchanges frames. What waited comes first.
pub fn assert_usable(guest: &mut Guest, peer: &mut Peer) {
    guest.ram.assert_canaries();
    // What an earlier driver sent goes on its way.
    guest.start(0);
    while peer.read(1 << 20) > 0 {
        guest.run();
    }
    peer.frames();
    let sent = frame(60, 7);
    peer.send(&sent);
    let mut last = Vec::new();
    while last.get(HEADER..) != Some(&sent[..]) {
        guest.start(0);
        for place in 0..256 {
            guest.describe(RX, place, HIGH + STRIDE * u64::from(place), STRIDE as u32, VRING_DESC_F_WRITE, 0);
            guest.offer(RX, place);
        }
        guest.notify(RX);
        let used = guest.used(RX);
        let &(head, len) = used.last().expect("frames wait");
        last = vec![0; len as usize];
        guest.ram.memory.read_slice(&mut last, GuestAddress(HIGH + STRIDE * u64::from(head))).unwrap();
    }
    guest.ram.memory.write_slice(&[&[0; HEADER][..], &sent].concat(), GuestAddress(OUT)).unwrap();
    guest.describe(TX, 0, OUT, (HEADER + sent.len()) as u32, 0, 0);
    guest.send(TX, 0);
    assert_eq!(guest.used(TX), [(0, 0)]);
    assert_eq!(peer.all().last(), Some(&sent));
    assert_eq!(guest.status(), devices::testing::RUNNING);
}
