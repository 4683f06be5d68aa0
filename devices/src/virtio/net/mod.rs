//! The network device (virtio 1.2, section 5.1): one queue to the guest, one from it.
//!
//! The device works on its event loop alone, which should be its own: frames go between guest memory and the
//! backend's descriptor there, and nothing is in flight when an event is over.

pub mod backend;
mod bridge;
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
    awaited: Awaited,
    on_lost: OnLost,
}

/// The state of the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Up,
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

    /// Malformed chains handed back since the device was made.
    pub fn malformed(&self) -> u64 {
        self.faults.total()
    }

    fn config(&self) -> [u8; CONFIG] {
        let mut config = [0; CONFIG];
        let (mac, rest) = config.split_at_mut(6);
        mac.copy_from_slice(&self.mac.bytes());
        let status = if self.link == Link::Down { 0 } else { VIRTIO_NET_S_LINK_UP as u16 };
        let mtu = self.mtu.unwrap_or(0);
        // Status, queue pairs, MTU.
        let words = [status.to_le_bytes(), 1u16.to_le_bytes(), mtu.to_le_bytes()];
        rest.copy_from_slice(words.as_flattened());
        config
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
            // The driver need not notify of what waits to be sent, and the backend never wakes for it again.
            let mut rounds = 0..DISCARDED;
            while self.transmit(active) && rounds.next().is_some() {}
            active.config_interrupt.raise();
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
        if self.link == Link::Up {
            if self.awaited == Awaited::Frame {
                wanted |= EventSet::IN;
            }
            let behind = matches!(&self.backend, Backend::Stream(stream) if stream.is_behind());
            if behind || self.transmitter.waits() && self.awaited != Awaited::Reset {
                wanted |= EventSet::OUT;
            }
        }
        let (to_guest, from_guest) = &self.gates;
        let is_up = self.link == Link::Up && self.awaited != Awaited::Reset;
        self.alarm.set([
            to_guest.opens_at().filter(|_| is_up && self.awaited == Awaited::Time),
            from_guest.opens_at().filter(|_| is_up && self.awaited != Awaited::Driver),
        ]);
        if let Err(error) = self.readiness.watch(&self.backend, wanted) {
            tracing::warn!("a guest's network can't be waited for: {error}");
        }
    }
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
        let bytes = self.config();
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
            RX if self.link == Link::Down => {}
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
        vec![self.readiness.as_raw_fd(), self.alarm.as_raw_fd()]
    }

    fn own_event(&mut self, index: usize, active: Option<&mut Active>) {
        if index == ALARM {
            return self.rings(active);
        }
        let ready = self.readiness.ready();
        let ended = ready.intersects(EventSet::ERROR | EventSet::HANG_UP);
        let flushed = ready.contains(EventSet::OUT) && self.flush();
        match active {
            Some(active) if self.awaited != Awaited::Reset => {
                if self.awaited == Awaited::Frame && (ended || ready.contains(EventSet::IN)) {
                    self.receive(active);
                } else if ended {
                    self.lose(Some(active));
                }
                if flushed && self.transmit(active) {
                    self.transmitter.wait();
                }
            }
            active if ended => self.lose(active),
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
