//! Guests with networks: at a tap of the host, and behind passt.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use guests::{Host, Vm, VmSettings, ballast, images, leave_the_first_root, wait_for};
use lab::Kernel;

/// How long a step with a network takes.
const WORKING: Duration = Duration::from_secs(30);
/// Bytes that go each way.
const BYTES: usize = 3 << 20;

fn guest(kernel: Kernel, transport: &str, net: &str) -> Vm {
    guest_with(kernel, &["--transport", transport, "--net", net])
}

fn guest_with(kernel: Kernel, arguments: &[&str]) -> Vm {
    let images = images(kernel);
    let mut settings = VmSettings::new("networks", &images, "256M", "ballast.console");
    settings.initrd = kernel.net_initrd().expect("it was made");
    let mut vm = settings.with(arguments).start();
    vm.wait_until_ready();
    vm
}

/// A command of the host's shell; what it says.
fn host(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().expect("the host has a shell");
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// A tap that stays, for anybody.
fn make_tap(name: &str) {
    let file = File::options().read(true).write(true).open("/dev/net/tun").expect("the module tun is loaded");
    // SAFETY: a request of zeros is one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the kernel reads and writes one request, then takes a number.
    let result = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request)
            | libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Puts a file of this content into a directory that the host serves at `address`, and gives its hash.
fn serve(address: &str) -> String {
    fs::create_dir_all("/tmp/www").expect("a directory");
    let bytes: Vec<u8> = (0..BYTES as u64 / 8)
        .flat_map(|place| place.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect();
    fs::write("/tmp/www/file", bytes).expect("it fits");
    host(&format!("httpd -p {address} -h /tmp/www"));
    hash("cat /tmp/www/file")
}

/// The hash of what a command of the host says.
fn hash(command: &str) -> String {
    host(&format!("{command} | sha256sum")).split_whitespace().next().expect("a hash").to_owned()
}

/// The guest fetches the file and looks whether it is the right one.
fn fetch(vm: &mut Vm, from: &str, hash: &str) {
    vm.step(&format!("run:wget -q -O /tmp/file http://{from}/file"), WORKING);
    vm.step(&format!("run:echo '{hash}  /tmp/file' | sha256sum -c"), WORKING);
}

/// Where the VM listens for programs that ask for ports of the guest.
const VSOCK_SOCKET: &str = "/tmp/vm.vsock";
/// Where a program of the host serves the guest.
const SERVED: &str = "/tmp/vm.vsock_1024";

/// Says back what each says who connects to the socket at `path`.
fn echo_at(path: &str) {
    let listener = UnixListener::bind(path).expect("a socket");
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut to = client.try_clone().expect("a descriptor");
                let _ = io::copy(&mut &client, &mut to);
                let _ = client.shutdown(Shutdown::Write);
            });
        }
    });
}

/// Programs of the guest and the host speak to each other without a network, whoever calls.
fn speaks_by_sockets(vm: &mut Vm) {
    vm.step("vsock-send:1024:3M", WORKING);
    vm.type_in("vsock-send:1025:1K\n");
    vm.wait_for_line("ERROR connect: Connection reset by peer", WORKING);
    vm.step("vsock-echo:5000", WORKING);
    let call = |port: &str, said: &[u8]| {
        let mut command = Command::new(ballast());
        command.args(["vsock", "networks", port]);
        let mut call = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ballast");
        let mut stdin = call.stdin.take().expect("it is piped");
        let said = said.to_vec();
        thread::spawn(move || drop(stdin.write_all(&said)));
        call.wait_with_output().expect("it ends")
    };
    let said: Vec<u8> = (0..BYTES).map(|place| (place * 7 % 253) as u8).collect();
    let answer = call("5000", &said);
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    assert!(answer.stdout == said, "{} of {BYTES} bytes came back", answer.stdout.len());
    speaks_as_with_firecracker();
    let refused = call("5001", b"");
    let sentence = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{sentence}");
    assert!(sentence.contains("the guest refused port 5001"), "{sentence}");
}

