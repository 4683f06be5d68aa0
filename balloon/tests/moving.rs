//! A balloon on its way: what waits, what goes when, and what becomes of requests that can't be met.

use std::time::Duration;

use api::status::DriverState;
use api::units::{Bytes, PAGE_SIZE};
use balloon::device::{Config, Handle, MUST_TELL_HOST, PAGE_POISON};
use devices::testing::{BUFFERS, Guest, HIGH, RUNNING};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes as _, GuestAddress};

mod room;
use room::{MAP, config, guest};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const NUM_PAGES: u32 = VIRTIO_MMIO_CONFIG;
const ACTUAL: u32 = VIRTIO_MMIO_CONFIG + 4;
const POISON: u32 = VIRTIO_MMIO_CONFIG + 12;
/// Longer than any tick, in milliseconds.
const SOON: u32 = 10_000;

/// Pages of the upper region, which are made resident, as numbers.
fn touched(guest: &Guest, first: u64, count: u64) -> Vec<u32> {
    for page in first..first + count {
        guest.ram.memory.write_obj(7u8, GuestAddress(HIGH + page * PAGE_SIZE)).unwrap();
    }
    (first..first + count).map(|page| (HIGH / PAGE_SIZE + page) as u32).collect()
}

fn send(guest: &mut Guest, queue: usize, pfns: &[u32]) {
    for (place, pfn) in pfns.iter().enumerate() {
        guest.ram.memory.write_obj(pfn.to_le(), GuestAddress(BUFFERS + 4 * place as u64)).unwrap();
    }
    guest.describe(queue, 0, BUFFERS, 4 * pfns.len() as u32, 0, 0);
    guest.send(queue, 0);
    assert_eq!(guest.used(queue), [(0, 0)]);
}

/// Pages of the upper region that the host holds.
fn resident(guest: &Guest) -> usize {
    (0..64).filter(|page| guest.ram.resident(HIGH + page * PAGE_SIZE)).count()
}

fn missing(handle: &Handle) -> u64 {
    MAP.saturating_sub(handle.actual()).pages().0
}

#[test]
fn pages_wait_for_their_neighbours_and_go_together() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    handle.set_target(Bytes(MAP.0 - 32 * PAGE_SIZE)).unwrap();
    guest.run();
    let pfns = touched(&guest, 0, 64);
    send(&mut guest, INFLATE, &pfns[..16]);
    guest.write(ACTUAL, 16);
    guest.run();
    assert_eq!((resident(&guest), missing(&handle)), (64, 0), "not the host's yet, so not out of the guest");
    assert_eq!(guest.read(ACTUAL), 16);
    send(&mut guest, INFLATE, &pfns[16..32]);
    guest.write(ACTUAL, 32);
    guest.run();
    assert_eq!((resident(&guest), missing(&handle)), (32, 32), "it is where it should be");
    let counters = handle.counters();
    assert_eq!((counters.discard_calls, counters.discard_ranges), (1, 1));
    assert_eq!((counters.inflated, counters.discarded), (Bytes(32 * PAGE_SIZE), Bytes(32 * PAGE_SIZE)));
    assert_eq!(counters.huge_pages_broken, 1);
}

#[test]
fn pages_go_at_once_where_the_driver_does_not_say_when_it_takes_them_back() {
    let (mut guest, _) = guest(config());
    guest.start(1 << MUST_TELL_HOST);
    let pfns = touched(&guest, 0, 64);
    send(&mut guest, INFLATE, &pfns[..16]);
    assert_eq!(resident(&guest), 48);
}

#[test]
fn pages_do_not_wait_for_ever() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    let pfns = touched(&guest, 0, 64);
    send(&mut guest, INFLATE, &pfns[..16]);
    guest.write(ACTUAL, 16);
    while resident(&guest) > 48 {
        assert!(guest.wait(SOON), "nothing happens");
    }
    assert_eq!(missing(&handle), 16);
}

/// What the guest has back, by the device's word or by a reset, is never dropped under it.
#[test]
fn nothing_goes_once_the_guest_has_it_back() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    let pfns = touched(&guest, 0, 64);
    send(&mut guest, INFLATE, &pfns[..16]);
    send(&mut guest, DEFLATE, &pfns[..16]);
    touched(&guest, 0, 64);
    // Two ticks at least, if any come.
    std::thread::sleep(Duration::from_millis(250));
    guest.run();
    assert_eq!(resident(&guest), 64);

    send(&mut guest, INFLATE, &pfns[..16]);
    guest.start(0);
    std::thread::sleep(Duration::from_millis(250));
    guest.run();
    assert_eq!(resident(&guest), 64);
    assert_eq!(handle.counters().discarded, Bytes::ZERO);
}

