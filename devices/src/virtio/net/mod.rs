//! The network device (virtio 1.2, section 5.1): one queue to the guest, one from it.
//!
//! The device works on its event loop alone, which should be its own: frames go between guest memory and the
//! backend's descriptor there, and nothing is in flight when an event is over.

pub mod backend;
mod bridge;
pub mod cable;
pub mod counters;
mod error;
mod gate;
pub mod mac;
mod receive;
pub mod stream;
pub mod tap;
mod transmit;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::EventSet;

use self::backend::{Backend, Readiness};
use self::cable::Cable;
use self::counters::{Counters, Direction};
pub use self::error::NetError;
use self::gate::{Alarm, Gate};
use self::mac::Mac;
use self::receive::{Left, Receiver};
use self::transmit::Transmitter;
use super::device::{Active, Progress, VirtioDevice, read_part};
use super::queue::Faults;
use crate::bucket::RateLimits;
use crate::sandbox::{Call, SandboxNeeds};
use crate::state::{self, StateError, Version};

/// Bytes of `struct virtio_net_hdr_v1`, which is in front of each frame (section 5.1.6).
pub const HEADER: usize = 12;

/// Bytes of an Ethernet header: no frame is shorter.
pub const ETHERNET: usize = 14;

/// Bytes of the longest frame: the largest IP packet behind an Ethernet header with a VLAN tag.
pub const MOST_FRAME: usize = 65_535 + ETHERNET + 4;

/// The smallest and the largest MTU that can be told (section 5.1.4.1; the frame must fit).
pub const MTUS: std::ops::RangeInclusive<u16> = 68..=65_521;

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256; 2];

/// The place of what wakes it for its limits among its own events.
const ALARM: usize = 1;

/// The place of what tells that its owner has taken its cable out, or put it in, among its own events.
const CABLE: usize = 2;

/// Events' worth of frames that are dropped at once where the backend has gone: more than a queue holds.
const DISCARDED: usize = 8;

const DEVICE: &str = "the network device";

/// What a driver is told: `struct virtio_net_config`, to `mtu` (section 5.1.4).
const CONFIG: usize = 12;

/// What a network device knows, as data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    version: Version<1>,
    faults: Faults,
    mac: Mac,
    mtu: Option<u16>,
    features: u64,
}

/// Told once the backend is of no more use.
pub type OnLost = Box<dyn FnMut() + Send>;

/// A NIC.
pub struct Net {
    mac: Mac,
    mtu: Option<u16>,
    backend: Backend,
    /// Features that hang on the backend.
    features: u64,
    readiness: Readiness,
    receiver: Receiver,
    transmitter: Transmitter,
    counters: Arc<Counters>,
    /// To the guest, and from it.
    gates: (Gate, Gate),
    alarm: Alarm,
    faults: Faults,
    link: Link,
    cable: Arc<Cable>,
    awaited: Awaited,
    on_lost: OnLost,
}

/// The state of the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Up,
    /// Its owner has taken it out: frames are dropped, both ways.
    Out,
    /// The backend has gone for good.
    Down,
}

/// Until when no frame can be handed to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    /// There is a driver.
    Driver,
    /// There is a frame.
    Frame,
    /// The driver leaves room.
    Room,
    /// The limits let frames pass again.
    Time,
    /// The driver starts anew: it has broken the protocol, and is told so at its next notification.
    Reset,
}

impl Net {
    /// A NIC of address `mac` whose frames go to `backend`. The guest is told of `mtu`, or else of the backend's;
    /// `on_lost` is called on the device's event loop.
    ///
    /// # Errors
    /// No descriptor can be had to wait with.
    pub fn new(mac: Mac, mtu: Option<u16>, backend: Backend, on_lost: OnLost) -> io::Result<Self> {
        Ok(Self {
            mac,
            mtu: mtu.or(backend.mtu()).filter(|mtu| MTUS.contains(mtu)),
            features: backend.features(),
            readiness: Readiness::new()?,
            receiver: Receiver::new(&backend),
            backend,
            transmitter: Transmitter::default(),
            counters: Arc::default(),
            gates: gates(RateLimits::default()),
            alarm: Alarm::new()?,
            faults: Faults::default(),
            link: Link::Up,
            cable: Arc::new(Cable::new()?),
            awaited: Awaited::Driver,
            on_lost,
        })
    }

    /// The same NIC that lets no more pass than `limits` say, each way.
    #[must_use]
    pub fn limited(self, limits: RateLimits) -> Self {
        Self { gates: gates(limits), ..self }
    }

    /// What passes it.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Its cable, for its owner.
    pub fn cable(&self) -> Arc<Cable> {
        Arc::clone(&self.cable)
    }