/// The guest echoes at port 5000, and nobody listens at port 5001.
fn speaks_as_with_firecracker() {
    let ask = |line: &str| {
        let stream = UnixStream::connect(VSOCK_SOCKET).expect("the VM listens");
        stream.set_read_timeout(Some(WORKING * 10)).expect("a time");
        (&stream).write_all(line.as_bytes()).expect("it is taken");
        stream
    };
    let stream = ask("CONNECT 5000\nhello\n");
    let mut lines = BufReader::new(&stream).lines();
    let answer = lines.next().expect("an answer").expect("text");
    assert!(answer.strip_prefix("OK ").is_some_and(|port| port.parse::<u32>().is_ok()), "{answer}");
    assert_eq!(lines.next().expect("the echo").expect("text"), "hello");
    let refused = ask("CONNECT 5001\n");
    assert_eq!((&refused).read(&mut [0]).expect("it ends"), 0);
}

#[test]
fn a_guest_at_a_tap_talks_with_its_host_both_ways() {
    Host::new()
        .net_guest(Kernel::V6_1)
        .net_guest(Kernel::V6_12)
        .modules(&["tun"])
        .usually(Duration::from_secs(120))
        .run(|| {
            make_tap("tap0");
            host("ip addr add 192.0.2.1/24 dev tap0 && ip link set tap0 up");
            let hash_of_file = serve("192.0.2.1:8000");
            echo_at(SERVED);
            for (kernel, transport) in [(Kernel::V6_1, "pci"), (Kernel::V6_12, "mmio")] {
                let net = "tap=tap0,mac=52:54:00:00:00:07";
                let vsock = ["--vsock-socket", VSOCK_SOCKET, "--vsock-serve", "1024"];
                let arguments = [&["--transport", transport, "--net", net], &vsock[..]].concat();
                let mut vm = guest_with(kernel, &arguments);
                speaks_by_sockets(&mut vm);
                vm.step("run:grep 52:54:00:00:00:07 /sys/class/net/eth0/address", WORKING);
                vm.step("run:ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up", WORKING);
                fetch(&mut vm, "192.0.2.1:8000", &hash_of_file);
                vm.step("run:httpd -p 80 -h /tmp", WORKING);
                assert_eq!(hash("wget -q -O - http://192.0.2.2/file"), hash_of_file);
                // Large ones, both ways, with the host's and the guest's fragments.
                host("ping -c 3 -s 20000 192.0.2.2");
                // The driver goes and comes back while the host talks to it.
                vm.step("unbind:virtio_net", WORKING);
                host("ping -c 2 -W 1 192.0.2.2 || true");
                vm.step("bind:virtio_net", WORKING);
                vm.step("run:ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up", WORKING);
                fetch(&mut vm, "192.0.2.1:8000", &hash_of_file);
            }
        });
}

#[test]
fn a_pause_in_the_middle_of_a_transfer_loses_nothing() {
    Host::new().net_guest(Kernel::V6_1).modules(&["tun"]).usually(Duration::from_secs(90)).run(|| {
        make_tap("tap0");
        host("ip addr add 192.0.2.1/24 dev tap0 && ip link set tap0 up");
        let hash_of_file = serve("192.0.2.1:8000");
        let mut vm = guest(Kernel::V6_1, "pci", "tap=tap0");
        vm.step("run:ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up", WORKING);
        for _ in 0..3 {
            vm.type_in("run:wget -q -O /tmp/file http://192.0.2.1:8000/file\n");
            for _ in 0..10 {
                vm.ask(async |client| client.pause().await).expect("it is paused");
                vm.ask(async |client| client.resume().await).expect("it goes on");
            }
            vm.wait_for_line("DONE run:wget", WORKING);
            vm.step(&format!("run:echo '{hash_of_file}  /tmp/file' | sha256sum -c"), WORKING);
        }
    });
}

