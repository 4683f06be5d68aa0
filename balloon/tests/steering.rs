//! Both devices under one steering: what the guest is asked for as it moves.

use std::time::{Duration, Instant};

use api::status::UNPLUG_PATIENCE;
use api::units::{Bytes, PAGE_SIZE};
use balloon::mechanism::steering::{Steering, SteeringError};
use devices::testing::{Guest, REGION};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;

mod room;
#[expect(dead_code, reason = "shared with tests of the device alone")]
mod yard;
use room::{MAP, config, guest};
use yard::{ACK, BLOCK, PLUG, UNPLUG_ALL, Yard};

/// What the guest booted with; as much again can be plugged.
const BOOT: Bytes = Bytes(REGION as u64);

struct Bench {
    balloon: Guest,
    yard: Yard,
    steering: Steering,
}

impl Bench {
    fn new() -> Self {
        let (mut balloon, handle) = guest(balloon::device::Config { target: MAP, ..config() });
        let mut yard = Yard::new();
        let steering = Steering::by_plug(handle, yard.handle.clone(), BOOT).unwrap();
        balloon.start(0);
        yard.guest.start(0);
        Self { balloon, yard, steering }
    }

    /// One whose guest has plugged all that there is.
    fn plugged() -> Self {
        let mut bench = Self::new();
        bench.set_target(MAP);
        assert_eq!(bench.yard.ask(PLUG, 0, 16), (ACK, 0));
        bench.run();
        bench
    }

    fn set_target(&mut self, target: Bytes) {
        self.steering.set_target(target).unwrap();
        self.run();
    }

    /// Lets everybody do what is due, as an event loop does.
    fn run(&mut self) {
        self.yard.guest.run();
        for (number, fd) in self.steering.events().into_iter().enumerate() {
            let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one entry, which lives through the call.
            if unsafe { libc::poll(&mut poll, 1, 0) } > 0 {
                self.steering.event(number);
            }
        }
        self.yard.guest.run();
        self.balloon.run();
    }

    /// Lets a little time pass, and then what it brings.
    fn wait(&mut self) {
        std::thread::sleep(Duration::from_millis(20));
        self.run();
    }

    /// What the balloon is asked to hold.
    fn held(&self) -> Bytes {
        Bytes(u64::from(self.balloon.read(VIRTIO_MMIO_CONFIG)) * PAGE_SIZE)
    }
}

