//! The balloon as a guest's driver and the host's API see it.

use std::time::Duration;

use api::status::DriverState;
use api::units::{Bytes, PAGE_SIZE};
use balloon::device::{
    Config, DEFLATE_ON_OOM, MUST_TELL_HOST, PAGE_POISON, PAGE_REPORTING, STATS_VQ, TargetError,
};
use devices::testing::{BUFFERS, Guest, HIGH, NEEDS_RESET, REGION, RUNNING};
use devices::virtio::device::VirtioDevice;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes as _, GuestAddress};

mod room;
use room::{MAP, config, guest};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// What a driver refuses whose pages must go before it gets its answer.
const AT_ONCE: u64 = 1 << MUST_TELL_HOST;

const NUM_PAGES: u32 = VIRTIO_MMIO_CONFIG;
const ACTUAL: u32 = VIRTIO_MMIO_CONFIG + 4;

fn pages(amount: Bytes) -> u32 {
    u32::try_from(amount.pages().0).unwrap()
}

/// Writes `pfns` as an inflate or deflate request in one buffer and sends it.
fn send_pages(guest: &mut Guest, queue: usize, pfns: &[u32]) {
    for (place, pfn) in pfns.iter().enumerate() {
        let address = GuestAddress(BUFFERS + 4 * place as u64);
        guest.ram.memory.write_obj(pfn.to_le(), address).unwrap();
    }
    guest.describe(queue, 0, BUFFERS, 4 * pfns.len() as u32, 0, 0);
    guest.send(queue, 0);
}

/// Page numbers of `count` pages from `start`, which are made resident.
fn touched(guest: &Guest, start: u64, count: u32) -> Vec<u32> {
    for page in 0..u64::from(count) {
        guest.ram.memory.write_obj(7u8, GuestAddress(start + page * PAGE_SIZE)).unwrap();
        assert!(guest.ram.resident(start + page * PAGE_SIZE));
    }
    let first = (start / PAGE_SIZE) as u32;
    (first..first + count).collect()
}

fn byte(guest: &Guest, address: u64) -> u8 {
    guest.ram.memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn offers_only_what_it_was_given() {
    let transport = 1u64 << 32 | 1 << 28 | 1 << 29;
    let (guest_with_all, _) = guest(config());
    let always = 1u64 << MUST_TELL_HOST | 1 << PAGE_POISON;
    let all = always | 1 << STATS_VQ | 1 << DEFLATE_ON_OOM | 1 << PAGE_REPORTING;
    assert_eq!(guest_with_all.offered(), transport | all);
    let bare =
        Config { deflate_on_oom: false, reporting: false, statistics_interval: Duration::ZERO, ..config() };
    assert_eq!(guest(bare).0.offered(), transport | always);
}

/// What waits for its neighbours goes at the pause, as no event comes while that lasts; a target that is set
/// meanwhile is told after it.
#[test]
fn a_pause_leaves_nothing_of_what_the_guest_has_given_up() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    guest.run();
    let pfns = touched(&guest, BUFFERS + 0x1000, 4);
    send_pages(&mut guest, INFLATE, &pfns);
    assert!(guest.ram.resident(BUFFERS + 0x1000), "it waits");
    guest.transport().lock().unwrap().drain();
    assert!(!guest.ram.resident(BUFFERS + 0x1000));
    let before = guest.read(NUM_PAGES);
    handle.set_target(MAP).unwrap();
    guest.run();
    assert_eq!(guest.read(NUM_PAGES), before);
    guest.transport().lock().unwrap().resume();
    guest.run();
    assert_ne!(guest.read(NUM_PAGES), before);
}

#[test]
fn a_target_waits_for_the_driver_and_then_reaches_it() {
    let (mut guest, handle) = guest(config());
    let half = Bytes(MAP.0 / 2);
    assert_eq!(handle.driver(), DriverState::Absent);
    assert_eq!(handle.set_target(MAP), Err(TargetError::NoDriver));
    assert_eq!(handle.target(), half);

    guest.start(0);
    assert_eq!(handle.driver(), DriverState::Active);
    assert_eq!(guest.read(NUM_PAGES), pages(half));
    assert_eq!(guest.interrupts(), 0);

    let generation = guest.read(VIRTIO_MMIO_CONFIG_GENERATION);
    let target = Bytes(MAP.0 - 5 * PAGE_SIZE);
    handle.set_target(target).unwrap();
    guest.run();
    assert_eq!(guest.read(NUM_PAGES), 5);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_ne!(guest.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);

    // The same again is no news to the guest.
    handle.set_target(target).unwrap();
    guest.run();
    assert_eq!(guest.interrupts(), 0);

    for target in [Bytes::ZERO, MAP + Bytes(1)] {
        assert_eq!(handle.set_target(target), Err(TargetError::OutOfMap { target, map: MAP }));
    }
    assert_eq!(handle.target(), target);
}

