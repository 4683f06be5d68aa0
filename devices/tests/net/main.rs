//! The network device: an honest driver and a hostile one, at streams and taps.

mod attack;
mod hostile;
mod limits;
mod room;
mod tap;

use std::io::Write;
use std::sync::atomic::Ordering;

use devices::testing::{CARRIERS, NEEDS_RESET, RUNNING};
use devices::virtio::net::counters::{Direction, Traffic};
use devices::virtio::net::{HEADER, MOST_FRAME};
use proptest::prelude::*;
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::*;
use vm_memory::{Bytes, GuestAddress};

use room::*;

const PLAIN: [u8; HEADER] = [0; HEADER];

#[test]
fn frames_go_both_ways() {
    for carrier in CARRIERS {
        let (mut room, mut peer) = Room::at_stream(carrier, 0);
        room.leave_all(0..200, 2048);
        let mut bytes = 0;
        for (seed, len) in [14, 60, 1514, 2036, 2037, 9000, MOST_FRAME].into_iter().enumerate() {
            let frame = frame(len, seed as u8);
            peer.send(&frame);
            assert_eq!(room.plain(), [&frame[..]], "{len}");
            assert!(room.send(PLAIN, &frame, &[12, 7, 500]));
            assert_eq!(peer.all(), [&frame[..]], "{len}");
            bytes += len as u64;
        }
        let all = Traffic { frames: 7, bytes, ..Traffic::default() };
        assert_eq!(room.traffic(Direction::Received), all);
        assert_eq!(room.traffic(Direction::Sent), all);
        assert!(room.guest.interrupts() > 0);
        room.guest.ram.assert_canaries();
    }
}

#[test]
fn a_driver_learns_the_address_and_no_more_than_the_backend_does() {
    let (room, _peer) = Room::at_stream(CARRIERS[0], 0);
    assert_eq!(room.guest.read(0x100).to_le_bytes(), [0x52, 0x54, 0, 0x12]);
    assert_eq!(room.guest.read(0x104).to_le_bytes(), [0x34, 0x56, 1, 0]);
    let offered = room.guest.offered();
    let has = |feature: u32| offered & 1 << feature != 0;
    for feature in [VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX] {
        assert!(has(feature), "{feature}");
    }
    for feature in [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_HOST_UFO,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_MTU,
    ] {
        assert!(!has(feature), "{feature}");
    }
}

#[test]
fn a_driver_that_merges_nothing_gets_what_fits_into_one_buffer() {
    let (mut room, mut peer) = Room::at_stream(CARRIERS[0], 1 << VIRTIO_NET_F_MRG_RXBUF);
    room.leave_all(0..8, 1526);
    let (small, large) = (frame(1514, 1), frame(1515, 2));
    peer.send(&small);
    peer.send(&large);
    peer.send(&small);
    let received = room.received();
    assert_eq!(received.len(), 2);
    for (header, frame) in received {
        assert_eq!((header[10], &frame), (1, &small));
    }
    assert_eq!(room.traffic(Direction::Received).dropped, 1);
}

#[test]
fn frames_wait_for_a_driver_that_leaves_no_room_and_come_in_order() {
    for carrier in CARRIERS {
        let (mut room, mut peer) = Room::at_stream(carrier, 0);
        for seed in 0..20 {
            peer.send(&frame(100 + usize::from(seed), seed));
            // It comes to rest, or this panics.
            room.guest.run();
        }
        assert_eq!(room.plain(), [[0; 0]; 0]);
        for seed in 0..20 {
            room.leave_all(u16::from(seed)..u16::from(seed) + 1, 2048);
            assert_eq!(room.plain(), [frame(100 + usize::from(seed), seed)]);
        }
        peer.send(&frame(60, 99));
        assert_eq!(room.plain(), [[0; 0]; 0]);
        room.leave_all(0..2, 2048);
        assert_eq!(room.plain(), [frame(60, 99)]);
        assert_eq!(room.traffic(Direction::Received).dropped, 0);
    }
}

#[test]
fn a_large_frame_waits_for_all_the_room_that_it_needs() {
    let (mut room, mut peer) = Room::at_stream(CARRIERS[0], 0);
    let large = frame(9000, 1);
    peer.send(&large);
    peer.send(&frame(60, 2));
    for place in 0..8 {
        room.leave_all(place..place + 1, 1024);
        assert_eq!(room.plain(), [[0; 0]; 0]);
    }
    room.leave_all(8..10, 1024);
    assert_eq!(room.plain(), [large, frame(60, 2)]);
}

#[test]
fn a_frame_for_which_the_queue_has_no_room_at_all_is_passed_over() {
    let (mut room, mut peer) = Room::at_stream(CARRIERS[0], 0);
    peer.send(&frame(60_000, 1));
    peer.send(&frame(60, 2));
    room.leave_all(0..256, 64);
    assert_eq!(room.plain(), [frame(60, 2)]);
    assert_eq!(room.traffic(Direction::Received).dropped, 1);
}