/// Processes of passt.
fn passts() -> usize {
    let processes = fs::read_dir("/proc").expect("it is mounted").flatten();
    let names = processes.filter_map(|process| fs::read_to_string(process.path().join("comm")).ok());
    names.filter(|name| name.starts_with("passt")).count()
}

/// What the guest has udhcpc do with what it was told.
const ON_LEASE: &str = "#!/bin/sh\\n[ \"$1\" = bound ] || exit 0\\nip addr add $ip/$mask dev $interface\\n\
                        ip route add default via $router\\necho LEASE $ip $router $dns\\n";

#[test]
fn a_guest_has_a_network_without_privileges() {
    let host_with_passt = Host::new().net_guest(Kernel::V6_1).modules(&["dummy"]).passt();
    host_with_passt.usually(Duration::from_secs(120)).run(|| {
        leave_the_first_root();
        // The host's own network.
        host("ip link add net0 type dummy && ip addr add 198.51.100.1/24 dev net0 && ip link set net0 up");
        host("ip route add default via 198.51.100.2");
        let hash_of_file = serve("198.51.100.1:8000");
        let mut vm = guest(Kernel::V6_1, "pci", "user,forward=tcp:127.0.0.1:8080:80,dns=198.51.100.53");
        assert_eq!(passts(), 1);
        vm.step(&format!("run:printf '{ON_LEASE}' >/tmp/lease && chmod +x /tmp/lease"), WORKING);
        vm.step("run:ip link set eth0 up && grep 65520 /sys/class/net/eth0/mtu", WORKING);
        vm.type_in("run:udhcpc -q -n -t 20 -i eth0 -s /tmp/lease\n");
        let lease = vm.wait_for_line("LEASE", WORKING);
        assert!(lease.contains("LEASE 10.0.2.15 10.0.2.2 198.51.100.53"), "{lease}");
        fetch(&mut vm, "198.51.100.1:8000", &hash_of_file);
        vm.step("run:httpd -p 80 -h /tmp", WORKING);
        assert_eq!(hash("wget -q -O - http://127.0.0.1:8080/file"), hash_of_file);
        // The host's own services at its loopback are not the guest's.
        host("httpd -p 127.0.0.1:9000 -h /tmp/www");
        vm.step("run:! wget -q -T 5 -O /dev/null http://10.0.2.2:9000/file", WORKING);

        // passt dies: the guest sees its cable out, and nothing else happens to it.
        // `pidof` names a process once for each of the two names, and the second kill may find it gone.
        host("kill -9 $(pidof passt.avx2 passt | tr ' ' '\\n' | sort -u)");
        vm.wait_for_line("passt has ended", WORKING);
        vm.step("run:grep 0 /sys/class/net/eth0/carrier", WORKING);
        assert_eq!(passts(), 0);
        drop(vm);

        // It ends with its VM, whichever way that goes.
        for kills in [false, true] {
            let mut vm = guest(Kernel::V6_1, "pci", "user");
            assert_eq!(passts(), 1);
            if kills {
                vm.kill();
            } else {
                vm.type_in("end\n");
                assert_eq!(vm.wait_for_end(WORKING), 0);
                assert_eq!(passts(), 0);
            }
            wait_for("the end of passt", WORKING, || (passts() == 0).then_some(()));
        }
    });
}

/// A VM beside others, of this name.
fn neighbour(name: &str, arguments: &[&str]) -> Vm {
    let mut settings = VmSettings::new(name, &images(Kernel::V6_1), "256M", "ballast.console");
    settings.initrd = Kernel::V6_1.net_initrd().expect("it was made");
    let mut vm = settings.with(arguments).start();
    vm.wait_until_ready();
    vm
}

/// Taps that ballast has made.
fn taps() -> usize {
    let interfaces = fs::read_dir("/sys/class/net").expect("it is mounted").flatten();
    interfaces.filter(|interface| interface.file_name().to_string_lossy().starts_with("ballast")).count()
}

