//! virtio-mem as a guest's driver and the host see it.

use std::ptr;

use api::status::DriverState;
use api::units::Bytes;
use balloon::discard::{Backing, Discard, Region};
use balloon::plug::{ACPI_PXM, Config, Plug, UNPLUGGED_INACCESSIBLE, block_size};
use devices::testing::{BUFFERS, Guest, HIGH, NEEDS_RESET, REGION, RUNNING};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes as _, GuestAddress};

#[expect(dead_code, reason = "shared with tests that restore devices")]
mod yard;
use yard::*;

const UNPLUG: u16 = 1;
const STATE: u16 = 3;

const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

const PLUGGED_SIZE: u32 = VIRTIO_MMIO_CONFIG + 40;
const REQUESTED_SIZE: u32 = VIRTIO_MMIO_CONFIG + 48;

fn config(yard: &Yard, offset: u32) -> u64 {
    let low = yard.guest.read(VIRTIO_MMIO_CONFIG + offset);
    u64::from(yard.guest.read(VIRTIO_MMIO_CONFIG + offset + 4)) << 32 | u64::from(low)
}

fn touch(yard: &Yard, block: u64) {
    yard.guest.ram.memory.write_obj(7u8, GuestAddress(HIGH + block * BLOCK)).unwrap();
    assert!(yard.guest.ram.resident(HIGH + block * BLOCK));
}