/// A notification for the deflate queue is served by the vCPU that makes it.
#[test]
fn a_vcpu_that_takes_pages_back_gives_none_to_the_host() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    let pfns = touched(&guest, 0, 64);
    send(&mut guest, INFLATE, &pfns[..32]);
    // Where it should be: what waits need not wait any longer.
    guest.write(ACTUAL, 256);
    for (place, pfn) in pfns[..16].iter().enumerate() {
        guest.ram.memory.write_obj(pfn.to_le(), GuestAddress(BUFFERS + 4 * place as u64)).unwrap();
    }
    guest.describe(DEFLATE, 0, BUFFERS, 64, 0, 0);
    guest.offer(DEFLATE, 0);
    guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, DEFLATE as u32);
    assert_eq!(guest.used(DEFLATE), [(0, 0)], "it was served before the vCPU went on");
    assert_eq!((handle.counters().discard_calls, resident(&guest)), (0, 64));
    guest.run();
    assert_eq!(handle.counters().discarded, Bytes(16 * PAGE_SIZE), "the rest of what waited");
    assert_eq!(resident(&guest), 48);
    assert!((0..16).all(|page| guest.ram.resident(HIGH + page * PAGE_SIZE)), "what it has back");
}

/// Nor does it where it breaks the protocol by that: the event loop cleans up.
#[test]
fn what_a_broken_driver_gave_up_goes() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    let pfns = touched(&guest, 0, 64);
    send(&mut guest, INFLATE, &pfns[..16]);
    guest.set_available(DEFLATE, 1000);
    guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, DEFLATE as u32);
    assert_eq!((handle.driver(), handle.counters().discard_calls), (DriverState::Broken, 0));
    guest.run();
    assert_eq!(resident(&guest), 48);
    assert!(!guest.wait(300), "a balloon whose driver is broken asks for no time");
}

#[test]
fn a_release_replaces_a_pending_inflate_at_once() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    assert_eq!(guest.read(NUM_PAGES), 256);
    guest.write(ACTUAL, 10);
    handle.set_target(Bytes(MAP.0 - 3 * PAGE_SIZE)).unwrap();
    guest.run();
    assert_eq!((guest.read(NUM_PAGES), guest.interrupts()), (3, 1));
    for left in (3..10).rev() {
        guest.write(ACTUAL, left);
        guest.run();
    }
    assert_eq!((guest.read(NUM_PAGES), handle.settled(), guest.interrupts()), (3, false, 0));
    assert!(!guest.wait(300), "a balloon at rest asks for no time");
}

#[test]
fn what_can_not_be_met_settles_and_says_so() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    guest.write(ACTUAL, 40);
    while !handle.settled() {
        assert!(guest.wait(SOON), "nothing happens");
    }
    assert_eq!((guest.read(NUM_PAGES), guest.interrupts()), (40, 1));
    assert_eq!(handle.target(), Bytes(MAP.0 / 2), "what was asked for stays known");
    assert!(!guest.wait(300), "a balloon at rest asks for no time");
    // Asked anew, the guest is.
    handle.set_target(Bytes(MAP.0 / 2)).unwrap();
    guest.run();
    assert_eq!((guest.read(NUM_PAGES), handle.settled(), guest.interrupts()), (256, false, 1));
}

/// Whoever is paused on the way to a target goes on with it, and is not taken for one that can't.
#[test]
fn no_time_passes_for_a_guest_whose_processors_stand_still() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    guest.write(ACTUAL, 40);
    handle.rest(true);
    // More ticks than it takes to settle.
    for _ in 0..25 {
        assert!(guest.wait(SOON), "nothing happens");
    }
    assert_eq!((guest.read(NUM_PAGES), handle.settled(), handle.followed()), (256, false, false));
    handle.rest(false);
    while !handle.settled() {
        assert!(guest.wait(SOON), "nothing happens");
    }
}

/// A balancer that is started anew must know whether a guest boots or is being shrunk.
#[test]
fn a_guest_is_known_to_have_been_at_a_target_until_its_driver_starts_anew() {
    let (mut guest, handle) = guest(config());
    assert!(!handle.followed());
    guest.start(0);
    guest.write(ACTUAL, 255);
    guest.run();
    assert!(!handle.followed());
    guest.write(ACTUAL, 256);
    guest.run();
    assert!(handle.followed());
    handle.set_target(Bytes(MAP.0 / 4)).unwrap();
    guest.run();
    assert!(handle.followed(), "it is being shrunk, and does not boot");
    guest.start(0);
    assert!(!handle.followed());
}

