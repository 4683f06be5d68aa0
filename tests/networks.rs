//! Guests with networks: at a tap of the host, and behind passt.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use guests::{Host, Vm, VmSettings, images, leave_the_first_root, wait_for};
use lab::Kernel;

/// How long a step with a network takes.
const WORKING: Duration = Duration::from_secs(30);
/// Bytes that go each way.
const BYTES: usize = 3 << 20;

fn guest(kernel: Kernel, transport: &str, net: &str) -> Vm {
    let images = images(kernel);
    let mut settings = VmSettings::new("networks", &images, "256M", "ballast.console");
    settings.initrd = images.net_initrd;
    let mut vm = settings.with(&["--transport", transport, "--net", net]).start();
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

#[test]
fn a_guest_at_a_tap_talks_with_its_host_both_ways() {
    Host::new()
        .guest(Kernel::V6_1)
        .guest(Kernel::V6_12)
        .modules(&["tun"])
        .usually(Duration::from_secs(120))
        .run(|| {
            make_tap("tap0");
            host("ip addr add 192.0.2.1/24 dev tap0 && ip link set tap0 up");
            let hash_of_file = serve("192.0.2.1:8000");
            for (kernel, transport) in [(Kernel::V6_1, "pci"), (Kernel::V6_12, "mmio")] {
                let mut vm = guest(kernel, transport, "tap=tap0,mac=52:54:00:00:00:07");
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
    Host::new().guest(Kernel::V6_1).modules(&["tun"]).usually(Duration::from_secs(90)).run(|| {
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
    let host_with_passt = Host::new().guest(Kernel::V6_1).modules(&["dummy"]).passt();
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
        host("kill -9 $(pidof passt.avx2 passt)");
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
