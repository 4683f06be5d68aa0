//! The balloon as a guest's driver and the host's API see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use api::status::DriverState;
use api::units::{Bytes, PAGE_SIZE};
use balloon::device::{
    Config, DEFLATE_ON_OOM, MUST_TELL_HOST, PAGE_POISON, PAGE_REPORTING, SILENT_AFTER, STATS_VQ, TargetError,
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
const STATISTICS: usize = 2;

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

/// Writes statistics of the given tags, each with the value 1000 + tag, and makes them available.
fn send_statistics(guest: &mut Guest, head: u16, tags: impl Iterator<Item = u16>) {
    let values: Vec<(u16, u64)> = tags.map(|tag| (tag, 1000 + u64::from(tag))).collect();
    send_values(guest, head, &values);
}

/// Writes statistics and makes them available.
fn send_values(guest: &mut Guest, head: u16, values: &[(u16, u64)]) {
    let mut len = 0;
    for (tag, value) in values {
        let mut entry = tag.to_le_bytes().to_vec();
        entry.extend(value.to_le_bytes());
        guest.ram.memory.write_slice(&entry, GuestAddress(BUFFERS + u64::from(len))).unwrap();
        len += 10;
    }
    guest.describe(STATISTICS, head, BUFFERS, len, 0, 0);
    guest.send(STATISTICS, head);
}

#[test]
fn statistics_are_asked_for_and_kept_with_their_age() {
    let (mut guest, handle) = guest(Config { statistics_interval: Duration::from_millis(20), ..config() });
    assert_eq!(handle.report(), None);
    guest.start(0);
    send_statistics(&mut guest, 3, 0..18);
    let report = handle.report().unwrap();
    assert_eq!(report.statistics.swap_in, Some(Bytes(1000)));
    assert_eq!(report.statistics.available, Some(Bytes(1006)));
    assert_eq!(report.statistics.direct_reclaims, Some(1015));
    assert_eq!(report.statistics.unknown.into_iter().collect::<Vec<_>>(), [(16, 1016), (17, 1017)]);
    assert!(report.age_ms < 5000);
    assert_eq!(guest.used(STATISTICS), [], "the device keeps the buffer");

    // The timer gives it back, which asks for more; until then it stays.
    let before = Instant::now();
    while guest.used(STATISTICS).is_empty() {
        assert!(before.elapsed() < Duration::from_secs(10), "no request for statistics");
        guest.wait(1000);
    }
    assert_eq!(handle.counters().statistics_requests, 1);
    assert_eq!(guest.interrupts(), 1);
    send_statistics(&mut guest, 3, 5..6);
    let report = handle.report().unwrap().statistics;
    assert_eq!((report.total, report.free), (Some(Bytes(1005)), None));
    assert_eq!(handle.counters().reports, 2);
}

#[test]
fn a_guest_that_waits_for_memory_is_told_of_and_asked_more_often() {
    // Nobody would live to see the second question at this interval.
    let (mut guest, handle) = guest(Config { statistics_interval: Duration::from_secs(3600), ..config() });
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    handle.when_stalled(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    guest.start(0);
    send_values(&mut guest, 3, &[(5, 1 << 30), (6, 1 << 29)]);
    assert_eq!((calls.load(Ordering::Relaxed), guest.wait(0)), (0, false), "half of it is to spare");
    guest.reset();
    guest.start(0);
    send_values(&mut guest, 3, &[(5, 1 << 30), (6, 1 << 20)]);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    let before = Instant::now();
    while handle.counters().statistics_requests == 0 {
        guest.wait(1000);
        assert!(before.elapsed() < Duration::from_secs(60), "it was not asked again soon");
    }
}

/// Else a large request would go in steps until the next report, however much the guest has free.
#[test]
fn a_guest_is_asked_what_it_has_free_when_that_matters() {
    let map = Bytes::gib(1);
    let (mut guest, handle) = guest(Config { map, target: map, ..config() });
    guest.start(0);
    let free = |mib| [(4, Bytes::mib(mib).0)];
    send_values(&mut guest, 0, &free(0));
    assert_eq!(guest.used(STATISTICS), []);
    handle.set_target(map - Bytes::mib(800)).unwrap();
    guest.run();
    assert_eq!(guest.used(STATISTICS), [(0, 0)], "what it said last may no longer be so");
    assert_eq!(guest.read(NUM_PAGES), pages(Bytes::mib(64)), "a step");
    send_values(&mut guest, 0, &free(500));
    assert_eq!(guest.read(NUM_PAGES), pages(Bytes::mib(400)));
    guest.write(ACTUAL, pages(Bytes::mib(200)));
    guest.run();
    assert_eq!(guest.used(STATISTICS), [], "it is on its way");
    guest.write(ACTUAL, pages(Bytes::mib(400)));
    guest.run();
    assert_eq!(guest.used(STATISTICS), [(0, 0)], "it is there");
    send_values(&mut guest, 0, &free(600));
    assert_eq!(guest.read(NUM_PAGES), pages(Bytes::mib(800)));
}

/// A guest may have used since what it said was free: to ask for most of that at once would stall it.
#[test]
fn what_was_free_long_ago_or_in_another_guest_counts_for_nothing() {
    let map = Bytes::gib(1);
    let (mut guest, handle) = guest(Config { map, target: map, ..config() });
    let target = map - Bytes::mib(800);
    guest.start(0);
    send_values(&mut guest, 0, &[(4, Bytes::mib(1000).0)]);
    handle.set_target(target).unwrap();
    guest.run();
    assert_eq!(guest.read(NUM_PAGES), pages(Bytes::mib(800)));

    guest.start(0);
    assert_eq!((handle.report(), handle.report_age()), (None, None), "the driver that said it has gone");
    assert_eq!(guest.read(NUM_PAGES), pages(Bytes::mib(64)), "a step");

    send_values(&mut guest, 0, &[(4, Bytes::mib(1000).0)]);
    std::thread::sleep(Duration::from_millis(2100));
    handle.set_target(target).unwrap();
    guest.run();
    assert_eq!(guest.read(NUM_PAGES), pages(Bytes::mib(64)), "a step");
    assert_eq!(guest.used(STATISTICS), [(0, 0)], "and a question");
}

#[test]
fn whoever_asks_for_a_report_has_the_guest_asked_at_once_and_not_twice() {
    let (mut guest, handle) = guest(config());
    let reports = Arc::new(AtomicUsize::new(0));
    let counted = reports.clone();
    handle.when_reported(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    assert!(!handle.ask_for_report(), "nobody is there to ask");
    guest.start(0);
    assert!(handle.ask_for_report(), "a driver begins with a report");
    guest.run();
    assert_eq!((guest.used(STATISTICS), handle.counters().statistics_requests), (vec![], 0));
    send_statistics(&mut guest, 3, 4..6);
    assert_eq!(reports.load(Ordering::Relaxed), 1);

    assert!(handle.ask_for_report() && handle.ask_for_report());
    guest.run();
    assert!(handle.ask_for_report(), "it owes an answer");
    guest.run();
    assert_eq!((guest.used(STATISTICS), handle.counters().statistics_requests), (vec![(3, 0)], 1));
    assert_eq!(reports.load(Ordering::Relaxed), 1);
    let asked = Instant::now();
    send_statistics(&mut guest, 3, 4..6);
    assert_eq!(reports.load(Ordering::Relaxed), 2);
    assert!(handle.report_age().unwrap() <= asked.elapsed());
    assert_eq!(guest.used(STATISTICS), [], "nobody wants another");
}

#[test]
fn a_driver_that_does_not_answer_is_not_waited_for() {
    let (mut guest, handle) = guest(config());
    guest.start(1 << STATS_VQ);
    assert!(!handle.ask_for_report(), "it has no queue for that");
    guest.set_available(DEFLATE, 1000);
    guest.notify(DEFLATE);
    assert_eq!(handle.driver(), DriverState::Broken);
    assert!(!handle.ask_for_report());
    guest.reset();
    assert!(!handle.ask_for_report());
}

/// So that a guest which is asked each second already is not asked twice a second.
#[test]
fn the_timer_counts_from_the_last_question() {
    let interval = Duration::from_millis(400);
    let (mut guest, handle) = guest(Config { statistics_interval: interval, ..config() });
    guest.start(0);
    send_statistics(&mut guest, 0, 4..6);
    std::thread::sleep(interval / 2);
    handle.ask_for_report();
    let asked = Instant::now();
    guest.run();
    assert_eq!(guest.used(STATISTICS), [(0, 0)]);
    send_statistics(&mut guest, 0, 4..6);
    while guest.used(STATISTICS).is_empty() {
        assert!(guest.wait(10_000), "the timer never comes");
    }
    assert!(asked.elapsed() >= interval, "it came {:?} after the question", asked.elapsed());
}

#[test]
fn a_second_buffer_for_statistics_comes_back() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    send_statistics(&mut guest, 0, 0..4);
    send_statistics(&mut guest, 1, 0..4);
    assert_eq!(guest.used(STATISTICS), [(1, 0)]);
    assert_eq!((handle.counters().reports, handle.counters().malformed), (1, 1));
}

#[test]
fn too_many_statistics_are_cut_off() {
    let (mut guest, handle) = guest(config());
    guest.start(0);
    guest.describe(STATISTICS, 0, BUFFERS, 0x4_0005, 0, 0);
    guest.send(STATISTICS, 0);
    assert_eq!(handle.counters().reports, 1);
    assert_eq!(handle.report().unwrap().statistics.swap_in, Some(Bytes::ZERO));
}

#[test]
fn a_guest_that_does_not_answer_falls_silent_and_can_come_back() {
    let (mut guest, handle) = guest(Config { statistics_interval: Duration::from_millis(20), ..config() });
    guest.start(0);
    send_statistics(&mut guest, 0, 0..4);
    while guest.used(STATISTICS).is_empty() {
        assert!(guest.wait(10_000), "no request for statistics");
    }
    assert_eq!(handle.driver(), DriverState::Active);
    std::thread::sleep(SILENT_AFTER + Duration::from_millis(50));
    guest.run();
    assert_eq!(handle.driver(), DriverState::Silent);
    assert!(handle.report().unwrap().age_ms >= 5000);
    assert!(!handle.ask_for_report(), "it was asked, and is not waited for any longer");
    // It may still do as it is told.
    handle.set_target(MAP).unwrap();
    send_statistics(&mut guest, 0, 0..4);
    assert_eq!(handle.driver(), DriverState::Active);
}

#[test]
fn without_statistics_nobody_is_silent() {
    let (mut guest, handle) = guest(Config { statistics_interval: Duration::from_millis(20), ..config() });
    guest.start(1 << STATS_VQ);
    std::thread::sleep(Duration::from_millis(100));
    guest.run();
    assert_eq!(handle.driver(), DriverState::Active);
    assert_eq!(handle.counters().statistics_requests, 0);
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