#[test]
fn guests_in_a_bridge_reach_each_other() {
    Host::new().net_guest(Kernel::V6_1).modules(&["tun", "bridge"]).usually(Duration::from_secs(120)).run(
        || {
            host("ip link add br0 type bridge && ip addr add 192.0.2.1/24 dev br0 && ip link set br0 up");
            let mut vms: Vec<_> = ["one", "two"].map(|name| neighbour(name, &["--net", "bridge=br0"])).into();
            assert_eq!(taps(), 2);
            for (vm, address) in vms.iter_mut().zip(["192.0.2.2/24", "192.0.2.3/24"]) {
                vm.step(&format!("run:ip addr add {address} dev eth0 && ip link set eth0 up"), WORKING);
            }
            let mut two = vms.pop().expect("two");
            let mut one = vms.pop().expect("one");
            one.step("run:ping -c 3 -s 20000 192.0.2.3", WORKING);
            two.step("run:ping -c 3 192.0.2.1", WORKING);
            assert_eq!(one.status().nets[0].backend, "bridge=br0");
            // Each tap goes with its VM, whichever way that ends.
            one.kill();
            wait_for("the end of a tap", WORKING, || (taps() == 1).then_some(()));
            two.type_in("end\n");
            assert_eq!(two.wait_for_end(WORKING), 0);
            assert_eq!(taps(), 0);
        },
    );
}

/// Open descriptors of a VM's process.
fn descriptors(vm: &Vm) -> usize {
    fs::read_dir(format!("/proc/{}/fd", vm.status().pid)).expect("it runs").count()
}

/// A guest whose network and sockets are busy is paused and resumed, its drivers go and come back, and then it is
/// stopped: so many times, and nothing is left.
fn rounds(count: usize) {
    make_tap("tap0");
    host("ip addr add 192.0.2.1/24 dev tap0 && ip link set tap0 up");
    echo_at(SERVED);
    let arguments = ["--net", "tap=tap0", "--vsock-socket", VSOCK_SOCKET, "--vsock-serve", "1024"];
    let mut vm = neighbour("rounds", &arguments);
    vm.step("vsock-echo:5000", WORKING);
    let mut traffic = Command::new("sh")
        .args(["-c", "while :; do ping -A -q -w 5 -W 1 -s 1400 192.0.2.2; sleep 0.1; done >/dev/null 2>&1"])
        .spawn()
        .expect("the host has a shell");
    let mut before = None;
    for _ in 0..count {
        vm.step("run:ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up", WORKING);
        vm.step("run:ping -c 1 -W 10 192.0.2.1", WORKING);
        vm.type_in("vsock-send:1024:256K\n");
        for _ in 0..3 {
            vm.ask(async |client| client.pause().await).expect("it is paused");
            vm.ask(async |client| client.resume().await).expect("it goes on");
        }
        vm.wait_for_line("DONE vsock-send", WORKING);
        vm.step("unbind:virtio_net", WORKING);
        vm.step("bind:virtio_net", WORKING);
        // Connections of the last round may not be closed yet.
        let most = *before.get_or_insert_with(|| descriptors(&vm));
        wait_for("descriptors to be closed", WORKING, || (descriptors(&vm) <= most).then_some(()));
    }
    vm.step("run:ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up", WORKING);
    vm.step("run:ping -c 1 -W 10 192.0.2.1", WORKING);
    vm.type_in("end\n");
    assert_eq!(vm.wait_for_end(WORKING), 0);
    assert!(!fs::exists(VSOCK_SOCKET).expect("it can be looked for"), "its socket has gone");
    let _ = traffic.kill();
    let _ = traffic.wait();
}

#[test]
fn a_busy_guest_loses_and_leaves_nothing() {
    Host::new()
        .net_guest(Kernel::V6_1)
        .modules(&["tun"])
        .usually(Duration::from_secs(120))
        .run(|| rounds(20));
}

#[test]
#[ignore = "takes an hour"]
fn a_busy_guest_loses_and_leaves_nothing_200_times() {
    Host::new()
        .net_guest(Kernel::V6_1)
        .modules(&["tun"])
        .usually(Duration::from_secs(1200))
        .run(|| rounds(200));
}