#[test]
fn only_actual_is_the_guests_to_write() {
    let (mut guest, handle) = guest(config());
    guest.write(ACTUAL, 9);
    assert_eq!(guest.read(ACTUAL), 0, "written before the features were agreed on");
    guest.start(0);
    let wanted = guest.read(NUM_PAGES);
    guest.write(NUM_PAGES, 77);
    assert_eq!(guest.read(NUM_PAGES), wanted);
    guest.write(ACTUAL, 3);
    assert_eq!(handle.actual(), Bytes(MAP.0 - 3 * PAGE_SIZE));
    // By bytes, and across the edges of the field.
    guest.raw_write(u64::from(ACTUAL) + 1, &[1]);
    assert_eq!(guest.read(ACTUAL), 0x103);
    guest.raw_write(u64::from(NUM_PAGES) + 3, &[0xff, 4, 0, 0, 0, 0xff, 0xff]);
    assert_eq!((guest.read(NUM_PAGES), guest.read(ACTUAL)), (wanted, 4));
    assert_eq!(guest.read(ACTUAL + 4), 0);
    // A lie is bounded.
    guest.write(ACTUAL, u32::MAX);
    assert_eq!(handle.actual(), Bytes::ZERO);
}

#[test]
fn pages_put_into_the_balloon_leave_the_host() {
    let (mut guest, handle) = guest(config());
    guest.start(AT_ONCE);
    let mut pfns = touched(&guest, HIGH + 0x1_0000, 16);
    pfns.reverse();
    // Twice, in the hole, past the end, nowhere.
    pfns.extend([
        pfns[0],
        (HIGH / PAGE_SIZE) as u32 - 1,
        ((HIGH + REGION as u64) / PAGE_SIZE) as u32,
        u32::MAX,
    ]);
    guest.ram.memory.write_obj(7u8, GuestAddress(HIGH)).unwrap();
    send_pages(&mut guest, INFLATE, &pfns);
    assert_eq!(guest.used(INFLATE), [(0, 0)]);
    assert_eq!(guest.interrupts(), 1);
    for page in 0..16 {
        assert!(!guest.ram.resident(HIGH + 0x1_0000 + page * PAGE_SIZE), "page {page}");
    }
    assert_eq!(byte(&guest, HIGH), 7);
    assert_eq!(byte(&guest, HIGH + 0x1_0000), 0);
    let counters = handle.counters();
    assert_eq!(counters.inflated, Bytes(16 * PAGE_SIZE));
    assert_eq!(counters.discarded, Bytes(16 * PAGE_SIZE));
    assert_eq!((counters.discard_ranges, counters.discard_calls, counters.discard_failures), (1, 1, 0));
    assert_eq!(counters.malformed, 0);
    guest.ram.assert_canaries();

    send_pages(&mut guest, DEFLATE, &pfns);
    assert_eq!(guest.used(DEFLATE), [(0, 0)]);
    // What is taken back is counted as it is named: nothing depends on it.
    assert_eq!(handle.counters().deflated, Bytes(17 * PAGE_SIZE));
    assert_eq!(handle.counters().discarded, Bytes(16 * PAGE_SIZE));
}

#[test]
fn page_numbers_may_be_spread_over_buffers() {
    let (mut guest, handle) = guest(config());
    guest.start(AT_ONCE);
    let pfns = touched(&guest, HIGH, 3);
    for (place, pfn) in pfns.iter().enumerate() {
        guest.ram.memory.write_obj(pfn.to_le(), GuestAddress(BUFFERS + 4 * place as u64)).unwrap();
    }
    // 12 bytes, cut within a number.
    guest.describe(INFLATE, 4, BUFFERS, 6, VRING_DESC_F_NEXT, 2);
    guest.describe(INFLATE, 2, BUFFERS + 6, 1, VRING_DESC_F_NEXT, 9);
    guest.describe(INFLATE, 9, BUFFERS + 7, 5, 0, 0);
    guest.send(INFLATE, 4);
    assert_eq!(guest.used(INFLATE), [(4, 0)]);
    assert_eq!(handle.counters().inflated, Bytes(3 * PAGE_SIZE));
    assert!((0..3).all(|page| !guest.ram.resident(HIGH + page * PAGE_SIZE)));
}

