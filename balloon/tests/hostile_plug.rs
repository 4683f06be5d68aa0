//! A hostile guest against virtio-mem: nothing panics, it never has more than
//! was requested, and after a reset the device works.

use balloon::units::Bytes;
use devices::testing::hostile::{Act, any_act, chain_act};
use devices::testing::{BUFFERS, HIGH, NEEDS_RESET, REGION, RUNNING};
use proptest::collection::vec;
use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

mod yard;
use yard::*;

/// Blocks in the region.
const BLOCKS: u64 = REGION as u64 / BLOCK;
const QUEUES: usize = 1;
const SIZE: u16 = 64;

/// What the guest does, and the host meanwhile.
#[derive(Clone, Debug)]
enum Step {
    Act(Act),
    /// A request that the device understands, were it running.
    Ask(u16, u64, u16),
    Request(u64),
    Refuse(bool),
}

fn steps(act: impl Strategy<Value = Act>) -> impl Strategy<Value = Vec<Step>> {
    let address = prop_oneof![
        8 => (0..BLOCKS + 2).prop_map(|block| HIGH + block * BLOCK),
        1 => any::<u64>(),
    ];
    let blocks = prop_oneof![8 => 0u16..20, 1 => any::<u16>()];
    let step = prop_oneof![
        10 => act.prop_map(Step::Act),
        10 => (0u16..5, address, blocks).prop_map(|(kind, address, blocks)| Step::Ask(kind, address, blocks)),
        2 => (0..BLOCKS + 2).prop_map(Step::Request),
        1 => any::<bool>().prop_map(Step::Refuse),
    ];
    vec(step, 1..96)
}

fn take(step: &Step, yard: &mut Yard) {
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

fn assert_usable(yard: &mut Yard) {
    yard.guest.ram.assert_canaries();
    yard.gate.lock().unwrap().refuses = false;
    yard.guest.start(0);
    assert_eq!(yard.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(yard.handle.plugged(), Bytes::ZERO);
    assert!((0..BLOCKS).all(|block| !yard.guest.ram.resident(HIGH + block * BLOCK)));
    yard.request(BLOCKS);
    assert_eq!(yard.ask(PLUG, 0, BLOCKS as u16), (ACK, 0));
    assert_eq!(yard.handle.plugged(), Bytes(REGION as u64));
    yard.assert_books();
    assert_eq!(yard.guest.status(), RUNNING);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn anything_a_guest_does_ends_with_a_device_that_works(steps in steps(any_act(QUEUES, SIZE))) {
        let mut yard = Yard::new();
        for step in &steps {
            take(step, &mut yard);
        }
        assert_usable(&mut yard);
    }

    #[test]
    fn any_chains_plug_no_more_than_is_requested(steps in steps(chain_act(QUEUES, SIZE))) {
        let mut yard = Yard::new();
        yard.guest.start(0);
        for step in &steps {
            take(step, &mut yard);
            let status = yard.guest.status();
            prop_assert!(status == RUNNING || status == RUNNING | NEEDS_RESET);
        }
        assert_usable(&mut yard);
    }
}
