//! A balloon that is saved in one process and restored in another, and states that nobody saved.

use api::status::DriverState;
use api::units::{Bytes, PAGE_SIZE, Pages};
use balloon::device::pace::PaceState;
use balloon::device::saved::{BalloonState, Run};
use balloon::device::{Handle, MUST_TELL_HOST};
use devices::state::StateError;
use devices::testing::{BUFFERS, Guest, HIGH, LOW, REGION, RUNNING};
use devices::virtio::saved::VirtioState;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes as _, GuestAddress};

#[path = "room/attack.rs"]
#[expect(dead_code, reason = "shared with tests of hostile guests")]
mod attack;
mod room;
use attack::assert_usable;
use room::{MAP, config, device, guest};

const INFLATE: usize = 0;
const STATISTICS: usize = 2;
const NUM_PAGES: u32 = VIRTIO_MMIO_CONFIG;
const ACTUAL: u32 = VIRTIO_MMIO_CONFIG + 4;

/// Pages of the whole map.
const ALL: u64 = MAP.0 / PAGE_SIZE;
const FIRST: u64 = HIGH / PAGE_SIZE;

fn restore(guest: Guest, state: VirtioState) -> Result<(Guest, Handle), StateError> {
    let (balloon, handle) = device(&guest.ram, config());
    Ok((guest.restore(Box::new(balloon), state)?, handle))
}

/// Its own state, through text, as a file or a socket would carry it.
fn own(state: &VirtioState) -> BalloonState {
    serde_json::from_str(&state.device.to_string()).unwrap()
}

fn moved(guest: Guest) -> (Guest, Handle) {
    let before = guest.save().unwrap();
    let (there, handle) = restore(guest, before.clone()).unwrap();
    let (before, mut after) = (own(&before), own(&there.save().unwrap()));
    // Time goes on.
    if let (Some(before), Some(after)) = (&before.report, &mut after.report) {
        assert!(after.age_ms >= before.age_ms);
        after.age_ms = before.age_ms;
    }
    assert_eq!(after, before, "nothing is lost on the way");
    (there, handle)
}

/// Has the guest put pages of its upper region into the balloon.
fn inflate(guest: &mut Guest, first: u64, count: u64) {
    for (place, page) in (first..first + count).enumerate() {
        guest.ram.memory.write_obj(7u8, GuestAddress(HIGH + page * PAGE_SIZE)).unwrap();
        let pfn = u32::try_from(FIRST + page).unwrap();
        guest.ram.memory.write_obj(pfn.to_le(), GuestAddress(BUFFERS + 4 * place as u64)).unwrap();
    }
    guest.describe(INFLATE, 0, BUFFERS, 4 * count as u32, 0, 0);
    guest.send(INFLATE, 0);
}

#[test]
fn a_balloon_on_its_way_goes_on() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    handle.set_target(Bytes(MAP.0 / 4)).unwrap();
    guest.run();
    guest.write(ACTUAL, 40);
    let asked = guest.read(NUM_PAGES);
    let (mut guest, handle) = moved(guest);
    assert_eq!((guest.read(NUM_PAGES), guest.read(ACTUAL)), (asked, 40));
    assert_eq!((handle.target(), handle.driver()), (Bytes(MAP.0 / 4), DriverState::Active));
    assert_eq!(handle.actual(), MAP.saturating_sub(Pages(40).bytes()));
    handle.set_target(MAP).unwrap();
    guest.run();
    assert_eq!(guest.read(NUM_PAGES), 0);
}

#[test]
fn a_target_that_the_guest_has_not_heard_of_is_told_after_the_move() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    // No event loop runs before the device is saved.
    handle.set_target(MAP).unwrap();
    let (mut guest, handle) = moved(guest);
    assert_ne!(guest.read(NUM_PAGES), 0);
    guest.interrupts();
    guest.run();
    assert!(guest.interrupts() > 0);
    assert_eq!((guest.read(NUM_PAGES), handle.target()), (0, MAP));
}

#[test]
fn pages_that_waited_for_their_neighbours_go_after_the_move() {
    let (mut guest, _) = guest(config());
    guest.start(0);
    inflate(&mut guest, 8, 3);
    assert!(guest.ram.resident(HIGH + 8 * PAGE_SIZE), "they wait");
    let (mut guest, handle) = moved(guest);
    // The driver says that it has come where it was asked to.
    let asked = guest.read(NUM_PAGES);
    guest.write(ACTUAL, asked);
    guest.run();
    assert!((8..11).all(|page| !guest.ram.resident(HIGH + page * PAGE_SIZE)));
    assert_eq!(handle.counters().discarded, Pages(3).bytes());
}

#[test]
fn the_buffer_for_statistics_and_the_last_report_move_along() {
    let (mut guest, _) = guest(config());
    guest.start(0);
    let mut entry = [0; 10];
    entry[..2].copy_from_slice(&4u16.to_le_bytes());
    entry[2..].copy_from_slice(&(5u64 << 20).to_le_bytes());
    guest.ram.memory.write_slice(&entry, GuestAddress(BUFFERS)).unwrap();
    guest.describe(STATISTICS, 3, BUFFERS, 10, 0, 0);
    guest.send(STATISTICS, 3);
    let (guest, handle) = moved(guest);
    assert_eq!(own(&guest.save().unwrap()).statistics_buffer, serde_json::from_value(json!(3)).unwrap());
    assert_eq!(handle.report().unwrap().statistics.free, Some(Bytes::mib(5)));
    assert_eq!(handle.driver(), DriverState::Active);
    drop(guest);
}

