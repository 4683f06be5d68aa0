//! The socket device between a driver that does as Linux does, or is hostile, and programs on the host.

mod driver;
mod hostile;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use devices::testing::{CARRIERS, Carrier, RUNNING};
use devices::virtio::vsock::{
    Answers, BUFFER, HEADER, MOST_CONNECTIONS, NO_MORE_RECEIVED, NO_MORE_SENT, Operation, Packet,
};
use driver::{Driver, EVENT, PORT, ROOM, ROOMS, SERVED, device, pair};
use proptest::prelude::*;
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

/// What can be read now.
fn read(mut program: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut piece = [0; 8192];
    loop {
        match program.read(&mut piece) {
            Ok(0) => return all,
            Ok(count) => all.extend_from_slice(&piece[..count]),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                return all;
            }
        }
    }
}

fn is_at_its_end(mut program: &UnixStream) -> bool {
    matches!(program.read(&mut [0]), Ok(0))
}

fn data(packets: &[(Packet, Vec<u8>)]) -> Vec<u8> {
    packets.iter().flat_map(|(_, data)| data.clone()).collect()
}

fn text(count: usize) -> Vec<u8> {
    (0..count).map(|index| (index * 31 % 251) as u8).collect()
}

#[test]
fn a_program_that_wants_to_know_its_port_is_told() {
    let mut driver = Driver::started(CARRIERS[0]);
    for _ in 0..2 {
        let answers = Answers { accepted: b"OK ".into(), names_port: true, refused: Vec::new() };
        let (ports, program) = driver.called_with(answers);
        assert_eq!(read(&program), format!("OK {}\n", ports.1).into_bytes());
    }
}

#[test]
fn a_program_on_the_host_calls_the_guest() {
    for carrier in CARRIERS {
        let mut driver = Driver::started(carrier);
        assert_eq!(driver.guest.read(0x100), 3, "the guest's identifier");
        let (ports, program) = driver.called();
        (&program).write_all(b"SSH-2.0-host\r\n").unwrap();
        let packets = driver.packets();
        assert_eq!(data(&packets), b"SSH-2.0-host\r\n");
        assert_eq!(packets[0].0.buffer, BUFFER);
        driver.say_data(ports, b"SSH-2.0-guest\r\n");
        assert_eq!(read(&program), b"SSH-2.0-guest\r\n");
    }
}

#[test]
fn a_guest_that_refuses_or_is_not_there_is_told_of() {
    let mut driver = Driver::new(Carrier::Pci);
    let call = |driver: &mut Driver| {
        let (program, device) = pair();
        let answers = Answers { accepted: b"yes\n".into(), refused: b"no\n".into(), ..Answers::default() };
        driver.incoming.connect(PORT, device, answers).unwrap();
        program
    };
    let program = call(&mut driver);
    driver.guest.run();
    assert_eq!(read(&program), b"no\n", "there is no driver");
    assert!(is_at_its_end(&program));

    driver.guest.start(0);
    let program = call(&mut driver);
    let packets = driver.packets();
    let ports = (PORT, packets[0].0.from.port);
    driver.say(ports, Operation::Reset);
    assert_eq!(read(&program), b"no\n", "nobody listens");
    assert!(driver.packets().is_empty(), "a reset is not answered");

    let waiting = call(&mut driver);
    driver.run();
    driver.guest.reset();
    driver.guest.run();
    assert_eq!(read(&waiting), b"no\n", "the driver has gone");
}

#[test]
fn a_program_in_the_guest_calls_the_host() {
    for carrier in CARRIERS {
        let mut driver = Driver::started(carrier);
        let (ports, program) = driver.calls(5000);
        driver.say_data(ports, b"hello");
        assert_eq!(read(&program), b"hello");
        (&program).write_all(b"and back").unwrap();
        assert_eq!(data(&driver.packets()), b"and back");

        driver.say((5001, SERVED + 1), Operation::Request);
        assert_eq!(driver.operations(), [Operation::Reset], "nobody serves that port");
        driver.say(ports, Operation::Request);
        assert_eq!(driver.operations(), [Operation::Reset], "it is open already");
        assert!(is_at_its_end(&program));
    }
}

