//! The network device at real taps, in a network of their own.

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use devices::testing::{CARRIERS, Guest};
use devices::virtio::net::backend::Backend;
use devices::virtio::net::counters::Direction;
use devices::virtio::net::tap::Tap;
use devices::virtio::net::{HEADER, NetError};
use virtio_bindings::virtio_net::*;

use super::room::*;

const HERE: &str = "BALLAST_TEST_NETWORK";
const PLAIN: [u8; HEADER] = [0; HEADER];

/// Runs the body of the test `name` in a process with a network of its own, as its root.
fn in_own_network(name: &str, body: impl FnOnce()) {
    if std::env::var_os(HERE).is_some() {
        return body();
    }
    if !Path::new("/dev/net/tun").exists() {
        eprintln!("no taps here: /dev/net/tun is missing");
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net"]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(HERE, "1");
    assert!(command.status().expect("unshare of util-linux").success());
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status().expect("ip of iproute2");
    assert!(status.success(), "ip {arguments}");
}

/// A tap that is up, where the host is 192.0.2.1 and the guest 192.0.2.2.
fn tap(name: &str) -> Tap {
    ip(&format!("tuntap add dev {name} mode tap"));
    // No frames but those of the test.
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1").unwrap();
    ip(&format!("addr add 192.0.2.1/24 dev {name}"));
    ip(&format!("link set {name} up"));
    ip(&format!("neigh add 192.0.2.2 lladdr 52:54:00:12:34:56 dev {name}"));
    let tap = Tap::open(name).unwrap();
    // The host's kernel takes a moment to see that the cable is in, and sends nothing until then.
    while !shown(name).contains(" state UP ") {
        std::thread::sleep(Duration::from_millis(1));
    }
    tap
}

/// What the host says of an interface; `/sys` may be another network's.
fn shown(name: &str) -> String {
    let output = Command::new("ip").args(["-o", "link", "show", name]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn host_mac(name: &str) -> [u8; 6] {
    let text = shown(name);
    let mut words = text.split_whitespace();
    words.find(|word| *word == "link/ether").expect("it is Ethernet");
    let mac: devices::virtio::net::mac::Mac = words.next().unwrap().parse().unwrap();
    mac.bytes()
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A datagram from the guest to the host, whose checksum is of the pseudo header alone, and virtio's header that says
/// that the rest is the host's to do.
fn datagram(name: &str, port: u16, text: &[u8]) -> ([u8; HEADER], Vec<u8>) {
    let length = 8 + text.len() as u16;
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1];
    ip[2..4].copy_from_slice(&(20 + length).to_be_bytes());
    let check = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let pseudo = sum(&ip[12..20], 17 + u32::from(length));
    let mut udp = [[0x12, 0x34], port.to_be_bytes(), length.to_be_bytes(), pseudo.to_be_bytes()].concat();
    udp.extend_from_slice(text);
    let frame = [&host_mac(name)[..], &mac().bytes(), &[8, 0], &ip, &udp].concat();
    let mut header = PLAIN;
    header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&6u16.to_le_bytes());
    (header, frame)
}

fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket
}

fn heard(socket: &UdpSocket) -> Vec<u8> {
    let mut bytes = [0; 2048];
    let (count, _) = socket.recv_from(&mut bytes).expect("it comes");
    bytes[..count].to_vec()
}

/// Waits for frames.
fn received(room: &mut Room) -> Vec<([u8; HEADER], Vec<u8>)> {
    loop {
        let frames = room.received();
        if !frames.is_empty() {
            return frames;
        }
        assert!(room.guest.wait(20_000), "nothing comes");
    }
}

#[test]
fn datagrams_go_both_ways_and_the_host_does_the_checksums() {
    in_own_network("tap::datagrams_go_both_ways_and_the_host_does_the_checksums", || {
        for (carrier, name) in CARRIERS.into_iter().zip(["one", "two"]) {
            let mut room = Room::new(carrier, Backend::Tap(tap(name)), 0);
            let socket = host_socket();
            let port = socket.local_addr().unwrap().port();
            room.leave_all(0..100, 2048);
            let (header, frame) = datagram(name, port, b"from the guest");
            assert!(room.send(header, &frame, &[3, 40]));
            assert_eq!(heard(&socket), b"from the guest");
            socket.send_to(&[7; 1000], "192.0.2.2:77").unwrap();
            let frames = received(&mut room);
            let [(header, frame)] = &frames[..] else { panic!("{frames:?}") };
            assert_eq!(frame[42..], [7; 1000]);
            assert_eq!(header[0], VIRTIO_NET_HDR_F_NEEDS_CSUM as u8);
            assert_eq!((header[10], header[11]), (1, 0));
            room.guest.ram.assert_canaries();
            assert_eq!(room.traffic(Direction::Received).dropped, 0);
            drop(room);
            ip(&format!("link del {name}"));
        }
    });
}

#[test]
fn a_driver_that_takes_no_partial_checksums_gets_whole_ones_after_one_that_did() {
    in_own_network(
        "tap::a_driver_that_takes_no_partial_checksums_gets_whole_ones_after_one_that_did",
        || {
            let mut room = Room::new(CARRIERS[0], Backend::Tap(tap("one")), 0);
            let socket = host_socket();
            for (refused, flags) in [(0, 1), (1u64 << VIRTIO_NET_F_GUEST_CSUM, 0), (0, 1)] {
                // Of those that need it too.
                let without = if refused == 0 { 0 } else { refused | 0b111 << VIRTIO_NET_F_GUEST_TSO4 };
                room.guest.start(without);
                room.leave_all(0..10, 2048);
                socket.send_to(&[7; 100], "192.0.2.2:77").unwrap();
                let (header, frame) = received(&mut room).remove(0);
                assert_eq!(header[0], flags);
                let pseudo = u32::from(sum(&frame[26..34], 17 + 108));
                assert_eq!(sum(&frame[34..], pseudo) == 0xffff, flags == 0);
            }
        },
    );
}

#[test]
fn frames_that_the_kernel_refuses_are_dropped_and_the_next_ones_go() {
    in_own_network("tap::frames_that_the_kernel_refuses_are_dropped_and_the_next_ones_go", || {
        let mut room = Room::new(CARRIERS[0], Backend::Tap(tap("one")), 0);
        let socket = host_socket();
        let port = socket.local_addr().unwrap().port();
        let (header, frame) = datagram("one", port, b"first");
        let bad: [(usize, &[u8]); 4] =
            [(1, &[0x77]), (1, &[1, 0, 0, 0, 0]), (6, &[0xff, 0xff]), (0, &[0xff; 10])];
        for (number, (at, bytes)) in (1..).zip(bad) {
            let mut wrong = header;
            wrong[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(room.send(wrong, &frame, &[]));
            assert_eq!(room.traffic(Direction::Sent).dropped, number, "{at}");
        }
        assert!(room.send(header, &frame, &[]));
        assert_eq!(heard(&socket), b"first");
        ip("link set one down");
        assert!(room.send(header, &frame, &[]));
        assert_eq!(room.traffic(Direction::Sent).dropped, 5);
        ip("link set one up");
        let (header, frame) = datagram("one", port, b"second");
        assert!(room.send(header, &frame, &[]));
        assert_eq!(heard(&socket), b"second");
        assert!(room.is_up());
    });
}

#[test]
fn a_tap_waits_for_a_driver_that_leaves_no_room() {
    in_own_network("tap::a_tap_waits_for_a_driver_that_leaves_no_room", || {
        let mut room = Room::new(CARRIERS[1], Backend::Tap(tap("one")), 0);
        let socket = host_socket();
        let send = |seed: u8| socket.send_to(&[seed; 1400], "192.0.2.2:77").unwrap();
        for seed in 0..50 {
            send(seed);
            // It comes to rest, or this panics.
            room.guest.run();
        }
        let mut seeds = Vec::new();
        // Too small for one frame; then for one; then for many.
        for (places, len) in [(0..1, 1000), (1..2, 1000), (2..30, 100), (30..200, 1500)] {
            room.leave_all(places, len);
            seeds.extend(room.received().into_iter().map(|(_, frame)| {
                assert!(frame[42..].iter().all(|byte| *byte == frame[42]));
                frame[42]
            }));
        }
        assert_eq!(seeds, (0..50).collect::<Vec<u8>>());
        send(99);
        assert_eq!(received(&mut room).len(), 1);
        assert_eq!(room.traffic(Direction::Received).dropped, 0);
    });
}

#[test]
fn a_tap_that_is_deleted_is_a_link_that_is_down() {
    in_own_network("tap::a_tap_that_is_deleted_is_a_link_that_is_down", || {
        let mut room = Room::new(CARRIERS[0], Backend::Tap(tap("one")), 0);
        room.leave_all(0..10, 2048);
        ip("link del one");
        while room.is_up() {
            assert!(room.guest.wait(20_000));
            room.guest.run();
        }
        assert!(room.send(PLAIN, &frame(60, 1), &[]));
        assert_eq!(room.traffic(Direction::Sent).dropped, 1);
        room.guest.start(0);
    });
}

#[test]
fn what_is_no_tap_is_refused_with_what_to_do() {
    in_own_network("tap::what_is_no_tap_is_refused_with_what_to_do", || {
        let error = |name: &str| Tap::open(name).map(drop).unwrap_err();
        assert!(matches!(error("nothere"), NetError::NoTap(name) if name == "nothere"));
        for bad in ["", "far-too-long-name", "a/b", "a b"] {
            assert!(matches!(error(bad), NetError::Name(_)), "{bad}");
        }
        assert!(matches!(error("lo"), NetError::NotATap(_)), "{:?}", error("lo"));
        ip("tuntap add dev many mode tap multi_queue");
        assert!(matches!(error("many"), NetError::NotATap(_)), "{:?}", error("many"));
        let first = tap("one");
        assert_eq!((first.name(), first.mtu()), ("one", Some(1500)));
        assert!(matches!(error("one"), NetError::InUse(_)), "{:?}", error("one"));
        drop(first);
        Tap::open("one").unwrap();
    });
}

#[test]
fn a_tap_in_a_bridge_is_there_as_long_as_its_nic() {
    in_own_network("tap::a_tap_in_a_bridge_is_there_as_long_as_its_nic", || {
        let error = Tap::in_bridge("lo", mac()).map(drop).unwrap_err();
        assert!(matches!(&error, NetError::NoBridge(name) if name == "lo"), "{error}");
        let made = std::process::Command::new("ip").args(["link", "add", "br0", "type", "bridge"]).status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: this kernel has no bridges");
            return;
        }
        ip("link set br0 mtu 1400 up");
        let (first, second) = (Tap::in_bridge("br0", mac()).unwrap(), Tap::in_bridge("br0", mac()).unwrap());
        assert_eq!((first.name(), second.name(), first.mtu()), ("ballast0", "ballast1", Some(1400)));
        let seen = shown("ballast0");
        for part in ["fe:54:00:12:34:56", " master br0 ", ",UP,"] {
            assert!(seen.contains(part), "{part}: {seen}");
        }
        drop(first);
        assert_eq!(shown("ballast0"), "", "it has gone");
        assert!(shown("ballast1").contains(" master br0 "));
    });
}

/// An interface's file as another program would hand it over.
fn handed_over(name: &str, flags: libc::c_int) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: a request of zeros is one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes one request.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
    file
}

