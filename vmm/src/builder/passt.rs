//! passt: a process that makes the connections of a guest its own, as any program of the user could make them
//! (<https://passt.top>). It needs no privileges, shuts itself in (namespaces, seccomp), and ends with its socket.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::config::{Forward, Protocol, UserNet};
use crate::helper::{Helper, Words};

/// The guest's address, of which passt tells it by DHCP.
pub const GUEST: &str = "10.0.2.15";

/// The largest packet by default: the fewer there are of a stream, the faster it is. passt's own choice too.
pub const MTU: u16 = 65_520;

/// How long its start may take.
const PATIENCE: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Why there is no passt.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// It is not installed.
    #[error(
        "a network without privileges needs the program `passt`, which is not installed: `apt install passt` (or your \
         system's package of that name); or use a tap: --net tap=NAME"
    )]
    Missing,
    /// It does not start.
    #[error("passt, which is to carry the guest's network, ended at its start: {0}")]
    Ended(String),
    /// It takes too long.
    #[error("passt, which is to carry the guest's network, was not ready within 20 s: {0}")]
    Slow(String),
    /// The host refuses.
    #[error("passt can't be started: {0}")]
    Host(#[from] io::Error),
}

/// One that serves.
pub struct Passt {
    /// Where its frames go and come from.
    pub socket: OwnedFd,
    /// The process.
    pub helper: Helper,
    /// What it says of itself.
    pub words: Words,
}