#[test]
fn each_side_may_end_its_own_direction_first() {
    let mut driver = Driver::started(Carrier::Pci);
    let (ports, program) = driver.called();
    (&program).write_all(b"last words").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    let packets = driver.packets();
    assert_eq!(data(&packets), b"last words");
    let (last, _) = packets.last().unwrap();
    assert_eq!((last.operation, last.flags), (Some(Operation::Shutdown), NO_MORE_SENT));
    driver.say_data(ports, b"answer");
    assert_eq!(read(&program), b"answer");
    driver.shut(ports, NO_MORE_SENT);
    assert!(is_at_its_end(&program));
    let packets = driver.packets();
    let (last, _) = packets.last().expect("both have sent all");
    assert_eq!((last.operation, last.flags), (Some(Operation::Shutdown), NO_MORE_SENT | NO_MORE_RECEIVED));
    driver.shut(ports, NO_MORE_SENT | NO_MORE_RECEIVED);
    assert_eq!(driver.operations(), [Operation::Reset]);

    let (ports, program) = driver.called();
    driver.shut(ports, NO_MORE_SENT);
    assert!(is_at_its_end(&program));
    (&program).write_all(b"still").unwrap();
    assert_eq!(data(&driver.packets()), b"still");
    drop(program);
    let packets = driver.packets();
    let (last, _) = packets.last().unwrap();
    assert_eq!(last.operation, Some(Operation::Shutdown));
    assert_eq!(last.flags, NO_MORE_SENT | NO_MORE_RECEIVED);
}

