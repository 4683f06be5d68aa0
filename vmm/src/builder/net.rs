//! Connects network cards.

use std::sync::Arc;

use devices::virtio::net::backend::Backend;
use devices::virtio::net::stream::Stream;
use devices::virtio::net::tap::Tap;
use devices::virtio::net::{Net, NetError, OnLost};

use super::passt::{self, Passt, PasstError};
use super::{BuildError, refused};
use crate::config::{DeviceId, Name, NetBackend, NetOptions};
use crate::helper::Helper;

/// Why a network card has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A tap.
    #[error(transparent)]
    Tap(#[from] NetError),
    /// passt.
    #[error(transparent)]
    Passt(#[from] PasstError),
}

/// The card `id` of the VM `name`, and the process at the other end of its cable, if it is one of ours.
pub fn open(
    name: &Name,
    id: &DeviceId,
    options: &NetOptions,
) -> Result<(Net, Option<Arc<Helper>>), BuildError> {
    let mac = options.mac(name, id);
    let (backend, mtu, helper) = match &options.backend {
        NetBackend::Tap(tap) => {
            (Backend::Tap(Tap::open(tap).map_err(NetworkError::from)?), options.mtu, None)
        }
        NetBackend::Bridge(bridge) => {
            let tap = Tap::in_bridge(bridge, mac).map_err(NetworkError::from)?;
            tracing::debug!("{id} is {} in {bridge}", tap.name());
            (Backend::Tap(tap), options.mtu, None)
        }
        NetBackend::Fd(number) => {
            // SAFETY: the user says that it is for this card, and no other device of ours takes descriptors by number.
            let tap = unsafe { Tap::from_descriptor(*number) };
            (Backend::Tap(tap.map_err(NetworkError::from)?), options.mtu, None)
        }
        NetBackend::User(user) => {
            let mtu = options.mtu.unwrap_or(passt::MTU);
            let Passt { socket, helper, words } = passt::start(user, mtu).map_err(NetworkError::from)?;
            let stream = Stream::new(socket).map_err(refused("a socket that does not wait"))?;
            (Backend::Stream(stream), Some(mtu), Some((Arc::new(helper), words)))
        }
    };
    let (helper, on_lost): (_, OnLost) = match helper {
        None => (None, Box::new(|| {})),
        Some((helper, mut words)) => {
            let of_device = Arc::clone(&helper);
            let on_lost = move || {
                of_device.end();
                tracing::error!(
                    event = "network-lost",
                    "passt has ended, and the guest has no network: {}",
                    words.take()
                );
            };
            (Some(helper), Box::new(on_lost))
        }
    };
    let net =
        Net::new(mac, mtu, backend, on_lost).map_err(refused("a network card"))?.limited(options.limits());
    tracing::debug!("{id} has the address {mac}");
    Ok((net, helper))
}
