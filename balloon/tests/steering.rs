//! Both devices under one steering: what the guest is asked for as it moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use api::status::{CushionStatus, UNPLUG_PATIENCE};
use api::units::{Bytes, PAGE_SIZE};
use balloon::device::DEFLATE_ON_OOM;
use balloon::mechanism::steering::{Steering, SteeringError};
use devices::testing::{BUFFERS, Guest, REGION};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes as _, GuestAddress};

mod room;
#[expect(dead_code, reason = "shared with tests of the device alone")]
mod yard;
use room::{MAP, config, guest};
use yard::{ACK, BLOCK, PLUG, UNPLUG_ALL, Yard};

const UNPLUG: u16 = 1;

/// What the guest booted with; as much again can be plugged.
const BOOT: Bytes = Bytes(REGION as u64);

struct Bench {
    balloon: Guest,
    yard: Yard,
    steering: Steering,
}

impl Bench {
    /// One whose balloon keeps no cushion, as its driver does not deflate on OOM.
    fn new() -> Self {
        let mut bench = Self::without_drivers();
        bench.balloon.start(1 << DEFLATE_ON_OOM);
        bench.yard.guest.start(0);
        bench
    }

    fn without_drivers() -> Self {
        let config = balloon::device::Config { target: MAP, refills: true, ..config() };
        let (balloon, handle) = guest(config);
        let yard = Yard::new();
        let steering = Steering::by_plug(handle, yard.handle.clone(), BOOT, true).unwrap();
        Self { balloon, yard, steering }
    }

    /// One whose guest has its cushion, which is all that it may have: here, 256 pages in 16 blocks.
    fn with_cushion() -> Self {
        let mut bench = Self::without_drivers();
        bench.balloon.start(0);
        bench.yard.guest.start(0);
        bench.run();
        assert_eq!(bench.yard.handle.requested(), MAP - BOOT, "as soon as there is a balloon to hold it");
        assert_eq!(bench.yard.ask(PLUG, 0, 16), (ACK, 0));
        bench.run();
        assert_eq!(bench.held(), MAP - BOOT);
        bench.holds(256);
        bench
    }

    /// The guest's driver says that the balloon holds so many pages.
    fn holds(&mut self, pages: u32) {
        self.balloon.write(VIRTIO_MMIO_CONFIG + 4, pages);
        self.run();
    }

