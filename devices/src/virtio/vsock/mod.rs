//! The socket device (virtio 1.2, section 5.10): streams between programs in the guest and programs on the host,
//! without a network.
//!
//! The host's programs have Unix sockets. Those that call the guest come by [`Incoming`]; those that serve a port
//! of the host are opened by a function that the device is made with. Data goes between guest memory and a socket
//! without a copy, but for what a program on the host has not taken yet, which is bounded for each connection.
//! The device works on its event loop alone, and nothing is in flight when an event is over.

mod connection;
mod connections;
mod credit;
mod incoming;
mod packet;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EpollEvent;

pub use self::connection::Answers;
use self::connections::{Connections, NO_STREAM};
pub use self::connections::{Dial, MOST_CONNECTIONS};
pub use self::credit::BUFFER;
pub use self::incoming::{Crowded, Incoming};
pub use self::packet::{Address, HEADER, HOST_CID, NO_MORE_RECEIVED, NO_MORE_SENT, Operation, Packet};
use super::device::{Active, Progress, VirtioDevice, read_part};
use super::queue::{Budget, Faults, IoVectors, Verdict, serve};
use crate::state::{self, StateError, Version};

/// The context identifier of each guest: the first that may be one. Guests do not see each other.
pub const GUEST_CID: u64 = 3;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// Packets one way of one event.
const BUDGET: Budget = Budget { chains: 64, bytes: 1 << 20 };

/// Streams that are looked at in one event.
const STREAMS: usize = 32;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

const DEVICE: &str = "the socket device";

/// What a socket device knows, as data. Its connections are not part of it: their other ends stay where they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    version: Version<1>,
    faults: Faults,
}

/// The device.
pub struct Vsock {
    connections: Connections,
    incoming: Arc<Incoming>,
    vectors: Option<IoVectors>,
    faults: Faults,
    /// The driver is to be told that all its connections have gone.
    owes_reset: bool,
}

impl Vsock {
    /// A device that no driver has found yet. What a guest wants of the host, `dial` opens: streams whose reads and
    /// writes don't wait.
    ///
    /// # Errors
    /// No descriptors can be had.
    pub fn new(dial: Dial) -> io::Result<Self> {
        let connections = Connections::new(GUEST_CID, dial)?;
        let incoming = Incoming::new()?;
        connections.watch_also(&*incoming)?;
        Ok(Self { connections, incoming, vectors: None, faults: Faults::default(), owes_reset: false })
    }

    /// Where programs on the host come that want to speak to the guest.
    pub fn incoming(&self) -> Arc<Incoming> {
        Arc::clone(&self.incoming)
    }

    /// Malformed chains handed back since the device was made.
    pub fn malformed(&self) -> u64 {
        self.faults.total()
    }

    /// Takes what the guest sends.
    fn take(&mut self, active: &mut Active) -> Progress {
        let Self { connections, vectors: Some(vectors), faults, .. } = self else { return Progress::Done };
        serve(active, TX, faults, BUDGET, |memory, chain| connections.take(memory, chain, vectors))
    }

    /// Sends to the guest, as far as it has left room.
    fn send(&mut self, active: &mut Active) -> Progress {
        let Self { connections, vectors: Some(vectors), faults, .. } = self else { return Progress::Done };
        serve(active, RX, faults, BUDGET, |memory, chain| connections.send(memory, chain, vectors))
    }

    /// Tells the driver that all its connections have gone, once it has left room for that.
    fn tell_of_reset(&mut self, active: &mut Active) -> Progress {
        if !self.owes_reset {
            return Progress::Done;
        }
        let one = Budget { chains: 1, bytes: u64::MAX };
        let owes = &mut self.owes_reset;
        let progress = serve(active, EVENT, &mut self.faults, one, |memory: &GuestMemoryMmap, chain| {
            let mut writer = chain.writer(memory);
            if !chain.readable().is_empty() || writer.write(&TRANSPORT_RESET.to_le_bytes()) < 4 {
                return Verdict::Malformed;
            }
            *owes = false;
            Verdict::Used(writer.written())
        });
        if progress == Progress::Broken { progress } else { Progress::Done }
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    /// Streams need no feature.
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = GUEST_CID.to_le_bytes();
        read_part(&config, offset, data);
    }

    /// Nothing is the driver's to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, active: &mut Active) {
        self.vectors = Some(IoVectors::new(Arc::clone(&active.memory)));
    }

    fn reset(&mut self) {
        self.connections.end_all();
        self.faults.forgive();
        self.vectors = None;
        self.owes_reset = false;
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        match index {
            TX => match (self.take(active), self.send(active)) {
                (Progress::Broken, _) | (_, Progress::Broken) => Progress::Broken,
                (taken, sent) => {
                    if sent == Progress::More {
                        self.incoming.wake();
                    }
                    taken
                }
            },
            RX => self.send(active),
            _ => self.tell_of_reset(active),
        }
    }

    fn own_events(&self) -> Vec<RawFd> {
        vec![self.connections.readiness()]
    }

    fn own_event(&mut self, _index: usize, active: Option<&mut Active>) {
        let mut events = [EpollEvent::default(); STREAMS];
        let count = self.connections.wait(&mut events);
        for event in events.iter().take(count) {
            if event.data() != NO_STREAM {
                self.connections.ready(event);
                continue;
            }
            for caller in self.incoming.take() {
                self.connections.ask(caller.port, caller.stream, caller.answers);
            }
        }
        match active {
            Some(active) => {
                if self.send(active) == Progress::More {
                    self.incoming.wake();
                }
            }
            // Nobody answers.
            None => self.connections.end_all(),
        }
    }

    fn save(&self) -> Result<Value, StateError> {
        state::to_value(&VsockState { version: Version, faults: self.faults })
    }

    fn restore(&mut self, state: Value, active: Option<&mut Active>) -> Result<(), StateError> {
        let state: VsockState = state::from_value::<_, 1>(DEVICE, state)?;
        self.faults = state.faults;
        if let Some(active) = active {
            self.activate(active);
            self.owes_reset = true;
            // One that has broken the protocol hears nothing more.
            let _ = self.tell_of_reset(active);
        }
        Ok(())
    }
}
