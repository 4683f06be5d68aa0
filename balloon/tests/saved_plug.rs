//! virtio-mem that is saved in one process and restored in another, and states that nobody saved.

use api::status::DriverState;
use api::units::Bytes;
use balloon::plug::UNPLUGGED_INACCESSIBLE;
use balloon::plug::saved::{PlugState, Run};
use devices::state::StateError;
use devices::testing::{BUFFERS, HIGH, REGION, RUNNING};
use devices::virtio::saved::VirtioState;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes as _, GuestAddress};

#[path = "yard/attack.rs"]
#[expect(dead_code, reason = "shared with tests of hostile guests")]
mod attack;
mod yard;
use attack::assert_usable;
use yard::{ACK, BLOCK, PLUG, Yard};

const REQUESTED_SIZE: u32 = VIRTIO_MMIO_CONFIG + 48;

/// Through text, as a file or a socket would carry it.
fn carried(state: &VirtioState) -> VirtioState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

fn moved(yard: Yard) -> Yard {
    let state = carried(&yard.guest.save().unwrap());
    let there = yard.restore(state.clone()).unwrap();
    assert_eq!(there.guest.save().unwrap(), state, "nothing is lost on the way");
    there
}

/// A guest that has plugged blocks 0 to 3 and 9.
fn plugged() -> Yard {
    let mut yard = Yard::new();
    yard.guest.start(0);
    yard.request(5);
    assert_eq!(yard.ask(PLUG, 0, 4), (ACK, 0));
    assert_eq!(yard.ask(PLUG, 9, 1), (ACK, 0));
    yard
}

#[test]
fn what_is_plugged_stays_plugged_and_open() {
    let yard = plugged();
    yard.guest.ram.memory.write_obj(7u8, GuestAddress(HIGH + 3 * BLOCK)).unwrap();
    let mut yard = moved(yard);
    assert_eq!(yard.gate.lock().unwrap().open, [0, 1, 2, 3, 9].into());
    assert_eq!((yard.handle.driver(), yard.handle.requested()), (DriverState::Active, Bytes(5 * BLOCK)));
    assert_eq!(yard.guest.ram.memory.read_obj::<u8>(GuestAddress(HIGH + 3 * BLOCK)).unwrap(), 7);
    yard.assert_books();
    yard.request(6);
    assert_eq!(yard.ask(PLUG, 10, 1), (ACK, 0));
    assert_usable(&mut moved(yard));
}

#[test]
fn a_request_that_the_guest_has_not_heard_of_is_told_after_the_move() {
    let yard = plugged();
    // No event loop runs before the device is saved.
    yard.handle.request(Bytes(2 * BLOCK));
    let mut yard = moved(yard);
    assert_eq!(yard.guest.read(REQUESTED_SIZE), 5 * BLOCK as u32);
    yard.guest.interrupts();
    yard.guest.run();
    assert!(yard.guest.interrupts() > 0);
    assert_eq!(yard.guest.read(REQUESTED_SIZE), 2 * BLOCK as u32);
}

#[test]
fn a_driver_that_would_read_what_is_not_plugged_gets_nothing_there_either() {
    let mut yard = Yard::new();
    yard.guest.start(1 << UNPLUGGED_INACCESSIBLE);
    assert_eq!(moved(yard).handle.driver(), DriverState::Broken);
    assert_eq!(moved(Yard::new()).handle.driver(), DriverState::Absent);
}

/// The sentence that refuses a state with something changed.
fn refused(spoil: impl FnOnce(&mut PlugState)) -> String {
    let yard = plugged();
    let mut state = yard.guest.save().unwrap();
    let mut device: PlugState = serde_json::from_value(state.device).unwrap();
    spoil(&mut device);
    state.device = serde_json::to_value(device).unwrap();
    yard.restore(state).err().expect("it is refused").to_string()
}

#[test]
fn what_no_device_can_have_come_to_is_refused_by_name() {
    type Spoil = fn(&mut PlugState);
    let run = |first, count| vec![Run { first, count }];
    let cases: [(Spoil, &str); 7] = [
        (|s| s.address += BLOCK, "same memory"),
        (|s| s.size = Bytes(0), "same memory"),
        (|s| s.block = Bytes(0), "same memory"),
        (|s| s.requested = Bytes(u64::MAX), "requested"),
        (|s| s.told = Bytes(1), "told"),
        (|s| s.plugged.reverse(), "blocks 0 and up"),
        (|s| s.plugged[0].count = u64::MAX, "blocks 0 and up"),
    ];
    for (spoil, word) in cases {
        let sentence = refused(spoil);
        assert!(sentence.contains(word), "{word} is missing in {sentence}");
    }
    for runs in [run(16, 1), run(3, 0), run(u64::MAX, 1), run(0, 17)] {
        assert!(refused(|state| state.plugged = runs).contains("blocks"));
    }
}

#[test]
fn another_version_is_refused_with_a_sentence() {
    let yard = plugged();
    let mut state = yard.guest.save().unwrap();
    state.device = json!({"version": 2, "regions": []});
    let error = yard.restore(state).err().expect("it is refused").to_string();
    assert!(error.contains("virtio-mem") && error.contains("version 2"), "{error}");
}

#[test]
fn a_host_that_can_not_open_the_memory_says_so() {
    let yard = plugged();
    let state = yard.guest.save().unwrap();
    // The kernel's answer where a process has too many mappings.
    let refusing = yard.restore_on(state, true).err().expect("it is refused");
    assert!(matches!(refusing, StateError::Host(_)), "{refusing}");
}

fn bytes() -> impl Strategy<Value = Bytes> {
    prop_oneof![8 => (0..18_u64).prop_map(|blocks| Bytes(blocks * BLOCK)), 1 => any::<u64>().prop_map(Bytes)]
}

fn runs() -> impl Strategy<Value = Vec<Run>> {
    let number = || prop_oneof![8 => 0_u64..18, 1 => any::<u64>()];
    vec((number(), number()).prop_map(|(first, count)| Run { first, count }), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever is restored, the device keeps to its region and its books, and works after a reset.
    #[test]
    fn no_state_breaks_a_device(requested in bytes(), told in bytes(), plugged in runs(), running: bool) {
        let mut yard = Yard::new();
        if running {
            yard.guest.start(0);
        }
        let mut state = yard.guest.save().unwrap();
        let device: PlugState = serde_json::from_value(state.device).unwrap();
        let device = PlugState { requested, told, plugged, ..device };
        state.device = serde_json::to_value(device).unwrap();
        if let Ok(mut yard) = yard.restore(state) {
            yard.assert_books();
            yard.guest.run();
            prop_assert_eq!(yard.guest.status(), if running { RUNNING } else { 0 });
            let mut yard = moved(yard);
            prop_assert!(yard.handle.plugged() <= Bytes(REGION as u64));
            yard.guest.ram.memory.write_slice(&[0; 64], GuestAddress(BUFFERS)).unwrap();
            assert_usable(&mut yard);
        }
    }
}