    /// Malformed chains handed back since the device was made.
    pub fn malformed(&self) -> u64 {
        self.faults.total()
    }

    fn receive(&mut self, active: &mut Active) {
        let Self { receiver, backend, faults, counters, gates: (gate, _), .. } = self;
        self.awaited = match receiver.receive(active, backend, faults, counters, gate) {
            Left::Nothing => Awaited::Frame,
            Left::Held => Awaited::Time,
            Left::Starved => Awaited::Room,
            Left::Broken => Awaited::Reset,
            Left::Lost => {
                self.lose(Some(active));
                Awaited::Frame
            }
        };
    }

    /// Sends what the driver has, or drops it where there is nowhere to send it. Returns whether there is more.
    fn transmit(&mut self, active: &mut Active) -> bool {
        let Self { transmitter, backend, faults, counters, gates: (_, gate), .. } = self;
        let backend = (self.link == Link::Up).then_some(backend);
        match transmitter.transmit(active, backend, faults, counters, gate) {
            Ok(Progress::Done) => false,
            Ok(Progress::More) => true,
            Ok(Progress::Broken) => {
                self.awaited = Awaited::Reset;
                false
            }
            Err(error) => {
                tracing::warn!("a guest's network takes no more frames: {error}");
                self.lose(Some(active));
                true
            }
        }
    }

    /// The backend has gone.
    fn lose(&mut self, active: Option<&mut Active>) {
        self.link = Link::Down;
        self.counters.cut();
        (self.on_lost)();
        if let Some(active) = active {
            self.drop_sent(active);
            active.config_interrupt.raise();
        }
    }

    /// Drops what the driver has to send: it need not notify of that, and the backend does not wake for it.
    fn drop_sent(&mut self, active: &mut Active) {
        let mut rounds = 0..DISCARDED;
        while self.transmit(active) && rounds.next().is_some() {}
    }

    /// The owner has taken the cable out, or put it in.
    fn cable_event(&mut self, active: Option<&mut Active>) {
        self.cable.take();
        self.link = match (self.link, self.cable.is_in()) {
            (Link::Up, false) => Link::Out,
            (Link::Out, true) => Link::Up,
            _ => return,
        };
        let mut active = active.filter(|_| self.awaited != Awaited::Reset);
        if self.link == Link::Out {
            // Some may lie here already, of which nobody wakes.
            self.drop_received(active.as_deref_mut());
        }
        if let Some(active) = active {
            match self.link {
                // The driver has left buffers meanwhile, and what it did to tell so was not looked at.
                Link::Up => self.receive(active),
                Link::Out | Link::Down => self.drop_sent(active),
            }
            active.config_interrupt.raise();
        }
        self.watch();
    }

    /// Drops frames to the guest while the cable is out.
    fn drop_received(&mut self, active: Option<&mut Active>) {
        if self.receiver.discard(&mut self.backend, &self.counters) == Left::Lost {
            self.lose(active);
        }
    }

    /// Sends what is left of a frame; whether that is all.
    fn flush(&mut self) -> bool {
        let Backend::Stream(stream) = &mut self.backend else { return true };
        // Reading tells of a lost connection too, and then the driver.
        stream.flush().unwrap_or(true)
    }

    /// The limits let frames pass again.
    fn rings(&mut self, active: Option<&mut Active>) {
        self.alarm.take();
        if let Some(active) = active.filter(|_| self.awaited != Awaited::Reset && self.link == Link::Up) {
            let Self { gates: (to_guest, from_guest), counters, .. } = self;
            // Looked at here, as a driver may have taken its frames back: then nobody else looks.
            let receives = self.awaited == Awaited::Time && to_guest.is_open(counters);
            let transmits = from_guest.opens_at().is_some() && from_guest.is_open(counters);
            if receives {
                self.receive(active);
            }
            if transmits && self.transmit(active) {
                self.transmitter.wait();
            }
        }
        self.watch();
    }

    /// Has what the device waits for watched.
    fn watch(&mut self) {
        let mut wanted = EventSet::empty();
        let (is_up, is_out) = (self.link == Link::Up, self.link == Link::Out);
        if is_out || is_up && self.awaited == Awaited::Frame {
            wanted |= EventSet::IN;
        }
        let behind = matches!(&self.backend, Backend::Stream(stream) if stream.is_behind());
        let waits = is_up && self.transmitter.waits() && self.awaited != Awaited::Reset;
        if self.link != Link::Down && behind || waits {
            wanted |= EventSet::OUT;
        }
        let (to_guest, from_guest) = &self.gates;
        let is_up = is_up && self.awaited != Awaited::Reset;
        self.alarm.set([
            to_guest.opens_at().filter(|_| is_up && self.awaited == Awaited::Time),
            from_guest.opens_at().filter(|_| is_up && self.awaited != Awaited::Driver),
        ]);
        if let Err(error) = self.readiness.watch(&self.backend, wanted) {
            tracing::warn!("a guest's network can't be waited for: {error}");
        }
    }
}