#[test]
fn a_driver_is_told_of_a_frame_that_passes_the_index_at_which_it_wants_to_be_told() {
    for carrier in CARRIERS {
        let (mut room, mut peer) = Room::at_stream(carrier, 0);
        room.leave_all(0..20, 256);
        let used_event =
            GuestAddress(room.guest.rings(RX).available + 4 + 2 * u64::from(room.guest.size(RX)));
        let interrupts = |room: &Room| {
            let count = room.guest.interrupts();
            room.guest.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK, 1);
            count > 0
        };
        interrupts(&room);
        // Five buffers, from 0 to 4; the driver wants to hear of the third.
        room.guest.ram.memory.write_obj(2u16, used_event).unwrap();
        peer.send(&frame(1200, 1));
        assert_eq!(room.plain().len(), 1);
        assert!(interrupts(&room));
        // The next five: only of a later one.
        room.guest.ram.memory.write_obj(12u16, used_event).unwrap();
        peer.send(&frame(1200, 2));
        assert_eq!(room.plain().len(), 1);
        assert!(!interrupts(&room));
        peer.send(&frame(1200, 3));
        assert_eq!(room.plain().len(), 1);
        assert!(interrupts(&room));
    }
}

#[test]
fn a_peer_that_takes_nothing_makes_the_driver_wait_and_loses_no_frame() {
    let (mut room, mut peer) = Room::at_stream(CARRIERS[0], 0);
    let mut sent = 0u8;
    // Every frame that comes back went, or a part of it did and the rest is kept.
    while room.send(PLAIN, &frame(40_000, sent), &[]) {
        sent += 1;
        assert!(sent < 100, "a socket takes all that");
    }
    assert!(sent > 1);
    let mut came = Vec::new();
    while came.len() <= usize::from(sent) {
        assert!(peer.read(3000) > 0, "{} of {sent}", came.len());
        room.guest.run();
        came.extend(peer.frames());
    }
    for (seed, came) in came.iter().enumerate() {
        assert!(*came == frame(40_000, seed as u8), "frame {seed}");
    }
    assert_eq!(room.guest.used(TX), [(0, 0)]);
    assert_eq!(room.traffic(Direction::Sent).dropped, 0);
}