/// Else the driver would take from the guest what this has just got to stay alive.
#[test]
fn a_guest_out_of_memory_keeps_what_it_takes_back() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    guest.write(ACTUAL, 256);
    guest.run();
    guest.write(ACTUAL, 200);
    guest.run();
    assert_eq!((guest.read(NUM_PAGES), handle.settled(), missing(&handle)), (200, true, 200));
    // The next driver is asked for all of it again.
    guest.start(0);
    assert_eq!((guest.read(NUM_PAGES), handle.settled()), (256, false));
}

#[test]
fn reported_pages_stay_where_the_guest_expects_its_pattern() {
    for (pattern, refused, left) in [(0xaaaa_aaaa, 0, 64), (0, 0, 48), (0xaaaa_aaaa, 1 << PAGE_POISON, 48)] {
        let (mut guest, handle) = guest(config());
        guest.start(refused);
        guest.write(POISON, pattern);
        assert_eq!(guest.read(POISON), pattern);
        touched(&guest, 0, 64);
        guest.describe(3, 0, HIGH, 16 * PAGE_SIZE as u32, VRING_DESC_F_WRITE, 0);
        guest.send(3, 0);
        assert_eq!(guest.used(3), [(0, 0)]);
        assert_eq!(resident(&guest), left, "{pattern:x}");
        assert_eq!(handle.counters().malformed, 0);
        guest.reset();
        assert_eq!(guest.read(POISON), 0);
    }
}

#[test]
fn page_numbers_may_stand_in_an_indirect_table() {
    let (mut guest, handle) = guest(config());
    guest.start(1 << MUST_TELL_HOST);
    let pfns = touched(&guest, 0, 64);
    for (place, pfn) in pfns[..16].iter().enumerate() {
        guest.ram.memory.write_obj(pfn.to_le(), GuestAddress(BUFFERS + 4 * place as u64)).unwrap();
    }
    guest.describe(INFLATE, 0, BUFFERS + 0x1000, 16, VRING_DESC_F_INDIRECT, 0);
    guest.describe_at(BUFFERS + 0x1000, BUFFERS, 64, 0, 0);
    guest.send(INFLATE, 0);
    assert_eq!(guest.used(INFLATE), [(0, 0)]);
    assert_eq!((resident(&guest), handle.counters().malformed), (48, 0));
}

/// VIRTIO_RING_F_EVENT_IDX: the driver says how far it wants no interrupt (section 2.7.7).
#[test]
fn a_driver_is_told_no_sooner_than_it_wants() {
    for (refused, interrupts) in [(0, 1), (1 << VIRTIO_RING_F_EVENT_IDX, 4)] {
        let (mut guest, _) = guest(config());
        guest.start(refused);
        let pfns = touched(&guest, 0, 4);
        // used_event: behind the available ring. The fourth buffer is the one that matters.
        let rings = guest.rings(INFLATE);
        let used_event = rings.available + 4 + 2 * u64::from(guest.size(INFLATE));
        guest.ram.memory.write_obj(3u16.to_le(), GuestAddress(used_event)).unwrap();
        let mut count = 0;
        for pfn in pfns {
            send(&mut guest, INFLATE, &[pfn]);
            count += guest.interrupts();
        }
        assert_eq!(count, interrupts);
    }
}

/// See the device's documentation: what is hinted may be in use again.
#[test]
fn free_page_hints_are_not_taken() {
    const FREE_PAGE_HINT: u32 = 3;
    let (guest, _) = guest(Config { reporting: false, ..config() });
    assert_eq!(guest.offered() & 1 << FREE_PAGE_HINT, 0);
    guest.write(VIRTIO_MMIO_STATUS, 3);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES, 1 << FREE_PAGE_HINT);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    guest.write(VIRTIO_MMIO_STATUS, 11);
    assert_ne!(guest.status(), RUNNING);
    assert_eq!(guest.status(), 3, "features that were not offered are not agreed on");
}

/// Linux's shrinker takes hinted pages back before the device has seen the hint. Without the
/// feature, a chain in the place of the hint queue drops nothing.
#[test]
fn a_hint_that_comes_all_the_same_drops_nothing() {
    let (mut guest, handle) = guest(Config { reporting: false, ..config() });
    guest.start(0);
    touched(&guest, 0, 64);
    for queue in [3, 4] {
        guest.describe(queue, 0, HIGH, 16 * PAGE_SIZE as u32, VRING_DESC_F_WRITE, 0);
        guest.send(queue, 0);
        assert_eq!(guest.used(queue), []);
    }
    assert_eq!((resident(&guest), handle.counters().discarded), (64, Bytes::ZERO));
}
