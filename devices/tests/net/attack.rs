//! Any story of a hostile guest, with a network that goes on. Shared with the fuzz target.

use devices::testing::hostile::Act;
use devices::testing::{Carrier, Guest};
use proptest::prelude::*;
use std::sync::Arc;

use super::room::{Peer, frame, nic, stream};

pub const QUEUES: usize = 2;
pub const SIZE: u16 = 256;

/// What happens.
#[derive(Clone, Debug)]
pub enum Step {
    /// The guest does something.
    Guest(Act),
    /// A frame of so many bytes comes.
    Comes(usize),
    /// The other end reads so much.
    Goes(usize),
    /// The VM is paused, and goes on.
    Pause,
}

/// A step, with what `act` gives.
pub fn step(act: impl Strategy<Value = Act>) -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => act.prop_map(Step::Guest),
        3 => prop_oneof![14usize..2000, 1usize..20, 2000usize..40_000].prop_map(Step::Comes),
        1 => (1usize..100_000).prop_map(Step::Goes),
        1 => Just(Step::Pause),
    ]
}

/// A guest with a NIC, and the other end of its cable.
pub fn hostile_room(carrier: Carrier) -> (Guest, Peer) {
    let (backend, peer) = stream();
    let net = nic(backend, &Arc::default());
    let guest = Guest::on(carrier, |_| Box::new(net));
    assert_eq!((guest.queues(), guest.size(0)), (QUEUES, SIZE));
    (guest, peer)
}

/// Does one step.
pub fn take(step: &Step, guest: &mut Guest, peer: &mut Peer) {
    match step {
        Step::Guest(act) => act.apply(guest),
        // One that reads nothing may have the socket full.
        Step::Comes(len) => {
            if peer.has_room() {
                peer.send(&frame(*len, 1));
            }
        }
        Step::Goes(most) => {
            peer.read(*most);
        }
        Step::Pause => {
            guest.transport().lock().unwrap().drain();
            guest.run();
            guest.transport().lock().unwrap().resume();
        }
    }
    guest.run();
}