#[test]
fn tells_the_driver_where_and_how_much() {
    let mut yard = Yard::new();
    let features = 1u64 << 32 | 1 << 28 | 1 << 29 | 1 << ACPI_PXM | 1 << UNPLUGGED_INACCESSIBLE;
    assert_eq!(yard.guest.offered(), features);
    yard.guest.start(0);
    let fields: Vec<u64> = (0..8).map(|field| config(&yard, field * 8)).collect();
    assert_eq!(fields, [BLOCK, 0, HIGH, REGION as u64, REGION as u64, 0, 0, 0]);
    // Nothing of it is the driver's.
    yard.guest.raw_write(u64::from(VIRTIO_MMIO_CONFIG), &[0xff; 56]);
    assert_eq!((0..8).map(|field| config(&yard, field * 8)).collect::<Vec<_>>(), fields);

    let generation = yard.guest.read(VIRTIO_MMIO_CONFIG_GENERATION);
    yard.request(5);
    assert_eq!(yard.guest.interrupts(), 1);
    assert_eq!(yard.guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_ne!(yard.guest.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert_eq!(yard.guest.read(REQUESTED_SIZE), 5 * BLOCK as u32);
    // The same again is no news, nor is a part of a block.
    yard.handle.request(Bytes(5 * BLOCK + 1));
    yard.guest.run();
    assert_eq!(yard.guest.interrupts(), 0);
    // More than there is.
    yard.request(99);
    assert_eq!(yard.handle.requested(), Bytes(REGION as u64));
}

#[test]
fn a_guest_plugs_what_is_requested_and_no_more() {
    let mut yard = Yard::new();
    yard.guest.start(0);
    assert_eq!(yard.ask(PLUG, 0, 1), (NACK, 0));
    yard.request(4);
    assert_eq!(yard.ask(PLUG, 0, 5), (NACK, 0));
    assert_eq!(yard.ask(PLUG, 0, 3), (ACK, 0));
    assert_eq!(yard.guest.read(PLUGGED_SIZE), 3 * BLOCK as u32);
    assert_eq!(yard.ask(PLUG, 10, 2), (NACK, 0));
    assert_eq!(yard.ask(PLUG, 15, 1), (ACK, 0));
    assert_eq!(yard.gate.lock().unwrap().open, [0, 1, 2, 15].into());
    assert_eq!(yard.handle.plugged(), Bytes(4 * BLOCK));
    // The host changes its mind: nothing is taken, and nothing more is given.
    yard.request(2);
    assert_eq!(yard.handle.plugged(), Bytes(4 * BLOCK));
    assert_eq!(yard.ask(PLUG, 5, 1), (NACK, 0));
    yard.assert_books();
    assert!(yard.handle.moved().read().is_ok());
}

#[test]
fn what_is_unplugged_leaves_the_host_and_is_closed() {
    let mut yard = Yard::new();
    yard.guest.start(0);
    yard.request(8);
    assert_eq!(yard.ask(PLUG, 0, 8), (ACK, 0));
    (0..8).for_each(|block| touch(&yard, block));
    assert_eq!(yard.ask(UNPLUG, 2, 3), (ACK, 0));
    let left: Vec<u64> = (0..8).filter(|block| yard.guest.ram.resident(HIGH + block * BLOCK)).collect();
    assert_eq!(left, [0, 1, 5, 6, 7]);
    assert_eq!(yard.gate.lock().unwrap().open, [0, 1, 5, 6, 7].into());
    assert_eq!(yard.ask(STATE, 0, 2), (ACK, 0));
    assert_eq!(yard.ask(STATE, 2, 3), (ACK, 1));
    assert_eq!(yard.ask(STATE, 1, 2), (ACK, 2));
    assert_eq!(yard.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert!((0..8).all(|block| !yard.guest.ram.resident(HIGH + block * BLOCK)));
    assert_eq!(yard.ask(STATE, 0, 16), (ACK, 1));
    let counters = yard.handle.counters();
    assert_eq!((counters.plugged, counters.unplugged), (Bytes(8 * BLOCK), Bytes(8 * BLOCK)));
    assert_eq!(counters.discard_failures, 0);
    yard.assert_books();
}

#[test]
fn unplugging_all_costs_no_more_than_what_is_plugged() {
    let mut yard = Yard::new();
    yard.guest.start(0);
    yard.request(8);
    assert_eq!(yard.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(yard.gate.lock().unwrap().closed, 0);
    assert_eq!((yard.ask(PLUG, 0, 2), yard.ask(PLUG, 15, 1)), ((ACK, 0), (ACK, 0)));
    assert_eq!(yard.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(yard.gate.lock().unwrap().closed, 3);
    yard.assert_books();
}

/// The event loop serves others in between, and a vCPU may wait for the device.
#[test]
fn one_event_moves_a_bounded_amount_of_memory() {
    let (size, block) = (Bytes::gib(4), Bytes::mib(2));
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, wherever the kernel likes.
    let host = unsafe { libc::mmap(ptr::null_mut(), size.0 as usize, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(host, libc::MAP_FAILED);
    let start = GuestAddress(1 << 40);
    let region =
        Region { guest: start, host: host.cast(), len: size, backing: Backing::Anonymous, collapses: None };
    let mut handle = None;
    let mut guest = Guest::new(|_| {
        // SAFETY: the mapping stays until the test's process ends.
        let discard = unsafe { Discard::new(vec![region]) };
        let config = Config { address: start, size, most: size, block };
        let (device, its_handle) = Plug::new(config, discard, Box::new(|_, _| Ok(()))).unwrap();
        handle = Some(its_handle);
        Box::new(device)
    });
    let handle = handle.unwrap();
    guest.start(0);
    handle.request(size);
    guest.run();
    for (kind, all, none) in [(PLUG, Bytes::gib(3), Bytes::ZERO), (UNPLUG, Bytes::ZERO, Bytes::gib(3))] {
        for place in 0..3 {
            let request = BUFFERS + 64 * place;
            let mut bytes = [0; 24];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&(start.0 + (place << 30)).to_le_bytes());
            bytes[16..18].copy_from_slice(&512u16.to_le_bytes());
            guest.ram.memory.write_slice(&bytes, GuestAddress(request)).unwrap();
            let head = 2 * place as u16;
            guest.describe(0, head, request, 24, VRING_DESC_F_NEXT, head + 1);
            guest.describe(0, head + 1, request + 32, 10, VRING_DESC_F_WRITE, 0);
            guest.offer(0, head);
        }
        assert_eq!(handle.plugged(), none);
        guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        for done in 1..=3 {
            assert!(guest.wait(0), "there is more to do");
            assert_eq!(guest.used(0).len(), 1, "event {done}");
        }
        guest.run();
        assert_eq!(handle.plugged(), all);
    }
}

#[test]
fn senseless_requests_are_errors_and_change_nothing() {
    let mut yard = Yard::new();
    yard.guest.start(0);
    yard.request(16);
    assert_eq!(yard.ask(PLUG, 4, 4), (ACK, 0));
    let end = HIGH + REGION as u64;
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, blocks) in [
            (HIGH, 0),
            (HIGH + 1, 1),
            (HIGH - BLOCK, 1),
            (end, 1),
            (end - BLOCK, 2),
            (0, 1),
            (u64::MAX - BLOCK + 1, 1),
            (HIGH, u16::MAX),
        ] {
            assert_eq!(yard.ask_at(kind, address, blocks), (ERROR, 0), "{kind} {address:#x} {blocks}");
        }
    }
    // Plugged already, in part or whole; not plugged, in part or whole.
    for (kind, first, blocks) in [(PLUG, 4, 1), (PLUG, 3, 2), (UNPLUG, 3, 2), (UNPLUG, 9, 1), (7, 0, 1)] {
        assert_eq!(yard.ask(kind, first, blocks), (ERROR, 0));
    }
    assert_eq!(yard.handle.plugged(), Bytes(4 * BLOCK));
    assert_eq!(yard.guest.status(), RUNNING);
    yard.assert_books();
}

#[test]
fn a_host_that_can_not_is_busy_and_the_books_stay() {
    let mut yard = Yard::new();
    yard.guest.start(0);
    yard.request(4);
    assert_eq!(yard.ask(PLUG, 0, 2), (ACK, 0));
    touch(&yard, 0);
    yard.gate.lock().unwrap().refuses = true;
    assert_eq!(yard.ask(PLUG, 2, 1), (BUSY, 0));
    assert_eq!(yard.ask(UNPLUG, 0, 1), (BUSY, 0));
    assert_eq!(yard.ask(UNPLUG_ALL, 0, 0), (BUSY, 0));
    assert!(yard.guest.ram.resident(HIGH), "what the guest still has is dropped");
    assert_eq!(yard.handle.counters().refused, 3);
    yard.assert_books();
    yard.gate.lock().unwrap().refuses = false;
    assert_eq!(yard.ask(UNPLUG, 0, 2), (ACK, 0));
    yard.assert_books();
}

#[test]
fn memory_outlives_the_driver_and_the_driver_finds_it() {
    let mut yard = Yard::new();
    yard.request(4);
    assert_eq!(yard.handle.driver(), DriverState::Absent);
    yard.guest.start(0);
    assert_eq!(yard.handle.driver(), DriverState::Active);
    assert_eq!(yard.guest.read(REQUESTED_SIZE), 4 * BLOCK as u32);
    assert_eq!(yard.ask(PLUG, 0, 4), (ACK, 0));
    touch(&yard, 1);
    yard.guest.reset();
    assert_eq!(yard.handle.driver(), DriverState::Absent);
    assert_eq!(yard.handle.plugged(), Bytes(4 * BLOCK));
    assert!(yard.guest.ram.resident(HIGH + BLOCK));
    yard.guest.start(0);
    assert_eq!(yard.guest.read(PLUGGED_SIZE), 4 * BLOCK as u32);
    assert_eq!(yard.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    yard.assert_books();
}

#[test]
fn a_driver_that_reads_what_is_not_plugged_gets_nothing() {
    let mut yard = Yard::new();
    yard.guest.start(1 << UNPLUGGED_INACCESSIBLE);
    yard.request(4);
    assert_eq!(yard.handle.driver(), DriverState::Broken);
    for kind in [PLUG, UNPLUG_ALL, STATE] {
        assert_eq!(yard.ask(kind, 0, 1), (NACK, 0));
    }
    yard.assert_books();
}

#[test]
fn what_is_no_request_comes_back_counted() {
    let mut yard = Yard::new();
    yard.guest.start(0);
    yard.request(4);
    yard.write_request(PLUG, HIGH, 1);
    // Too short to ask, no room or too little to answer.
    for (asked, room) in [(23, Some(10)), (24, Some(9)), (24, None)] {
        let next = if room.is_some() { VRING_DESC_F_NEXT } else { 0 };
        yard.guest.describe(0, 0, BUFFERS, asked, next, 1);
        yard.guest.describe(0, 1, BUFFERS + 64, room.unwrap_or(1), VRING_DESC_F_WRITE, 0);
        yard.guest.send(0, 0);
        assert_eq!(yard.guest.used(0), [(0, 0)]);
    }
    assert_eq!(yard.handle.counters().malformed, 3);
    assert_eq!(yard.handle.plugged(), Bytes::ZERO);
    // Spread over buffers it is one, and longer than it must be.
    yard.guest.describe(0, 0, BUFFERS, 7, VRING_DESC_F_NEXT, 1);
    yard.guest.describe(0, 1, BUFFERS + 7, 30, VRING_DESC_F_NEXT, 2);
    yard.guest.describe(0, 2, BUFFERS + 64, 3, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 3);
    yard.guest.describe(0, 3, BUFFERS + 80, 64, VRING_DESC_F_WRITE, 0);
    yard.guest.send(0, 0);
    assert_eq!(yard.guest.used(0), [(0, 10)]);
    assert_eq!(yard.handle.plugged(), Bytes(BLOCK));
    assert_eq!(yard.guest.status(), RUNNING);
    // Rings that make no sense.
    yard.guest.set_available(0, 1000);
    yard.guest.notify(0);
    assert_eq!(yard.guest.status(), RUNNING | NEEDS_RESET);
    assert_eq!(yard.handle.driver(), DriverState::Broken);
    yard.assert_books();
}

#[test]
fn blocks_grow_with_the_region() {
    for (gib, mib) in [(1, 2), (32, 2), (33, 4), (64, 4), (1024, 64)] {
        assert_eq!(block_size(Bytes::gib(gib)), Bytes::mib(mib), "{gib} GiB");
    }
    assert!(block_size(Bytes(u64::MAX)) > Bytes::gib(1));
}