#[test]
fn the_driver_is_told_that_the_other_end_has_gone() {
    for carrier in CARRIERS {
        let (mut room, mut peer) = Room::at_stream(carrier, 0);
        room.leave_all(0..4, 2048);
        assert!(room.is_up());
        peer.send(&frame(60, 1));
        drop(peer);
        assert_eq!(room.plain(), [frame(60, 1)]);
        assert!(!room.is_up());
        assert_eq!(room.lost.load(Ordering::Relaxed), 1);
        // Frames go nowhere, and their buffers come back.
        for _ in 0..300 {
            assert!(room.send(PLAIN, &frame(60, 2), &[]));
        }
        assert_eq!(room.traffic(Direction::Sent).dropped, 300);
        assert_eq!(room.guest.status(), RUNNING);
        room.guest.start(0);
        room.guest.run();
        assert!(!room.is_up());
        assert_eq!(room.lost.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn what_waits_to_be_sent_comes_back_once_the_other_end_has_gone() {
    let (mut room, peer) = Room::at_stream(CARRIERS[0], 0);
    while room.send(PLAIN, &frame(40_000, 1), &[]) {}
    drop(peer);
    room.guest.run();
    assert!(!room.is_up());
    assert_eq!(room.guest.used(TX), [(0, 0)]);
    assert!(room.send(PLAIN, &frame(60, 2), &[]));
}

#[test]
fn a_peer_that_breaks_the_stream_is_heard_no_more() {
    let (mut room, mut peer) = Room::at_stream(CARRIERS[0], 0);
    room.leave_all(0..4, 2048);
    peer.socket.write_all(&[0xff; 64]).unwrap();
    assert_eq!(room.plain(), [[0; 0]; 0]);
    assert!(!room.is_up());
    assert_eq!(room.lost.load(Ordering::Relaxed), 1);
    assert!(room.send(PLAIN, &frame(60, 2), &[]));
    assert_eq!(peer.all(), [[0; 0]; 0]);
}

#[test]
fn what_is_no_frame_is_dropped_and_what_is_no_chain_is_malformed() {
    let (mut room, mut peer) = Room::at_stream(CARRIERS[0], 0);
    room.leave_all(0..64, 2048);
    assert!(room.send(PLAIN, &frame(13, 1), &[]));
    assert!(room.send(PLAIN, &frame(MOST_FRAME + 1, 1), &[]));
    assert_eq!(room.traffic(Direction::Sent).dropped, 2);
    // Too short for a header, and of memory to write.
    for (len, flags) in [(11, 0), (100, VRING_DESC_F_WRITE)] {
        room.guest.describe(TX, 0, OUT, len, flags, 0);
        room.guest.send(TX, 0);
        assert_eq!(room.guest.used(TX), [(0, 0)]);
    }
    // Buffers to receive that are none.
    for (len, flags) in [(11, VRING_DESC_F_WRITE), (100, 0)] {
        room.guest.describe(RX, 100, OUT, len, flags, 0);
        room.guest.offer(RX, 100);
    }
    // They are met when the others are used up.
    for seed in 0..64 {
        peer.send(&frame(1000, seed));
    }
    peer.send(&frame(5, 1));
    room.guest.run();
    let used = room.guest.used(RX);
    assert_eq!((used.len(), used.iter().filter(|(_, len)| *len == 0).count()), (66, 2));
    room.leave_all(0..1, 2048);
    assert_eq!(room.plain(), [[0; 0]; 0]);
    assert_eq!(room.traffic(Direction::Received).dropped, 1);
    assert_eq!(room.guest.status(), RUNNING);
    assert!(room.send(PLAIN, &frame(60, 1), &[]));
    assert_eq!(peer.all(), [frame(60, 1)]);
}

#[test]
fn a_driver_that_only_leaves_what_is_no_buffer_needs_a_reset() {
    for carrier in CARRIERS {
        let (mut room, mut peer) = Room::at_stream(carrier, 0);
        for place in 0..100 {
            room.guest.describe(RX, place, OUT, 100, 0, 0);
            room.guest.offer(RX, place);
        }
        // Met while no driver has notified anything.
        peer.send(&frame(60, 1));
        room.guest.run();
        room.guest.notify(TX);
        assert_eq!(room.guest.status(), RUNNING | NEEDS_RESET);
        assert_usable(&mut room.guest, &mut peer);
    }
}

#[test]
fn buffers_that_wait_stay_in_the_queue_while_the_vm_stands_still() {
    for carrier in CARRIERS {
        let (mut room, mut peer) = Room::at_stream(carrier, 0);
        room.leave_all(0..30, 2048);
        for round in 0..10u8 {
            peer.send(&frame(3000, round));
            assert_eq!(room.plain(), [frame(3000, round)]);
            room.guest.transport().lock().unwrap().drain();
            peer.send(&frame(60, round));
            assert_eq!(room.plain(), [[0; 0]; 0]);
            let state = room.guest.save().unwrap();
            // Another process, with another network.
            let (backend, other) = stream();
            let net = nic(backend, &room.lost);
            room.counters = net.counters();
            room.guest = room.guest.restore(Box::new(net), state).unwrap();
            peer = other;
        }
        // Each round took two of thirty buffers, and not one more.
        for seed in 0..10 {
            peer.send(&frame(60, seed));
        }
        assert_eq!(room.plain().len(), 10);
        peer.send(&frame(60, 0));
        assert_eq!(room.plain(), [[0; 0]; 0]);
    }
}

#[test]
fn a_reset_with_frames_on_their_way_starts_anew() {
    for carrier in CARRIERS {
        let (mut room, mut peer) = Room::at_stream(carrier, 0);
        for round in 0..200u16 {
            room.leave_all(0..round % 5, 2048);
            peer.send(&frame(3000, round as u8));
            room.guest.run();
            while round % 3 == 0 && room.send(PLAIN, &frame(30_000, 1), &[]) {}
            if round % 7 == 0 {
                room.guest.transport().lock().unwrap().drain();
                room.guest.transport().lock().unwrap().resume();
            }
            room.guest.start(0);
            room.guest.run();
            room.leave_all(0..200, 4096);
            // What came before the reset was for the driver before it, unless it waited in the socket.
            let received = room.received();
            assert!(received.iter().all(|(_, frame)| frame.len() == 3000), "{round}");
            while peer.read(1 << 20) > 0 {
                room.guest.run();
            }
            assert!(peer.frames().iter().all(|frame| frame.len() == 30_000));
            room.guest.start(0);
        }
        assert_usable(&mut room.guest, &mut peer);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn frames_and_buffers_of_any_length_go_together(
        buffers in prop::collection::vec(prop_oneof![12u32..64, 12u32..4096], 1..20),
        frames in prop::collection::vec(
            (14usize..3000, prop::collection::vec(1u32..2000, 0..8), 0usize..6), 1..30),
        reads in prop::collection::vec(1usize..9000, 1..8),
    ) {
        let (mut room, mut peer) = Room::at_stream(CARRIERS[0], 0);
        let (mut reads, mut buffers) = (reads.iter().cycle(), buffers.iter().cycle());
        let (mut expected, mut came, mut went) = (Vec::new(), Vec::new(), Vec::new());
        for (seed, (len, cuts, left)) in frames.iter().enumerate() {
            let frame = frame(*len, seed as u8);
            peer.send(&frame);
            let mut gone = room.send(PLAIN, &frame, cuts);
            while !gone {
                prop_assert!(peer.read(*reads.next().unwrap()) > 0);
                room.guest.run();
                gone = !room.guest.used(TX).is_empty();
            }
            went.extend(peer.frames());
            expected.push(frame);
            for _ in 0..*left {
                room.leave_any(*buffers.next().unwrap());
            }
            room.guest.notify(RX);
            came.extend(room.plain());
        }
        for _ in 0..30 {
            room.leave_any(4000);
        }
        room.guest.notify(RX);
        came.extend(room.plain());
        went.extend(peer.all());
        prop_assert_eq!(&came, &expected);
        prop_assert_eq!(&went, &expected);
        room.guest.ram.assert_canaries();
    }
}
