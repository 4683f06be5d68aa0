//! Counters, and limits of what a guest may ask of its host's disks.

use std::time::{Duration, Instant};

use devices::bucket::{Rate, RateLimits};
use devices::testing::CARRIERS;
use devices::virtio::block::handle::{Count, Counts};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::room::*;

#[test]
fn what_was_done_is_counted() {
    let file = file();
    let mut room = Room::new(CARRIERS[0], raw(file.as_path(), WRITABLE), 0);
    room.read(0, 4096);
    room.read(8, 512);
    assert_eq!(room.write(3, &[7; 1024]), OK);
    assert_eq!(room.clear(VIRTIO_BLK_T_DISCARD, 32, 8, 0), OK);
    assert_eq!(room.clear(VIRTIO_BLK_T_WRITE_ZEROES, 8, 4, 0), OK);
    assert_eq!(room.request(0, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    // What is answered without the host counts nothing.
    assert_eq!(room.write(SECTORS, &[7; 512]), IO_ERROR);
    let count = |operations, bytes| Count { operations, bytes };
    let expected = Counts {
        reads: count(2, 4608),
        writes: count(1, 1024),
        cleared: count(2, 12 * 512),
        flushes: 1,
        ..Counts::default()
    };
    assert_eq!(room.handle.counts(), expected);
}

/// A device with limits, and so many requests to read a sector at once.
fn limited(limits: RateLimits, requests: u16) -> (Room, Instant) {
    let file = file();
    let block = block(raw(file.as_path(), WRITABLE), "disk", 2).limited(limits).unwrap();
    let mut room = Room::of(CARRIERS[1], block, 0);
    room.ask(1, VIRTIO_BLK_T_FLUSH, 0, &[]);
    room.finished(1);
    room.write_header(VIRTIO_BLK_T_IN, 0);
    let start = Instant::now();
    for request in 0..requests {
        let head = 3 * request;
        room.guest.describe(0, head, HEADER, 16, VRING_DESC_F_NEXT, head + 1);
        room.guest.describe(0, head + 1, DATA, 512, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, head + 2);
        room.guest.describe(0, head + 2, STATUS, 1, VRING_DESC_F_WRITE, 0);
        room.guest.offer(0, head);
    }
    room.guest.notify(0);
    (room, start)
}

fn wait_for(room: &mut Room, requests: usize) {
    let mut done = room.guest.used(0).len();
    while done < requests {
        assert!(room.guest.wait(10_000), "nothing comes back");
        done += room.guest.used(0).len();
    }
    assert_eq!(done, requests);
}

#[test]
fn no_more_passes_than_the_limits_allow() {
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    for limits in [
        // The flush is an operation too.
        RateLimits { operations: rate(100, 6), bytes: None },
        RateLimits { operations: None, bytes: rate(51_200, 2560) },
    ] {
        let (mut room, start) = limited(limits, 25);
        wait_for(&mut room, 25);
        // 20 hundredths of a second, less what came in while the requests were made.
        assert!(start.elapsed() >= Duration::from_millis(150), "{limits:?}: {:?}", start.elapsed());
        let counts = room.handle.counts();
        assert!(counts.limited >= 15 && counts.limited <= 20, "{counts:?}");
        assert!(counts.limited_for >= Duration::from_millis(100), "{counts:?}");
        assert_eq!(counts.reads.operations, 25);
    }
}

#[test]
fn a_reset_forgets_what_waits_for_the_limits() {
    let limits = RateLimits { operations: Some(Rate { per_second: 1, burst: 2 }), bytes: None };
    let (mut room, _) = limited(limits, 20);
    assert!(room.handle.counts().limited >= 18);
    assert!(room.guest.save().is_err());
    room.guest.start(0);
    room.guest.run();
    assert!(room.guest.used(0).is_empty());
    room.guest.ram.assert_canaries();
}
