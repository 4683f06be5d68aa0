//! A guest whose kernel does not manage all that it was given.

use api::units::{Bytes, PAGE_SIZE};
use balloon::device::{Config, DEFLATE_ON_OOM, Handle};
use devices::testing::{BUFFERS, Guest};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes as _, GuestAddress};

mod room;
use room::guest;

const STATISTICS: usize = 2;
const NUM_PAGES: u32 = VIRTIO_MMIO_CONFIG;
const ACTUAL: u32 = VIRTIO_MMIO_CONFIG + 4;
/// Statistics by their tags (virtio 1.2, section 5.5.6.4).
const FREE: u16 = 4;
const TOTAL: u16 = 5;
const AVAILABLE: u16 = 6;

const MAP: Bytes = Bytes::mib(512);

fn config(target: Bytes) -> Config {
    Config { map: MAP, target, ..room::config() }
}

/// Has the driver say what its kernel manages and could spare.
fn say(guest: &mut Guest, total: Bytes, available: Bytes) {
    let mut at = BUFFERS;
    for (tag, value) in [(FREE, available), (TOTAL, total), (AVAILABLE, available)] {
        guest.ram.memory.write_slice(&tag.to_le_bytes(), GuestAddress(at)).unwrap();
        guest.ram.memory.write_slice(&value.0.to_le_bytes(), GuestAddress(at + 2)).unwrap();
        at += 10;
    }
    guest.describe(STATISTICS, 0, BUFFERS, 30, 0, 0);
    guest.send(STATISTICS, 0);
    guest.run();
}

/// Has the device ask, so that the driver has its buffer back.
fn ask(guest: &mut Guest, handle: &Handle) {
    assert!(handle.ask_for_report());
    guest.run();
}

/// What the balloon is asked to hold.
fn asked(guest: &Guest) -> Bytes {
    Bytes(u64::from(guest.read(NUM_PAGES)) * PAGE_SIZE)
}

/// Has the driver do as it is asked, until it is asked for nothing more.
fn follow(guest: &mut Guest, handle: &Handle, total: Bytes) {
    while asked(guest) != Bytes(u64::from(guest.read(ACTUAL)) * PAGE_SIZE) {
        let asked = guest.read(NUM_PAGES);
        guest.write(ACTUAL, asked);
        guest.run();
        ask(guest, handle);
        say(guest, total, total);
    }
}

#[test]
fn no_balloon_takes_what_the_guest_was_never_left() {
    // mem=256M, of which a stock kernel manages so much.
    let total = Bytes::mib(219);
    let (mut guest, handle) = guest(config(Bytes::mib(288)));
    guest.start(0);
    say(&mut guest, total, Bytes::mib(150));
    assert_eq!(asked(&guest), Bytes::ZERO, "it has less than its target by itself");
    let has = handle.actual();
    assert!(has >= Bytes::mib(256) && has < Bytes::mib(280), "{has}");
    assert_eq!(handle.given(), MAP);
    let report = handle.report().unwrap();
    assert_eq!((report.had, report.managed), (Some(has), Some(total)));
    assert!(handle.followed() && !handle.settled());

    // A target below that is reached when the balloon has left so much.
    handle.set_target(Bytes::mib(128)).unwrap();
    guest.run();
    follow(&mut guest, &handle, total);
    assert_eq!(handle.actual(), Bytes::mib(128));
    assert_eq!(handle.given(), Bytes::mib(128) + (MAP - has));
    let report = handle.report().unwrap();
    assert_eq!(report.had, Some(Bytes::mib(128)), "the total has the balloon in it");
    assert_eq!(report.managed, Some(total - (has - Bytes::mib(128))));
}

#[test]
fn a_total_without_the_balloon_means_the_same() {
    let total = Bytes::mib(219);
    let (mut guest, handle) = guest(config(MAP));
    guest.start(1 << DEFLATE_ON_OOM);
    say(&mut guest, total, total);
    let has = handle.actual();
    handle.set_target(Bytes::mib(200)).unwrap();
    guest.run();
    let held = guest.read(NUM_PAGES);
    guest.write(ACTUAL, held);
    guest.run();
    ask(&mut guest, &handle);
    let left = total - Bytes(u64::from(held) * PAGE_SIZE);
    say(&mut guest, left, left);
    assert_eq!(handle.report().unwrap().managed, Some(left));
    assert_eq!(
        handle.actual() + Bytes(u64::from(held) * PAGE_SIZE),
        has,
        "what is not managed stays the same"
    );
}

#[test]
fn a_report_dies_with_its_driver_and_so_does_what_it_said() {
    let (mut guest, handle) = guest(config(Bytes::mib(256)));
    guest.start(0);
    say(&mut guest, Bytes::mib(100), Bytes::mib(50));
    assert!(handle.actual() < Bytes::mib(200) && handle.report().is_some());
    guest.reset();
    assert_eq!((handle.actual(), handle.report()), (MAP, None));
    // The next kernel manages all of it.
    guest.start(0);
    say(&mut guest, Bytes::mib(471), Bytes::mib(400));
    follow(&mut guest, &handle, Bytes::mib(471));
    assert_eq!(handle.actual(), Bytes::mib(256));
    // A capture kernel with next to nothing.
    guest.reset();
    guest.start(0);
    say(&mut guest, Bytes::mib(90), Bytes::mib(60));
    assert_eq!(asked(&guest), Bytes::ZERO);
}

#[test]
fn a_lie_about_the_total_is_bounded() {
    for total in [Bytes::ZERO, Bytes(1), Bytes(u64::MAX)] {
        let (mut guest, handle) = guest(config(Bytes::mib(256)));
        guest.start(0);
        say(&mut guest, total, Bytes(u64::MAX));
        assert!(handle.actual() <= handle.given(), "{total}");
        assert_eq!(handle.given(), MAP);
        handle.set_target(Bytes::mib(1)).unwrap();
        guest.run();
        assert!(asked(&guest) < MAP);
    }
}