    /// The guest reports so many bytes as available.
    fn reports(&mut self, available: Bytes) {
        let mut entry = 6u16.to_le_bytes().to_vec();
        entry.extend(available.0.to_le_bytes());
        self.balloon.ram.memory.write_slice(&entry, GuestAddress(BUFFERS)).unwrap();
        self.balloon.describe(2, 3, BUFFERS, 10, 0, 0);
        self.balloon.send(2, 3);
        self.run();
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
    bench.balloon.start(1 << DEFLATE_ON_OOM);
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
    bench.balloon.start(1 << DEFLATE_ON_OOM);
    bench.run();
    assert_eq!(bench.held(), Bytes(16 * BLOCK));
}

const PAGE: Bytes = Bytes(PAGE_SIZE);

fn pages(count: u64) -> Bytes {
    Bytes(PAGE.0 * count)
}

/// What the guest took of its cushion and still has.
fn taken(bench: &Bench) -> Option<Bytes> {
    Some(bench.steering.balloon().oom_deflate()?.taken)
}

#[test]
fn a_cushion_lies_in_the_balloon_and_follows_the_target() {
    let mut bench = Bench::with_cushion();
    assert_eq!((bench.steering.target(), bench.steering.actual()), (BOOT, BOOT));
    let whole = MAP - BOOT;
    assert_eq!(bench.steering.cushion(), Some(CushionStatus { size: whole, held: whole }));
    // What is granted is there already, and no more can be plugged for it.
    let more = Bytes(4 * BLOCK);
    bench.set_target(BOOT + more);
    assert_eq!((bench.held(), bench.yard.handle.requested()), (whole - more, whole));
    assert_eq!(bench.steering.cushion().unwrap().size, whole - more);
    bench.holds(192);
    assert_eq!((bench.steering.actual(), taken(&bench)), (BOOT + more, None), "it was told so");
    // Less may be had altogether: the balloon lets go, so that its pages are out of the way of what is unplugged.
    bench.steering.set_max(MAP - Bytes(2 * BLOCK));
    bench.run();
    assert_eq!((bench.held(), bench.yard.handle.requested()), (Bytes::ZERO, whole));
    bench.holds(100);
    assert_eq!(bench.steering.actual(), BOOT + more, "what it lets go counts as there");
    bench.holds(0);
    assert_eq!((bench.held(), bench.yard.handle.requested()), (Bytes::ZERO, whole - Bytes(2 * BLOCK)));
    assert_eq!(bench.yard.ask(UNPLUG, 14, 2), (ACK, 0));
    bench.run();
    assert_eq!((bench.held(), bench.steering.actual()), (whole - more - Bytes(2 * BLOCK), BOOT + more));
}

#[test]
fn what_a_guest_takes_of_its_cushion_it_keeps_while_it_needs_it() {
    let mut bench = Bench::with_cushion();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    bench.steering.balloon().when_taken_back(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    bench.holds(206);
    assert_eq!((taken(&bench), calls.load(Ordering::Relaxed)), (Some(pages(50)), 1));
    assert_eq!(bench.steering.actual(), BOOT + pages(50));
    assert_eq!(bench.steering.balloon().oom_deflate().unwrap().had, BOOT + pages(50));
    assert_eq!(bench.steering.cushion().unwrap().held, pages(206));
    // It is granted a part of that, and then more.
    bench.set_target(BOOT + Bytes(BLOCK));
    assert_eq!((bench.held(), taken(&bench)), (pages(206), Some(pages(50 - 16))));
    bench.set_target(BOOT + Bytes(4 * BLOCK));
    assert_eq!((bench.held(), taken(&bench)), (pages(256 - 64), Some(Bytes::ZERO)));
    bench.holds(192);
    assert_eq!((taken(&bench), calls.load(Ordering::Relaxed)), (Some(Bytes::ZERO), 1));
    assert_eq!(bench.steering.balloon().counters().oom_deflated, pages(50));
    // Whoever shrinks it means what it took as well.
    bench.holds(150);
    bench.set_target(BOOT);
    assert_eq!(bench.held(), pages(256));
}

#[test]
fn a_cushion_is_filled_again_when_the_guest_can_spare_it() {
    let mut bench = Bench::with_cushion();
    bench.holds(156);
    let begun = Instant::now();
    // It is in need still, and then has only what it must be left.
    bench.reports(Bytes::mib(20));
    assert_eq!(bench.held(), pages(156));
    let mut available = Bytes::mib(16);
    while bench.held() == pages(156) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is never filled again");
        bench.steering.balloon().ask_for_report();
        bench.wait();
        if !bench.balloon.used(2).is_empty() {
            bench.reports(available);
            if begun.elapsed() > Duration::from_millis(1500) {
                available = Bytes::mib(16) + pages(40);
            }
        }
    }
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(bench.held(), pages(196), "no more than it could spare");
    bench.holds(196);
    bench.wait();
    assert_eq!((bench.held(), taken(&bench)), (pages(196), Some(pages(60))));
}

#[test]
fn without_a_balloon_that_holds_it_there_is_no_cushion() {
    let mut bench = Bench::with_cushion();
    bench.balloon.reset();
    bench.run();
    assert_eq!(bench.yard.handle.requested(), Bytes::ZERO, "the guest has it now, and is to unplug it");
    assert_eq!(bench.steering.cushion().unwrap().size, Bytes::ZERO);
    bench.balloon.start(1 << DEFLATE_ON_OOM);
    bench.run();
    assert_eq!(bench.yard.handle.requested(), Bytes::ZERO);
    bench.balloon.start(0);
    bench.run();
    assert_eq!(bench.yard.handle.requested(), MAP - BOOT);
}

#[test]
fn a_guest_whose_driver_goes_has_a_target_that_it_can_come_to() {
    let mut bench = Bench::new();
    bench.set_target(MAP);
    assert_eq!(bench.yard.ask(PLUG, 0, 4), (ACK, 0));
    bench.run();
    let has = BOOT + Bytes(4 * BLOCK);
    assert_eq!((bench.steering.target(), bench.steering.actual()), (MAP, has));
    bench.yard.guest.reset();
    bench.run();
    assert_eq!((bench.steering.target(), bench.held()), (has, Bytes::ZERO));
    assert_eq!(bench.steering.set_target(MAP), Err(SteeringError::NoPlug { has }));
    // A cushion that is there already can still be had.
    let mut bench = Bench::with_cushion();
    bench.yard.guest.reset();
    bench.set_target(MAP);
    assert_eq!((bench.steering.target(), bench.held()), (MAP, Bytes::ZERO));
}

#[test]
fn a_guest_with_a_balloon_and_nothing_to_plug_with_is_told_of() {
    let mut bench = Bench::without_drivers();
    let lacks = |bench: &Bench| bench.steering.plug().unwrap().lacks_driver_ms;
    bench.run();
    assert_eq!(lacks(&bench), None, "it has not booted");
    bench.balloon.start(0);
    bench.run();
    bench.wait();
    assert!(lacks(&bench).is_some_and(|ms| ms >= 10), "{:?}", lacks(&bench));
    // It comes late,
    bench.yard.guest.start(0);
    bench.run();
    assert_eq!(lacks(&bench), None);
    assert_eq!(bench.yard.handle.requested(), MAP - BOOT);
    // and goes.
    bench.yard.guest.reset();
    bench.run();
    assert!(lacks(&bench).is_some());
}

#[test]
fn a_vm_on_huge_pages_keeps_no_cushion() {
    let (mut balloon, handle) = guest(balloon::device::Config { target: MAP, ..config() });
    let mut yard = Yard::new();
    let steering = Steering::by_plug(handle, yard.handle.clone(), BOOT, false).unwrap();
    balloon.start(0);
    yard.guest.start(0);
    (0..3).for_each(|event| steering.event(event));
    assert_eq!((yard.handle.requested(), steering.cushion().unwrap().size), (Bytes::ZERO, Bytes::ZERO));
}