/// Starts one for a guest, and returns once it serves.
pub fn start(user: &UserNet, mtu: u16) -> Result<Passt, PasstError> {
    let (ours, its) = UnixStream::pair()?;
    let (mut words, errors) = Words::new()?;
    let its = OwnedFd::from(its);
    let mut command = Command::new("passt");
    command.args(arguments(user, mtu, its.as_raw_fd()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
    let started = Helper::start(&mut command, &its);
    drop((command, its));
    let helper = match started {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(PasstError::Missing),
        started => started?.0,
    };
    let before = filters("self").unwrap_or(0);
    let begun = Instant::now();
    // The last thing that it does before it serves is to give up most system calls.
    while filters(&helper.pid().to_string()).is_none_or(|filters| filters <= before) {
        if helper.has_ended()? {
            return Err(PasstError::Ended(words.take()));
        }
        if begun.elapsed() > PATIENCE {
            return Err(PasstError::Slow(words.take()));
        }
        thread::sleep(LOOK_AGAIN);
    }
    Ok(Passt { socket: ours.into(), helper, words })
}

/// Filters of system calls that a process has.
fn filters(process: &str) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"))?.trim().parse().ok()
}

fn arguments(user: &UserNet, mtu: u16, socket: RawFd) -> Vec<String> {
    let mut arguments: Vec<String> = [
        // For this guest alone.
        "--foreground",
        "--quiet",
        "--one-off",
        // The guest's network is its own, whatever that of the host looks like: QEMU's numbers.
        "--address",
        GUEST,
        "--netmask",
        "24",
        "--gateway",
        "10.0.2.2",
        "--mac-addr",
        "52:55:0a:00:02:02",
    ]
    .map(str::to_owned)
    .into();
    let mut add = |key: &str, value: String| arguments.extend([key.to_owned(), value]);
    add("--fd", socket.to_string());
    add("--mtu", mtu.to_string());
    if rustix::process::geteuid().is_root() {
        // As it would choose itself, if the host's list of users has the name.
        add("--runas", "65534:65534".to_owned());
    }
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    if !has_default_route(&read("/proc/net/route"), &read("/proc/net/ipv6_route")) {
        // Without one it would not start. There are forwards, and what is on the host itself.
        add("--interface", "lo".to_owned());
    }
    let systemd = || usable_server(&read("/run/systemd/resolve/resolv.conf"));
    let usual = usable_server(&read("/etc/resolv.conf"));
    if let Some(server) = user.dns.or_else(|| if usual.is_some() { None } else { systemd() }) {
        add("--dns", server.to_string());
    }
    for forward in &user.forwards {
        let Forward { protocol, address, host, guest } = forward;
        let key = match protocol {
            Protocol::Tcp => "--tcp-ports",
            Protocol::Udp => "--udp-ports",
        };
        let address = address.map_or_else(String::new, |address| format!("{address}/"));
        add(key, format!("{address}{host}:{guest}"));
    }
    if !user.loopback {
        arguments.push("--no-map-gw".to_owned());
    }
    arguments
}

/// Whether packets to anywhere find a way out, by the kernel's lists of routes (proc(5)).
fn has_default_route(four: &str, six: &str) -> bool {
    let field = |line: &str, index| line.split_whitespace().nth(index).map(str::to_owned);
    let is = |line: &str, index, value: &str| field(line, index).is_some_and(|field| field == value);
    let four = four.lines().any(|line| is(line, 1, "00000000") && is(line, 7, "00000000"));
    // The kernel has one of its own to `lo`, which leads nowhere.
    four || six.lines().any(|line| is(line, 1, "00") && is(line, 0, &"0".repeat(32)) && !is(line, 9, "lo"))
}

/// The first name server in a `resolv.conf` that a guest can reach too.
fn usable_server(text: &str) -> Option<IpAddr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|server| server.trim().parse::<IpAddr>().ok()).find(|server| !server.is_loopback())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_way_out_is_told_from_none() {
        let head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n";
        let out = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        let near = "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert!(has_default_route(&format!("{head}{near}{out}"), ""));
        assert!(!has_default_route(&format!("{head}{near}"), ""));
        let zeros = "0".repeat(32);
        let six = |device: &str| format!("{zeros} 00 {zeros} 00 {zeros} 00000400 1 0 00000003 {device}\n");
        assert!(has_default_route("", &six("   eth0")));
        assert!(!has_default_route("", &six("     lo")));
    }

    #[test]
    fn name_servers_of_the_host_alone_are_no_good_to_a_guest() {
        assert_eq!(usable_server("# x\nnameserver 127.0.0.53\noptions edns0\n"), None);
        let two = "search a\nnameserver ::1\nnameserver 192.0.2.53\nnameserver 192.0.2.54\n";
        assert_eq!(usable_server(two), "192.0.2.53".parse().ok());
    }

    #[test]
    fn forwards_and_names_are_handed_on() {
        let user = UserNet {
            forwards: ["tcp:8080:80", "udp:127.0.0.1:53:5353", "tcp:[::1]:1:2"]
                .map(|text| text.parse().unwrap())
                .into(),
            loopback: false,
            dns: "9.9.9.9".parse().ok(),
        };
        let line = arguments(&user, 1500, 7).join(" ");
        for part in [
            "--tcp-ports 8080:80",
            "--udp-ports 127.0.0.1/53:5353",
            "--tcp-ports ::1/1:2",
            "--dns 9.9.9.9",
            "--fd 7",
            "--mtu 1500",
            "--no-map-gw",
        ] {
            assert!(line.contains(part), "{line}");
        }
        let line = arguments(&UserNet { loopback: true, ..user }, 1500, 7).join(" ");
        assert!(!line.contains("--no-map-gw"));
    }

    /// Debian's.
    fn is_installed() -> bool {
        let there = ["/usr/bin/passt", "/bin/passt"].iter().any(|path| std::path::Path::new(path).exists());
        if !there {
            eprintln!("passt is not installed");
        }
        there
    }

    #[test]
    fn it_answers_and_ends_with_its_socket() {
        if !is_installed() {
            return;
        }
        let passt = start(&UserNet::default(), MTU).unwrap();
        let mut socket = UnixStream::from(passt.socket);
        // Who has 10.0.2.2? (RFC 826)
        let (mac, here, gateway) = ([0x52, 0x54, 0, 1, 2, 3], [10, 0, 2, 15], [10, 0, 2, 2]);
        let request =
            [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &here, &[0; 6], &gateway].concat();
        // In one piece: passt of Debian 12 forgets a length that comes by itself.
        socket.write_all(&[&(request.len() as u32).to_be_bytes(), &request[..]].concat()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reply = [0; 46];
        socket.read_exact(&mut reply).unwrap();
        assert_eq!(
            (&reply[..4], &reply[4..10], &reply[32..36]),
            (&[0, 0, 0, 42][..], &mac[..], &gateway[..])
        );
        drop(socket);
        let begun = Instant::now();
        while !passt.helper.has_ended().unwrap() {
            assert!(begun.elapsed() < PATIENCE, "it stays");
            thread::sleep(LOOK_AGAIN);
        }
    }

    #[test]
    fn a_port_that_is_taken_is_told() {
        if !is_installed() {
            return;
        }
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let forwards = vec![format!("tcp:127.0.0.1:{port}:80").parse().unwrap()];
        let error = start(&UserNet { forwards, ..UserNet::default() }, MTU).map(drop).unwrap_err();
        assert!(matches!(error, PasstError::Ended(_)), "{error}");
        assert!(error.to_string().contains(&port.to_string()), "{error}");
    }
}