fn from_descriptor(file: File) -> Result<Tap, NetError> {
    // SAFETY: nobody else has it.
    unsafe { Tap::from_descriptor(file.into_raw_fd()) }
}

#[test]
fn an_open_descriptor_is_looked_at_before_it_is_used() {
    in_own_network("tap::an_open_descriptor_is_looked_at_before_it_is_used", || {
        use libc::{IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR};
        let said = |file| from_descriptor(file).map(drop).unwrap_err().to_string();
        assert!(said(handed_over("a", IFF_TAP | IFF_NO_PI)).contains("IFF_VNET_HDR"));
        assert!(said(handed_over("b", IFF_TUN | IFF_NO_PI | IFF_VNET_HDR)).contains("tun"));
        assert!(said(File::open("/dev/null").unwrap()).contains("no tap"));
        for number in [1, 9999] {
            // SAFETY: no file of this number could be a tap.
            assert!(unsafe { Tap::from_descriptor(number) }.is_err());
        }
        let tap = from_descriptor(handed_over("c", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)).unwrap();
        assert_eq!(tap.name(), "c");
        let guest = Guest::new(|_| Box::new(nic(Backend::Tap(tap), &Default::default())));
        assert_ne!(guest.offered() & 1 << VIRTIO_NET_F_MTU, 0);
        assert_eq!(guest.read(0x108) >> 16, 1500);
    });
}
