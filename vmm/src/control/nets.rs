//! A VM's network cards, for who looks at them.

use std::sync::Arc;

use api::status::{NetCount, NetStatus};
use api::units::Bytes;
use devices::virtio::net::counters::{Counters, Direction};

use super::Control;
use crate::config::{DeviceId, NetBackend, NetOptions};

/// A network card that was made.
pub struct Nic {
    /// What it is called in its VM.
    pub id: DeviceId,
    /// Its address.
    pub mac: String,
    /// What was asked for.
    pub options: NetOptions,
    /// What passes it.
    pub counters: Arc<Counters>,
}

impl Control {
    /// Its network cards.
    pub(super) fn nets(&self) -> Vec<NetStatus> {
        self.parts.get().map_or_else(Vec::new, |parts| parts.nets.iter().map(status).collect())
    }
}

fn status(nic: &Nic) -> NetStatus {
    let count = |direction| {
        let traffic = nic.counters.traffic(direction);
        NetCount {
            frames: traffic.frames,
            bytes: Bytes(traffic.bytes),
            dropped: traffic.dropped,
            limited: traffic.limited,
            limited_ms: u64::try_from(traffic.limited_for.as_millis()).unwrap_or(u64::MAX),
        }
    };
    let (backend, address, forwards) = match &nic.options.backend {
        NetBackend::User(user) => {
            let forwards = user.forwards.iter().map(ToString::to_string).collect();
            ("user".to_owned(), Some(crate::builder::GUEST_OF_PASST.to_owned()), forwards)
        }
        NetBackend::Tap(name) => (format!("tap={name}"), None, Vec::new()),
        NetBackend::Bridge(name) => (format!("bridge={name}"), None, Vec::new()),
        NetBackend::Fd(number) => (format!("fd={number}"), None, Vec::new()),
    };
    NetStatus {
        id: nic.id.as_str().to_owned(),
        mac: nic.mac.clone(),
        backend,
        address,
        forwards,
        up: nic.counters.is_up(),
        received: count(Direction::Received),
        sent: count(Direction::Sent),
    }
}