#[test]
fn more_than_a_batch_of_pages_goes() {
    let (mut guest, handle) = guest(config());
    guest.start(AT_ONCE);
    let one_page = u32::try_from(HIGH / PAGE_SIZE).unwrap();
    let pfns: Vec<u32> = (0..1500).map(|n| one_page + n % 256).collect();
    send_pages(&mut guest, INFLATE, &pfns);
    assert_eq!(guest.used(INFLATE), [(0, 0)]);
    // 256 different pages in the first batch of 1024, and again in the second.
    assert_eq!(handle.counters().inflated, Bytes(2 * 256 * PAGE_SIZE));
    assert_eq!(handle.counters().discard_calls, 2);
}

#[test]
fn what_is_no_list_of_pages_comes_back_counted() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    for (len, flags) in [(6, 0), (4, VRING_DESC_F_WRITE), (4 * 16385, 0)] {
        for queue in [INFLATE, DEFLATE] {
            guest.describe(queue, 0, BUFFERS, len, flags, 0);
            guest.send(queue, 0);
            assert_eq!(guest.used(queue), [(0, 0)]);
        }
    }
    assert_eq!(handle.counters().malformed, 6);
    assert_eq!(handle.counters().inflated, Bytes::ZERO);
    assert_eq!(guest.status(), RUNNING);
}

#[test]
fn a_broken_driver_is_seen_until_it_resets() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    guest.write(ACTUAL, 8);
    guest.set_available(DEFLATE, 1000);
    guest.notify(DEFLATE);
    assert_eq!(guest.status(), RUNNING | NEEDS_RESET);
    assert_eq!(handle.driver(), DriverState::Broken);
    assert_eq!(handle.set_target(MAP), Err(TargetError::NoDriver));
    guest.reset();
    assert_eq!(handle.driver(), DriverState::Absent);
    assert_eq!(handle.actual(), MAP, "a balloon outlived its driver");
    guest.start(0);
    assert_eq!(handle.driver(), DriverState::Active);
    assert_eq!(guest.read(NUM_PAGES), pages(Bytes(MAP.0 / 2)));
}

/// The reporting queue is where the driver counts it to be.
#[test]
fn reported_pages_leave_the_host() {
    for (queue, refused) in [(3, 0), (4, 0), (2, 1 << STATS_VQ)] {
        let (mut guest, handle) = guest(config());
        guest.start(refused);
        touched(&guest, HIGH, 64);
        let write = VRING_DESC_F_WRITE;
        guest.describe(queue, 0, HIGH + 8 * PAGE_SIZE, 8 * PAGE_SIZE as u32, write | VRING_DESC_F_NEXT, 1);
        guest.describe(queue, 1, HIGH + 16 * PAGE_SIZE, 8 * PAGE_SIZE as u32, write | VRING_DESC_F_NEXT, 2);
        // Not whole pages: only the one in the middle can go.
        guest.describe(queue, 2, HIGH + 33 * PAGE_SIZE - 1, PAGE_SIZE as u32 + 2, write, 0);
        guest.send(queue, 0);
        assert_eq!(guest.used(queue), [(0, 0)]);
        let left: Vec<u64> = (0..64).filter(|page| guest.ram.resident(HIGH + page * PAGE_SIZE)).collect();
        let expected: Vec<u64> = (0..64).filter(|page| !(8..24).contains(page) && *page != 33).collect();
        assert_eq!(left, expected, "queue {queue}");
        let counters = handle.counters();
        assert_eq!((counters.discarded, counters.discard_ranges), (Bytes(17 * PAGE_SIZE), 2));
        assert_eq!(counters.reported, Bytes(17 * PAGE_SIZE + 2));
        // Memory to read is no report.
        guest.describe(queue, 0, HIGH, PAGE_SIZE as u32, 0, 0);
        guest.send(queue, 0);
        assert_eq!((guest.used(queue), handle.counters().malformed), (vec![(0, 0)], 1));
    }
}

/// Nobody is on the way to anything then, and a timer that runs on wakes the host for nothing.
#[test]
fn a_broken_driver_is_not_looked_after() {
    let mut timer = 0;
    let mut guest = Guest::new(|ram| {
        let (device, _) = room::device(ram, config());
        timer = device.own_events()[2];
        Box::new(device)
    });
    // timerfd_create(2): the time to the next expiry, zero where there is none.
    let runs = || {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{timer}")).unwrap();
        !info.contains("it_interval: (0, 0)")
    };
    guest.start(0);
    guest.run();
    guest.send(INFLATE, 0);
    assert!(runs(), "half of the map is to come");
    guest.set_available(INFLATE, 1000);
    guest.notify(INFLATE);
    guest.run();
    assert_eq!(guest.status(), RUNNING | NEEDS_RESET);
    assert!(!runs());
    guest.reset();
    guest.start(0);
    guest.run();
    guest.send(INFLATE, 0);
    assert!(runs());
}