/// What a driver reads.
fn config(mac: Mac, mtu: Option<u16>, link: Link) -> [u8; CONFIG] {
    let mut config = [0; CONFIG];
    let (address, rest) = config.split_at_mut(6);
    address.copy_from_slice(&mac.bytes());
    let status = if link == Link::Up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
    // Status, queue pairs, MTU.
    let words = [status, 1, mtu.unwrap_or(0)].map(u16::to_le_bytes);
    rest.copy_from_slice(words.as_flattened());
    config
}

/// To the guest, and from it.
fn gates(limits: RateLimits) -> (Gate, Gate) {
    (Gate::new(Direction::Received, limits), Gate::new(Direction::Sent, limits))
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF;
        let mtu = if self.mtu.is_some() { 1 << VIRTIO_NET_F_MTU } else { 0 };
        always | mtu | self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let bytes = config(self.mac, self.mtu, self.link);
        read_part(&bytes, offset, data);
    }

    /// The address is not the driver's to write since virtio 1.0.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, active: &mut Active) {
        if let Err(error) = self.backend.offload(active.features) {
            tracing::warn!("the host gives a guest's network whole frames only: {error}");
        }
        let mtu = self.mtu.max(self.backend.mtu());
        self.receiver.activate(active, mtu);
        self.transmitter.activate(active);
        self.awaited = Awaited::Frame;
    }

    fn reset(&mut self) {
        // The next driver may take none of what this one takes.
        let _ = self.backend.offload(0);
        self.faults.forgive();
        self.receiver.reset();
        self.transmitter.reset();
        self.awaited = Awaited::Driver;
        self.watch();
    }

    fn drain(&mut self, active: &mut Active) {
        self.receiver.drain(active);
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        let mut more = false;
        match index {
            _ if self.awaited == Awaited::Reset => {}
            RX if self.link != Link::Up => {}
            RX => self.receive(active),
            _ => more = self.transmit(active),
        }
        self.watch();
        match self.awaited {
            Awaited::Reset => Progress::Broken,
            _ if more => Progress::More,
            _ => Progress::Done,
        }
    }

    fn own_events(&self) -> Vec<RawFd> {
        vec![self.readiness.as_raw_fd(), self.alarm.as_raw_fd(), self.cable.as_raw_fd()]
    }

    fn own_event(&mut self, index: usize, active: Option<&mut Active>) {
        match index {
            ALARM => return self.rings(active),
            CABLE => return self.cable_event(active),
            _ => {}
        }
        let ready = self.readiness.ready();
        let ended = ready.intersects(EventSet::ERROR | EventSet::HANG_UP);
        let flushed = ready.contains(EventSet::OUT) && self.flush();
        match active {
            active if self.link == Link::Out && ready.contains(EventSet::IN) => self.drop_received(active),
            Some(active) if self.link == Link::Up && self.awaited != Awaited::Reset => {
                if self.awaited == Awaited::Frame && (ended || ready.contains(EventSet::IN)) {
                    self.receive(active);
                } else if ended {
                    self.lose(Some(active));
                }
                if flushed && self.transmit(active) {
                    self.transmitter.wait();
                }
            }
            active if ended && self.link != Link::Down => self.lose(active),
            _ => {}
        }
        self.watch();
    }

    fn sandbox_needs(&self) -> SandboxNeeds {
        match &self.backend {
            Backend::Tap(_) => SandboxNeeds::calls(&[Call::ioctl(libc::TUNSETOFFLOAD)]),
            Backend::Stream(_) => SandboxNeeds::default(),
        }
    }

    fn save(&self) -> Result<Value, StateError> {
        let Self { faults, mac, mtu, features, .. } = *self;
        state::to_value(&NetState { version: Version, faults, mac, mtu, features })
    }

    fn restore(&mut self, state: Value, active: Option<&mut Active>) -> Result<(), StateError> {
        let state: NetState = state::from_value::<_, 1>(DEVICE, state)?;
        let unreadable = |what: &str| StateError::Unreadable { device: DEVICE, what: what.to_owned() };
        if state.features & !self.backend.features() != 0 {
            return Err(unreadable("its network took checksums or segments that this one does not take"));
        }
        if !state.mtu.is_none_or(|mtu| MTUS.contains(&mtu)) {
            return Err(unreadable("its MTU is none"));
        }
        self.faults = state.faults;
        self.mac = state.mac;
        self.mtu = state.mtu;
        self.features = state.features;
        if let Some(active) = active {
            self.activate(active);
        }
        Ok(())
    }
}
