//! What a guest tells of its memory, and when it is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use api::status::DriverState;
use api::units::Bytes;
use balloon::device::{Config, SILENT_AFTER, STATS_VQ};
use devices::testing::{BUFFERS, Guest};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes as _, GuestAddress};

mod room;
use room::{MAP, config, guest};

const DEFLATE: usize = 1;
const STATISTICS: usize = 2;

const NUM_PAGES: u32 = VIRTIO_MMIO_CONFIG;
const ACTUAL: u32 = VIRTIO_MMIO_CONFIG + 4;

fn pages(amount: Bytes) -> u32 {
    u32::try_from(amount.pages().0).unwrap()
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