#[test]
fn a_device_without_a_driver_moves_too() {
    let (guest, _) = guest(config());
    let (mut guest, handle) = moved(guest);
    assert_eq!(handle.driver(), DriverState::Absent);
    assert_usable(&mut guest, &handle);
}

/// The sentence that refuses a state with something changed.
fn refused(running: bool, spoil: impl FnOnce(&mut BalloonState)) -> String {
    let (mut guest, _) = guest(config());
    if running {
        guest.start(0);
    }
    let mut state = guest.save().unwrap();
    let mut device = own(&state);
    spoil(&mut device);
    state.device = serde_json::to_value(device).unwrap();
    restore(guest, state).err().expect("it is refused").to_string()
}

#[test]
fn what_no_device_can_have_come_to_is_refused_by_name() {
    type Spoil = fn(&mut BalloonState);
    let cases: [(Spoil, &str); 10] = [
        (|s| s.map = Bytes::gib(1), "1 GiB"),
        (|s| s.target = Bytes::ZERO, "target"),
        (|s| s.target = Bytes(MAP.0 + 1), "target"),
        (|s| s.pace.wanted = Pages(ALL + 1), "more than all"),
        (|s| s.pace.wanted = Pages(ALL), "its target"),
        (|s| s.pace.asked = Pages(u64::MAX), "asked"),
        (|s| s.told = Pages(ALL + 1), "told"),
        (|s| s.given_up = vec![Run { first: FIRST - 1, count: Pages(2) }], "no memory"),
        (|s| s.given_up = vec![Run { first: u64::MAX, count: Pages(1) }], "no memory"),
        (|s| s.given_up = vec![Run { first: FIRST, count: Pages(0) }], "no memory"),
    ];
    for (spoil, word) in cases {
        let sentence = refused(true, spoil);
        assert!(sentence.contains("balloon") && sentence.contains(word), "{word} is missing in {sentence}");
    }
    let buffer = |s: &mut BalloonState| s.statistics_buffer = serde_json::from_value(json!(0)).unwrap();
    assert!(refused(false, buffer).contains("no driver"));
    assert!(refused(true, buffer).contains("never gave"));
}

#[test]
fn another_version_is_refused_with_a_sentence() {
    let (guest, _) = guest(config());
    let mut state = guest.save().unwrap();
    state.device["version"] = json!(3);
    let error = restore(guest, state).err().expect("it is refused").to_string();
    assert!(error.contains("balloon") && error.contains("version 3"), "{error}");
}

fn run() -> impl Strategy<Value = Run> {
    let first = prop_oneof![
        (LOW / PAGE_SIZE..260_u64).boxed(),
        (FIRST - 4..FIRST + 260).boxed(),
        any::<u64>().boxed(),
    ];
    let count = prop_oneof![8 => 0_u64..40, 1 => any::<u64>()];
    (first, count).prop_map(|(first, count)| Run { first, count: Pages(count) })
}

fn amount() -> impl Strategy<Value = Pages> {
    prop_oneof![8 => (0..ALL + 2).prop_map(Pages), 1 => any::<u64>().prop_map(Pages)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever is restored, the device comes to rest, keeps to guest memory, and works after a reset.
    #[test]
    fn no_state_breaks_a_device(
        amounts in [amount(), amount(), amount(), amount()],
        flags: [bool; 5],
        buffer: Option<u16>,
        age_ms: Option<u64>,
        given_up in vec(run(), 0..3),
        poison: u32,
    ) {
        let [running, pending, followed, settled, broken] = flags;
        let (mut guest, _) = guest(config());
        if running {
            guest.start(if poison % 2 == 0 { 0 } else { 1 << MUST_TELL_HOST });
        }
        let mut state = guest.save().unwrap();
        let [other, asked, reached, told] = amounts;
        let mut device = own(&state);
        let wanted = if pending { other } else { device.pace.wanted };
        device.pace = PaceState { wanted, asked, reached, settled };
        (device.told, device.pending, device.followed, device.broken) = (told, pending, followed, broken);
        (device.poison, device.given_up) = (poison, given_up);
        device.statistics_buffer = serde_json::from_value(json!(buffer)).unwrap();
        device.report = age_ms.map(|age_ms| api::status::AgedReport {
            age_ms,
            had: None,
            managed: None,
            statistics: Default::default(),
        });
        state.device = serde_json::to_value(device).unwrap();
        if let Ok((mut guest, handle)) = restore(guest, state) {
            prop_assert!(handle.actual() <= MAP);
            guest.run();
            prop_assert_eq!(handle.counters().discard_failures, 0);
            let (mut guest, handle) = moved(guest);
            let status = guest.status();
            prop_assert!(status == if running { RUNNING } else { 0 }, "{}", status);
            let _ = handle.set_target(Bytes(REGION as u64));
            guest.run();
            assert_usable(&mut guest, &handle);
        }
    }
}
