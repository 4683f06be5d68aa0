//! What a hostile guest does to virtio-mem, and what must hold whatever it does.
//! Shared by the property tests and the fuzz target.

use api::units::Bytes;
use devices::testing::hostile::Act;
use devices::testing::{BUFFERS, HIGH, REGION, RUNNING};
use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::yard::{ACK, BLOCK, PLUG, UNPLUG_ALL, Yard};

/// Blocks in the region.
const BLOCKS: u64 = REGION as u64 / BLOCK;
/// Queues of virtio-mem.
pub const QUEUES: usize = 1;
/// How large it is.
pub const SIZE: u16 = 64;

/// What the guest does, and the host meanwhile.
#[derive(Clone, Debug)]
pub enum Step {
    /// An act of the guest.
    Act(Act),
    /// A request that the device understands, were it running.
    Ask(u16, u64, u16),
    /// The host asks for so many blocks.
    Request(u64),
    /// The host's kernel refuses to open and close blocks, or no longer does.
    Refuse(bool),
}

/// One step, of a guest that does `act`s.
pub fn step(act: impl Strategy<Value = Act>) -> impl Strategy<Value = Step> {
    let address = prop_oneof![
        8 => (0..BLOCKS + 2).prop_map(|block| HIGH + block * BLOCK),
        1 => any::<u64>(),
    ];
    let blocks = prop_oneof![8 => 0u16..20, 1 => any::<u16>()];
    prop_oneof![
        10 => act.prop_map(Step::Act),
        10 => (0u16..5, address, blocks).prop_map(|(kind, address, blocks)| Step::Ask(kind, address, blocks)),
        2 => (0..BLOCKS + 2).prop_map(Step::Request),
        1 => any::<bool>().prop_map(Step::Refuse),
    ]
}

/// Does one step, and checks what holds after any.
pub fn take(step: &Step, yard: &mut Yard) {
    let before = yard.handle.plugged();
    match step {
        Step::Act(act) => act.apply(&mut yard.guest),
        Step::Ask(kind, address, blocks) => {
            if yard.guest.status() == RUNNING {
                yard.write_request(*kind, *address, *blocks);
                yard.guest.describe(0, 0, BUFFERS, 24, VRING_DESC_F_NEXT, 1);
                yard.guest.describe(0, 1, BUFFERS + 64, 10, VRING_DESC_F_WRITE, 0);
                yard.guest.send(0, 0);
            }
        }
        Step::Request(blocks) => yard.request(*blocks),
        Step::Refuse(refuses) => yard.gate.lock().unwrap().refuses = *refuses,
    }
    yard.guest.run();
    yard.assert_books();
    let (plugged, requested) = (yard.handle.plugged(), yard.handle.requested());
    assert!(plugged <= before.max(requested), "{plugged} of {requested} are plugged, before {before}");
    assert_eq!(yard.handle.counters().discard_failures, 0);
}

/// Whatever was before: after a reset an honest driver plugs all that it is asked to.
pub fn assert_usable(yard: &mut Yard) {
    yard.guest.ram.assert_canaries();
    yard.gate.lock().unwrap().refuses = false;
    yard.guest.start(0);
    assert_eq!(yard.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(yard.handle.plugged(), Bytes::ZERO);
    yard.request(BLOCKS);
    assert_eq!(yard.ask(PLUG, 0, BLOCKS as u16), (ACK, 0));
    assert_eq!(yard.handle.plugged(), Bytes(REGION as u64));
    // Rings may have stood where nothing was plugged: nobody keeps a test's device from there.
    assert_eq!(yard.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert!((0..BLOCKS).all(|block| !yard.guest.ram.resident(HIGH + block * BLOCK)));
    assert_eq!(yard.ask(PLUG, 0, BLOCKS as u16), (ACK, 0));
    yard.assert_books();
    assert_eq!(yard.guest.status(), RUNNING);
}