#[test]
fn a_guest_gets_no_more_than_it_has_room_for() {
    let mut driver = Driver::started(Carrier::Pci);
    let (ports, program) = driver.called();
    let small = |driver: &mut Driver, forwarded| {
        let packet = driver.packet(ports, Operation::CreditUpdate);
        driver.send(Packet { buffer: 1000, forwarded, ..packet }, &[]);
    };
    small(&mut driver, 0);
    let said = text(3000);
    (&program).write_all(&said).unwrap();
    let mut heard = data(&driver.packets());
    assert_eq!(heard, said[..1000]);
    small(&mut driver, 400);
    heard.extend(data(&driver.packets()));
    assert_eq!(heard, said[..1400]);
    small(&mut driver, 1400);
    heard.extend(data(&driver.packets()));
    small(&mut driver, 2400);
    heard.extend(data(&driver.packets()));
    assert_eq!(heard, said);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_cut_off() {
    let mut driver = Driver::started(Carrier::Pci);
    let (ports, _program) = driver.called();
    let piece = text(ROOM as usize);
    // The socket's own buffer, then ours.
    for _ in 0..10_000 {
        driver.say_data(ports, &piece);
        if driver.operations().contains(&Operation::Reset) {
            return;
        }
    }
    panic!("a guest may fill the host's memory");
}

#[test]
fn a_slow_program_gets_all_of_it_though_the_guest_has_gone() {
    let mut driver = Driver::started(Carrier::Pci);
    let (ports, program) = driver.called();
    let (mut said, mut told) = (Vec::new(), 0_u32);
    let piece = text(8000);
    // As much as the guest may: what it was told of, and the buffer.
    while (said.len() as u32) - told + 8000 <= BUFFER {
        driver.say_data(ports, &piece);
        said.extend_from_slice(&piece);
        for (packet, _) in driver.packets() {
            told = packet.forwarded;
        }
    }
    driver.shut(ports, NO_MORE_SENT);
    driver.say(ports, Operation::Reset);
    let mut heard = Vec::new();
    while heard.len() < said.len() {
        let more = read(&program);
        assert!(!more.is_empty(), "{} of {}", heard.len(), said.len());
        heard.extend(more);
        driver.run();
    }
    assert!(heard == said);
    assert!(is_at_its_end(&program));
    assert!(driver.packets().is_empty(), "the guest has said that it is over");
}

#[test]
fn what_has_no_room_in_the_guest_waits_for_it() {
    let mut driver = Driver::started(Carrier::Pci);
    let (_, program) = driver.called();
    driver.rooms = 0;
    let said = text(200_000);
    let went = (&program).write(&said).unwrap();
    driver.guest.run();
    // What it had left room for before.
    driver.collect();
    let early = data(&driver.heard).len();
    assert_eq!(early, usize::from(ROOMS) * (ROOM as usize - HEADER));
    driver.rooms = 1;
    assert!(data(&driver.packets()) == said[..went]);
}

#[test]
fn data_may_lie_in_many_descriptors() {
    let mut driver = Driver::started(Carrier::Pci);
    let (ports, program) = driver.called();
    let said = text(40_000);
    let packet = Packet { length: 40_000, ..driver.packet(ports, Operation::Data) };
    driver.send_in(packet, &said, 17);
    assert!(read(&program) == said);
    // And less than the packet says is no packet.
    driver.send(packet, &said[..100]);
    assert_eq!(driver.operations().last(), Some(&Operation::Reset));
    assert_eq!(driver.guest.status(), RUNNING);
}

#[test]
fn many_small_writes_come_together() {
    let mut driver = Driver::started(Carrier::Pci);
    let (_, program) = driver.called();
    for byte in 0..=255_u8 {
        (&program).write_all(&[byte]).unwrap();
    }
    let packets = driver.packets();
    assert_eq!(data(&packets), (0..=255).collect::<Vec<u8>>());
    assert_eq!(packets.len(), 1, "each packet costs the guest a buffer");
}

#[test]
fn connections_are_bounded_and_places_free_again() {
    let mut driver = Driver::started(Carrier::Pci);
    let mut programs = Vec::new();
    for port in 0..MOST_CONNECTIONS as u32 {
        programs.push(driver.calls(port));
    }
    driver.say((9999, SERVED), Operation::Request);
    assert_eq!(driver.operations(), [Operation::Reset]);
    let (ports, _) = programs.remove(5);
    driver.run();
    driver.say(ports, Operation::Reset);
    driver.packets();
    driver.calls(9999);
    // Those that the guest does not answer go with their callers.
    let mut driver = Driver::started(Carrier::Pci);
    let callers: Vec<UnixStream> = (0..MOST_CONNECTIONS)
        .map(|_| {
            let (program, device) = pair();
            driver.incoming.connect(PORT, device, Answers::default()).unwrap();
            driver.run();
            program
        })
        .collect();
    driver.packets();
    drop(callers);
    driver.packets();
    driver.called();
}

#[test]
fn a_move_ends_all_connections_and_the_driver_is_told() {
    let mut driver = Driver::started(Carrier::Pci);
    let (_, program) = driver.called();
    driver.guest.describe(EVENT, 0, devices::testing::BUFFERS, 4, VRING_DESC_F_WRITE, 0);
    driver.guest.send(EVENT, 0);
    let state = serde_json::to_string(&driver.guest.save().unwrap()).unwrap();
    let served = driver::Served::default();
    let state = serde_json::from_str(&state).unwrap();
    let mut guest = driver.guest.restore(Box::new(device(&served)), state).unwrap();
    guest.run();
    assert_eq!(guest.used(EVENT), [(0, 4)]);
    assert!(is_at_its_end(&program));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Several connections at once, with pieces of any size, both ways, and room as it comes.
    #[test]
    fn no_byte_is_lost_or_changed(
        steps in prop::collection::vec((0..4_usize, any::<bool>(), 1..30_000_usize), 1..60),
    ) {
        let mut driver = Driver::started(Carrier::Pci);
        let connections: Vec<_> = (0..4)
            .map(|index| if index % 2 == 0 { driver.called() } else { driver.calls(6000 + index) })
            .collect();
        let mut to_guest: Vec<(Vec<u8>, Vec<u8>)> = vec![Default::default(); 4];
        let mut to_host = to_guest.clone();
        let (mut sent, mut told) = ([0_u32; 4], [0_u32; 4]);
        let place_of = |packet: &Packet| {
            let place = connections.iter().position(|((guest, host), _)| {
                (*guest, *host) == (packet.to.port, packet.from.port)
            });
            place.expect("one of them")
        };
        for (index, out, count) in steps {
            let (ports, program) = &connections[index];
            let mut program: &UnixStream = program;
            if out {
                let count = count.min((BUFFER - (sent[index] - told[index])) as usize);
                let piece: Vec<u8> = text(count).iter().map(|byte| byte ^ index as u8).collect();
                driver.say_data(*ports, &piece);
                sent[index] += count as u32;
                to_host[index].0.extend(&piece);
            } else {
                let piece: Vec<u8> = text(count).iter().map(|byte| byte ^ !(index as u8)).collect();
                let went = program.write(&piece).unwrap_or(0);
                to_guest[index].0.extend(&piece[..went]);
            }
            for (packet, data) in driver.packets() {
                let place = place_of(&packet);
                *driver.taken.entry(connections[place].0).or_default() += data.len() as u32;
                to_guest[place].1.extend(data);
                told[place] = packet.forwarded;
            }
            driver.say(*ports, Operation::CreditRequest);
            if count % 3 == 0 {
                to_host[index].1.extend(read(program));
            }
        }
        for _ in 0..100 {
            driver.run();
            for (packet, data) in driver.packets() {
                let place = place_of(&packet);
                *driver.taken.entry(connections[place].0).or_default() += data.len() as u32;
                to_guest[place].1.extend(data);
            }
            for (index, (ports, program)) in connections.iter().enumerate() {
                driver.say(*ports, Operation::CreditUpdate);
                to_host[index].1.extend(read(program));
            }
        }
        for (said, heard) in to_guest.iter().chain(&to_host) {
            prop_assert!(said == heard, "{} of {}", heard.len(), said.len());
        }
    }
}
