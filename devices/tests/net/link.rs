//! A cable that its owner takes out and puts in again.

use devices::testing::RUNNING;

use super::*;

fn put(room: &mut Room, is_in: bool) {
    room.cable.put(is_in);
    room.guest.run();
    assert_eq!(room.is_up(), is_in);
}

#[test]
fn frames_are_dropped_both_ways_and_counted_while_it_is_out() {
    for carrier in CARRIERS {
        let (mut room, mut peer) = Room::at_stream(carrier, 0);
        room.leave_all(0..20, 2048);
        assert!(room.is_up());
        room.guest.interrupts();
        put(&mut room, false);
        assert_eq!(room.guest.interrupts(), 1, "the driver is told");
        for seed in 0..3 {
            peer.send(&frame(100, seed));
        }
        assert_eq!(room.plain(), [[0; 0]; 0]);
        assert!(room.send(PLAIN, &frame(60, 9), &[]));
        assert_eq!(peer.all(), [[0; 0]; 0]);
        let dropped = |room: &Room| {
            [Direction::Received, Direction::Sent]
                .map(|way| (room.traffic(way).frames, room.traffic(way).dropped))
        };
        assert_eq!(dropped(&room), [(0, 3), (0, 1)]);
        room.guest.interrupts();
        put(&mut room, true);
        assert_eq!(room.guest.interrupts(), 1);
        peer.send(&frame(100, 4));
        assert_eq!(room.plain(), [frame(100, 4)]);
        assert!(room.send(PLAIN, &frame(60, 5), &[]));
        assert_eq!(peer.all(), [frame(60, 5)]);
        assert_eq!(dropped(&room), [(1, 3), (1, 1)]);
        assert_eq!(room.lost.load(Ordering::Relaxed), 0);
    }
}

/// One that finds room later, and one of which only a part has come yet.
#[test]
fn frames_on_their_way_are_dropped_whole() {
    let (mut room, mut peer) = Room::at_stream(CARRIERS[0], 0);
    peer.send(&frame(100, 1));
    peer.socket.write_all(&[0, 0, 0, 60, 1, 2, 3]).unwrap();
    room.guest.run();
    put(&mut room, false);
    room.leave_all(0..20, 2048);
    assert_eq!((room.plain(), room.traffic(Direction::Received).dropped), (Vec::new(), 1));
    put(&mut room, true);
    // The rest of the one that had begun: the stream goes on behind it.
    peer.socket.write_all(&frame(57, 1)).unwrap();
    peer.send(&frame(100, 2));
    let frames = room.plain();
    assert_eq!((frames.len(), frames.last()), (2, Some(&frame(100, 2))));
}

#[test]
fn a_frame_that_was_sent_in_part_goes_whole() {
    let (mut room, mut peer) = Room::at_stream(CARRIERS[1], 0);
    // Until the socket takes no more.
    while room.send(PLAIN, &frame(60_000, 1), &[]) {}
    let sent = room.traffic(Direction::Sent).frames;
    put(&mut room, false);
    assert_eq!(room.guest.used(TX).len(), 1, "what waited is dropped");
    let mut came = Vec::new();
    loop {
        let more = peer.read(1 << 20);
        room.guest.run();
        came.extend(peer.frames());
        if more == 0 {
            break;
        }
    }
    assert_eq!(came.len() as u64, sent);
    assert!(came.iter().all(|came| *came == frame(60_000, 1)));
    put(&mut room, true);
    assert!(room.send(PLAIN, &frame(60, 2), &[]));
    assert_eq!(peer.all(), [frame(60, 2)]);
}

#[test]
fn it_stays_out_for_the_next_driver_and_while_there_is_none() {
    for carrier in CARRIERS {
        let (mut room, mut peer) = Room::at_stream(carrier, 0);
        put(&mut room, false);
        room.guest.reset();
        for seed in 0..200 {
            peer.send(&frame(1000, seed));
            room.guest.run();
        }
        assert_eq!(room.traffic(Direction::Received).dropped, 200);
        room.guest.start(0);
        room.guest.run();
        assert!(!room.is_up());
        // And in, while there is none.
        room.guest.reset();
        room.cable.put(true);
        room.guest.run();
        room.guest.start(0);
        room.leave_all(0..20, 2048);
        assert!(room.is_up());
        peer.send(&frame(60, 1));
        assert_eq!(room.plain(), [frame(60, 1)]);
    }
}

#[test]
fn it_waits_for_a_vm_that_is_paused() {
    let (mut room, mut peer) = Room::at_stream(CARRIERS[1], 0);
    room.leave_all(0..20, 2048);
    room.guest.transport().lock().unwrap().drain();
    room.cable.put(false);
    room.guest.run();
    assert!(room.is_up());
    room.guest.transport().lock().unwrap().resume();
    room.guest.run();
    assert!(!room.is_up());
    // Out and in before anybody looks is nothing.
    room.cable.put(true);
    room.guest.run();
    room.guest.interrupts();
    room.cable.put(false);
    room.cable.put(true);
    room.guest.run();
    assert_eq!((room.guest.interrupts(), room.is_up()), (0, true));
    peer.send(&frame(60, 1));
    assert_eq!(room.plain(), [frame(60, 1)]);
}

#[test]
fn one_whose_other_end_has_gone_stays_down() {
    for is_out in [false, true] {
        let (mut room, peer) = Room::at_stream(CARRIERS[0], 0);
        room.cable.put(!is_out);
        room.guest.run();
        drop(peer);
        room.guest.run();
        assert_eq!(room.lost.load(Ordering::Relaxed), 1);
        for is_in in [false, true] {
            room.cable.put(is_in);
            room.guest.run();
            assert!(!room.is_up());
        }
        assert!(room.send(PLAIN, &frame(60, 1), &[]));
        assert_eq!((room.traffic(Direction::Sent).dropped, room.guest.status()), (1, RUNNING));
        assert!(!room.counters.is_up());
    }
}
