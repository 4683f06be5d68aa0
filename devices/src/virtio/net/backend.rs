//! Where a NIC's frames go and come from.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::stream::Stream;
use super::tap::Tap;

/// The other end of a NIC's cable.
pub enum Backend {
    /// A tap of the host.
    Tap(Tap),
    /// A process at the other end of a stream socket, such as passt.
    Stream(Stream),
}

impl Backend {
    /// Features of the device that it is good for.
    pub fn features(&self) -> u64 {
        match self {
            Self::Tap(tap) => tap.features(),
            // There is no place for virtio's header beside the frame.
            Self::Stream(_) => 0,
        }
    }

    /// The largest packet that it carries, as far as it can be known.
    pub fn mtu(&self) -> Option<u16> {
        match self {
            Self::Tap(tap) => tap.mtu(),
            Self::Stream(_) => None,
        }
    }

    /// The driver takes frames as it has agreed to in `features`.
    pub fn offload(&self, features: u64) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.offload(features),
            Self::Stream(_) => Ok(()),
        }
    }
}

/// Tells when a backend is ready for what the device waits for. It is a descriptor of the device's own for its
/// event loop; what it looks at changes, and that does not.
pub struct Readiness {
    epoll: Epoll,
    watched: EventSet,
}

impl Readiness {
    /// It watches nothing.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, watched: EventSet::empty() })
    }

    /// Watches `backend` for `wanted`; for nothing, not even its end, where that is empty.
    pub fn watch(&mut self, backend: &Backend, wanted: EventSet) -> io::Result<()> {
        let operation = match (self.watched.is_empty(), wanted.is_empty()) {
            _ if wanted == self.watched => return Ok(()),
            (true, _) => ControlOperation::Add,
            (false, true) => ControlOperation::Delete,
            (false, false) => ControlOperation::Modify,
        };
        let descriptor = match backend {
            Backend::Tap(tap) => tap.as_fd().as_raw_fd(),
            Backend::Stream(stream) => stream.as_fd().as_raw_fd(),
        };
        self.epoll.ctl(operation, descriptor, EpollEvent::new(wanted, 0))?;
        self.watched = wanted;
        Ok(())
    }

    /// What has come of it.
    pub fn ready(&self) -> EventSet {
        let mut events = [EpollEvent::default()];
        match self.epoll.wait(0, &mut events) {
            Ok(1..) => events[0].event_set(),
            _ => EventSet::empty(),
        }
    }
}

impl AsRawFd for Readiness {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.epoll.as_raw_fd()
    }
}
