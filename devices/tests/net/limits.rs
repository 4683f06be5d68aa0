//! What a NIC's limits hold back, and for how long.

use std::time::{Duration, Instant};

use devices::bucket::{Rate, RateLimits};
use devices::testing::CARRIERS;
use devices::virtio::net::HEADER;
use devices::virtio::net::counters::Direction;
use vm_memory::{Bytes, GuestAddress};

use super::room::*;

const FRAMES: u16 = 20;
const LEN: usize = 1000;
/// A test that waits for more than this has hung.
const PATIENCE: Duration = Duration::from_secs(20);

/// Each lets five frames pass at once, and a hundred a second.
fn limits() -> [RateLimits; 2] {
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    [
        RateLimits { operations: rate(100, 5), bytes: None },
        RateLimits { operations: None, bytes: rate(100 * LEN as u64, 5 * LEN as u64) },
    ]
}

/// Frames of the guest's in a row, of one descriptor each; then tells the device.
fn offer(room: &mut Room) {
    for place in 0..FRAMES {
        let bytes = [&[0; HEADER][..], &frame(LEN, place as u8)].concat();
        let at = OUT + STRIDE * u64::from(place);
        room.guest.ram.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        room.guest.describe(TX, place, at, bytes.len() as u32, 0, 0);
        room.guest.offer(TX, place);
    }
    room.guest.notify(TX);
}

fn all() -> Vec<Vec<u8>> {
    (0..FRAMES).map(|place| frame(LEN, place as u8)).collect()
}

/// Has the device work until `done`.
fn work(room: &mut Room, mut done: impl FnMut(&mut Room) -> bool) -> Duration {
    let begun = Instant::now();
    while !done(room) {
        assert!(begun.elapsed() < PATIENCE);
        room.guest.wait(5);
    }
    begun.elapsed()
}

/// Five went at once, each of the rest takes a hundredth of a second.
fn assert_limited(room: &Room, direction: Direction, begun: Instant) {
    let least = Duration::from_millis(u64::from(FRAMES - 6) * 10);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    let traffic = room.traffic(direction);
    assert_eq!((traffic.frames, traffic.dropped), (u64::from(FRAMES), 0));
    assert!(traffic.limited > 0 && traffic.limited_for >= least / 2, "{traffic:?}");
}

#[test]
fn what_a_guest_sends_is_limited_and_stays_in_order() {
    for carrier in CARRIERS {
        for limits in limits() {
            let (backend, mut peer) = stream();
            let mut room = Room::limited(carrier, backend, 0, limits);
            let begun = Instant::now();
            offer(&mut room);
            let mut came = peer.all();
            assert!((5..10).contains(&came.len()), "{}", came.len());
            work(&mut room, |_| {
                came.extend(peer.all());
                came.len() == usize::from(FRAMES)
            });
            assert_eq!(came, all());
            assert_limited(&room, Direction::Sent, begun);
            assert_eq!(room.traffic(Direction::Received).limited, 0);
        }
    }
}

#[test]
fn what_a_guest_receives_is_limited_and_stays_in_order() {
    for carrier in CARRIERS {
        for limits in limits() {
            let (backend, mut peer) = stream();
            let mut room = Room::limited(carrier, backend, 0, limits);
            room.leave_all(0..100, 2048);
            let begun = Instant::now();
            for frame in all() {
                peer.send(&frame);
            }
            let mut came = room.plain();
            assert!((5..10).contains(&came.len()), "{}", came.len());
            work(&mut room, |room| {
                came.extend(room.plain());
                came.len() == usize::from(FRAMES)
            });
            assert_eq!(came, all());
            assert_limited(&room, Direction::Received, begun);
            assert_eq!(room.traffic(Direction::Sent).limited, 0);
        }
    }
}

/// A driver that starts anew gets no more than one that does not, and nothing spins for frames that it took back.
#[test]
fn a_reset_is_no_way_around() {
    let operations = Some(Rate { per_second: 20, burst: 5 });
    for carrier in CARRIERS {
        let (backend, mut peer) = stream();
        let mut room = Room::limited(carrier, backend, 0, RateLimits { operations, bytes: None });
        let begun = Instant::now();
        let mut came = 0;
        for _ in 0..5 {
            offer(&mut room);
            came += peer.all().len();
            room.guest.start(0);
            room.guest.run();
        }
        // Past the time at which it would have gone on.
        std::thread::sleep(Duration::from_millis(60));
        room.guest.run();
        let most = 6 + begun.elapsed().as_millis() / 50;
        assert!(came as u128 <= most, "{came} {most}");
        offer(&mut room);
        work(&mut room, |_| {
            came += peer.all().len();
            came >= 10
        });
    }
}

/// What ends the connection is seen once the limits let it be looked at.
#[test]
fn a_cable_that_is_cut_is_seen_behind_the_limits() {
    let operations = Some(Rate { per_second: 50, burst: 1 });
    let (backend, mut peer) = stream();
    let mut room = Room::limited(CARRIERS[0], backend, 0, RateLimits { operations, bytes: None });
    for frame in all() {
        peer.send(&frame);
    }
    room.leave_all(0..100, 2048);
    drop(peer);
    work(&mut room, |room| room.lost.load(std::sync::atomic::Ordering::Relaxed) == 1);
    assert_eq!(room.traffic(Direction::Received).frames, u64::from(FRAMES));
}
