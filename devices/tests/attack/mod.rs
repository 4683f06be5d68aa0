//! A hostile guest's room: the transport with the entropy device behind it.
//! Shared by the property tests and the fuzz target.

use devices::testing::{BUFFERS, Carrier, Guest, RUNNING};
use devices::virtio::rng::Rng;
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
use vm_memory::{Bytes, GuestAddress};

/// The size of its queue.
pub const SIZE: u16 = 64;

/// A guest with an entropy device.
pub fn guest(carrier: Carrier) -> Guest {
    let guest = Guest::on(carrier, |_| Box::new(Rng::new()));
    assert_eq!(guest.size(0), SIZE);
    guest
}

/// Whatever was before: after a reset an honest driver gets its randomness.
pub fn assert_usable(guest: &mut Guest) {
    guest.ram.assert_canaries();
    guest.start(0);
    guest.ram.memory.write_slice(&[0; 256], GuestAddress(BUFFERS)).unwrap();
    guest.describe(0, 0, BUFFERS, 256, VRING_DESC_F_WRITE, 0);
    guest.send(0, 0);
    assert_eq!(guest.used(0), [(0, 256)]);
    let mut bytes = [0; 256];
    guest.ram.memory.read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
    assert!(bytes.iter().filter(|byte| **byte != 0).count() > 128, "that is not random");
    assert_eq!(guest.status(), RUNNING);
}