#[test]
fn a_guest_grows_by_plugging_and_shrinks_by_unplugging_first() {
    let mut bench = Bench::new();
    assert_eq!((bench.steering.target(), bench.steering.actual()), (BOOT, BOOT));
    // Whole blocks only.
    bench.set_target(MAP + Bytes(BLOCK - 1));
    assert_eq!(bench.steering.target(), MAP, "a part of a block is rounded away");
    bench.set_target(MAP - Bytes(1));
    assert_eq!(bench.steering.target(), MAP - Bytes(BLOCK));
    assert_eq!(bench.yard.ask(PLUG, 0, 15), (ACK, 0));
    bench.run();
    assert_eq!(bench.steering.actual(), MAP - Bytes(BLOCK));
    assert_eq!(bench.held(), Bytes::ZERO);

    let target = Bytes(BOOT.0 / 2);
    bench.set_target(target);
    assert_eq!((bench.yard.handle.requested(), bench.held()), (Bytes::ZERO, Bytes::ZERO));
    assert_eq!(bench.yard.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    bench.run();
    assert_eq!(bench.held(), BOOT - target);
    assert_eq!(bench.steering.actual(), BOOT);
}

#[test]
fn the_balloon_takes_what_is_not_unplugged_in_time() {
    let mut bench = Bench::plugged();
    bench.set_target(BOOT);
    assert_eq!(bench.held(), Bytes::ZERO);
    let start = Instant::now();
    while bench.held() != Bytes(16 * BLOCK) {
        assert!(start.elapsed() < 20 * UNPLUG_PATIENCE, "the balloon never came to help");
        bench.wait();
    }
    assert!(start.elapsed() >= UNPLUG_PATIENCE - Duration::from_millis(100), "{:?}", start.elapsed());
    // It unplugs after all: the balloon lets go.
    assert_eq!(bench.yard.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    bench.run();
    assert_eq!(bench.held(), Bytes::ZERO);
}

#[test]
fn a_paused_guest_has_the_whole_of_its_time_to_unplug() {
    let mut bench = Bench::plugged();
    bench.set_target(BOOT);
    bench.steering.rest(true);
    let begun = Instant::now();
    while begun.elapsed() < UNPLUG_PATIENCE + Duration::from_millis(300) {
        bench.wait();
        assert_eq!(bench.held(), Bytes::ZERO, "it can't unplug while it stands still");
    }
    bench.steering.rest(false);
    bench.run();
    assert_eq!(bench.held(), Bytes::ZERO, "it has only just begun to run");
    let begun = Instant::now();
    while bench.held() == Bytes::ZERO {
        assert!(begun.elapsed() < UNPLUG_PATIENCE * 10, "the balloon never helps");
        bench.wait();
    }
}

#[test]
fn a_target_that_no_driver_can_reach_is_refused() {
    let mut bench = Bench::new();
    bench.yard.guest.reset();
    assert_eq!(bench.steering.set_target(MAP), Err(SteeringError::NoPlug { has: BOOT }));
    assert_eq!(bench.steering.target(), BOOT);
    bench.balloon.reset();
    let half = Bytes(BOOT.0 / 2);
    assert_eq!(bench.steering.set_target(half), Err(SteeringError::NoBalloon));
    let beyond = MAP + Bytes(BLOCK);
    assert_eq!(bench.steering.set_target(beyond), Err(SteeringError::OutOfMap { target: beyond, map: MAP }));
    // The driver comes later and finds what it is asked for.
    bench.yard.guest.start(0);
    bench.set_target(MAP);
    assert_eq!(bench.yard.handle.requested(), MAP - BOOT);
}

/// `max` may sink before any driver is there to hear of it.
#[test]
fn a_driver_that_comes_finds_the_target_that_was_moved_without_one() {
    let (mut balloon, handle) = guest(config());
    let steering = Steering::by_balloon(handle);
    let quarter = Bytes(MAP.0 / 4);
    assert_eq!(steering.set_target(quarter), Err(SteeringError::NoBalloon));
    steering.retarget(quarter).unwrap();
    assert_eq!(steering.target(), quarter);
    let beyond = MAP + Bytes(BLOCK);
    assert_eq!(steering.retarget(beyond), Err(SteeringError::OutOfMap { target: beyond, map: MAP }));
    balloon.run();
    balloon.start(0);
    balloon.run();
    assert_eq!(Bytes(u64::from(balloon.read(VIRTIO_MMIO_CONFIG)) * PAGE_SIZE), MAP - quarter);

    let mut bench = Bench::new();
    bench.yard.guest.reset();
    bench.balloon.reset();
    bench.steering.retarget(MAP).unwrap();
    assert_eq!(bench.steering.target(), MAP);
    bench.yard.guest.start(0);
    bench.run();
    assert_eq!(bench.yard.handle.requested(), MAP - BOOT);
}

#[test]
fn the_balloons_part_follows_the_target_while_its_driver_is_away() {
    let mut bench = Bench::new();
    let half = Bytes(BOOT.0 / 2);
    bench.set_target(half);
    assert_eq!(bench.held(), BOOT - half);
    bench.balloon.reset();
    bench.set_target(MAP);
    bench.balloon.start(0);
    bench.run();
    assert_eq!(bench.held(), Bytes::ZERO, "what it held once is not asked for again");
}

#[test]
fn the_balloon_helps_where_its_driver_came_late() {
    let mut bench = Bench::plugged();
    bench.balloon.reset();
    bench.set_target(BOOT);
    let begun = Instant::now();
    while begun.elapsed() < UNPLUG_PATIENCE + Duration::from_millis(300) {
        bench.wait();
    }
    bench.balloon.start(0);
    bench.run();
    assert_eq!(bench.held(), Bytes(16 * BLOCK));
}
