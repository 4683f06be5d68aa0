//! A driver of the socket device that does as Linux does, where a test does not want otherwise.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use devices::testing::{BUFFERS, Carrier, Guest, NEEDS_RESET, RUNNING};
use devices::virtio::vsock::{
    Address, Answers, GUEST_CID, HEADER, HOST_CID, Incoming, Operation, Packet, Vsock,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

pub const RX: usize = 0;
pub const TX: usize = 1;
pub const EVENT: usize = 2;

/// Bytes of a buffer for a packet, as in Linux.
pub const ROOM: u32 = 4096;
/// Buffers that a driver has.
pub const ROOMS: u16 = 32;

/// Where packets are sent from.
const OUT: u64 = BUFFERS + 0x4_0000;

/// A port of the host that a program serves; others are refused.
pub const SERVED: u32 = 1024;
/// A port of the guest.
pub const PORT: u32 = 22;

/// Streams that were opened for the guest, at the program's end.
pub type Served = Arc<Mutex<VecDeque<UnixStream>>>;

/// A guest with a driver, and what is at the host's side.
pub struct Driver {
    pub guest: Guest,
    pub incoming: Arc<Incoming>,
    pub served: Served,
    /// Buffers that the device does not have.
    free: VecDeque<u16>,
    /// How many it has at most.
    pub rooms: u16,
    /// What came, by the two ports: data, and the last other packet.
    pub heard: Vec<(Packet, Vec<u8>)>,
    /// Bytes taken of each connection, for the guest's credit.
    pub taken: BTreeMap<(u32, u32), u32>,
}

/// A stream whose reads and writes don't wait, for the device.
pub fn pair() -> (UnixStream, UnixStream) {
    let (program, device) = UnixStream::pair().expect("sockets");
    device.set_nonblocking(true).expect("a socket");
    program.set_nonblocking(true).expect("a socket");
    (program, device)
}

pub fn device(served: &Served) -> Vsock {
    let served = Arc::clone(served);
    Vsock::new(Box::new(move |port| {
        if port != SERVED {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (program, device) = pair();
        served.lock().unwrap().push_back(program);
        Ok(device)
    }))
    .expect("descriptors")
}

impl Driver {
    pub fn new(carrier: Carrier) -> Self {
        let served = Served::default();
        let device = device(&served);
        let incoming = device.incoming();
        let guest = Guest::on(carrier, |_| Box::new(device));
        Self {
            guest,
            incoming,
            served,
            free: (0..ROOMS).collect(),
            rooms: ROOMS,
            heard: Vec::new(),
            taken: BTreeMap::new(),
        }
    }

    /// A driver that has started and left room for packets.
    pub fn started(carrier: Carrier) -> Self {
        let mut driver = Self::new(carrier);
        driver.guest.start(0);
        driver.give();
        driver
    }

    /// Another driver takes the device.
    pub fn restart(&mut self) {
        self.guest.ram.assert_canaries();
        self.guest.start(0);
        self.free = (0..ROOMS).collect();
        self.heard.clear();
        self.taken.clear();
        self.give();
    }

    /// Leaves as much room as there is to be.
    pub fn give(&mut self) {
        while self.free.len() > usize::from(ROOMS - self.rooms) {
            let Some(place) = self.free.pop_front() else { break };
            let address = BUFFERS + u64::from(ROOM) * u64::from(place);
            self.guest.describe(RX, place, address, ROOM, VRING_DESC_F_WRITE, 0);
            self.guest.offer(RX, place);
        }
        self.guest.notify(RX);
    }

    /// Lets the device work, and takes what comes, until nothing more does.
    pub fn run(&mut self) {
        loop {
            self.give();
            if self.collect() == 0 {
                return;
            }
        }
    }

    /// Takes what came.
    pub fn collect(&mut self) -> u16 {
        let used = self.guest.used(RX);
        for (place, written) in &used {
            let address = GuestAddress(BUFFERS + u64::from(ROOM) * u64::from(*place));
            let mut bytes = vec![0; *written as usize];
            self.guest.ram.memory.read_slice(&mut bytes, address).unwrap();
            let data = bytes.split_off(HEADER);
            let packet = Packet::decode(&bytes.try_into().unwrap());
            assert_eq!(packet.length as usize, data.len(), "{packet:?}");
            assert_eq!(packet.to.cid, GUEST_CID, "{packet:?}");
            assert!(packet.from.cid == HOST_CID || packet.operation == Some(Operation::Reset), "{packet:?}");
            self.heard.push((packet, data));
            self.free.push_back(*place as u16);
        }
        used.len() as u16
    }

    /// What came since the last call.
    pub fn packets(&mut self) -> Vec<(Packet, Vec<u8>)> {
        self.run();
        std::mem::take(&mut self.heard)
    }

    /// What came since the last call, but for data and its header's other fields.
    pub fn operations(&mut self) -> Vec<Operation> {
        self.packets().into_iter().map(|(packet, _)| packet.operation.unwrap()).collect()
    }

    /// Sends a packet whose data lies in so many descriptors.
    pub fn send_in(&mut self, packet: Packet, data: &[u8], pieces: usize) {
        self.guest.ram.memory.write_slice(&packet.encode(), GuestAddress(OUT)).unwrap();
        self.guest.ram.memory.write_slice(data, GuestAddress(OUT + HEADER as u64)).unwrap();
        let chunks: Vec<&[u8]> =
            if data.is_empty() { Vec::new() } else { data.chunks(data.len().div_ceil(pieces)).collect() };
        let next = |place: usize| if place < chunks.len() { VRING_DESC_F_NEXT } else { 0 };
        self.guest.describe(TX, 0, OUT, HEADER as u32, next(0), 1);
        let mut address = OUT + HEADER as u64;
        for (place, chunk) in (1..).zip(&chunks) {
            self.guest.describe(TX, place as u16, address, chunk.len() as u32, next(place), place as u16 + 1);
            address += chunk.len() as u64;
        }
        self.guest.send(TX, 0);
        let used = self.guest.used(TX);
        assert!(used == [(0, 0)] || self.guest.status() == RUNNING | NEEDS_RESET, "{used:?}");
        self.collect();
    }

    pub fn send(&mut self, packet: Packet, data: &[u8]) {
        self.send_in(packet, data, 1);
    }

    /// A packet of the guest's, which has room for `buffer` bytes and has taken what it was told to have.
    pub fn packet(&self, ports: (u32, u32), operation: Operation) -> Packet {
        let (guest, host) = ports;
        Packet {
            buffer: 256 << 10,
            forwarded: self.taken.get(&ports).copied().unwrap_or(0),
            ..Packet::new(
                Address { cid: GUEST_CID, port: guest },
                Address { cid: HOST_CID, port: host },
                operation,
            )
        }
    }

    pub fn say(&mut self, ports: (u32, u32), operation: Operation) {
        self.send(self.packet(ports, operation), &[]);
    }

    pub fn say_data(&mut self, ports: (u32, u32), data: &[u8]) {
        let packet = Packet { length: data.len() as u32, ..self.packet(ports, Operation::Data) };
        self.send(packet, data);
    }

    pub fn shut(&mut self, ports: (u32, u32), flags: u32) {
        let packet = Packet { flags, ..self.packet(ports, Operation::Shutdown) };
        self.send(packet, &[]);
    }

    /// A program on the host calls [`PORT`], and the guest accepts: the two ports, and the program's end.
    pub fn called(&mut self) -> ((u32, u32), UnixStream) {
        let answers = Answers { accepted: b"yes\n".into(), refused: b"no\n".into(), ..Answers::default() };
        let (ports, program) = self.called_with(answers);
        let mut greeting = [0; 4];
        io::Read::read_exact(&mut &program, &mut greeting).expect("it is told");
        assert_eq!(&greeting, b"yes\n");
        (ports, program)
    }

    /// The same with other answers, which are still to be read.
    pub fn called_with(&mut self, answers: Answers) -> ((u32, u32), UnixStream) {
        let (program, device) = pair();
        self.incoming.connect(PORT, device, answers).expect("a place");
        let packets = self.packets();
        let (packet, _) = packets.last().expect("the guest is asked");
        assert_eq!((packet.operation, packet.to.port), (Some(Operation::Request), PORT));
        let ports = (PORT, packet.from.port);
        self.say(ports, Operation::Response);
        (ports, program)
    }

    /// A program in the guest calls [`SERVED`] from `port`: the two ports, and the host's program's end.
    pub fn calls(&mut self, port: u32) -> ((u32, u32), UnixStream) {
        let ports = (port, SERVED);
        self.say(ports, Operation::Request);
        assert_eq!(self.operations(), [Operation::Response]);
        (ports, self.served.lock().unwrap().pop_front().expect("it was opened"))
    }
}
