//! Bytes through the console of a real guest, both ways: none is lost, and none is stuck.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guests::{BOOT, Host, ballast, images, wait_for};
use lab::Kernel;

/// How long any transfer but the long ones may take in an emulated host.
const TRANSFER: Duration = Duration::from_secs(20);
/// How much Linux's terminal keeps to echo while its output waits, with room to spare: it drops echoes beyond
/// 4096 bytes (drivers/tty/n_tty.c, N_TTY_BUF_SIZE), whatever the port does.
const MOST_ECHOED: usize = 2048;

/// How many bytes of a long transfer are told of at a time.
const TOLD: usize = 500_000;

/// A VM whose console is a socket, and its client.
struct Vm {
    child: Child,
    console: UnixStream,
    patience: Duration,
    /// When the transfer under way began.
    begun: Instant,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    fn start(name: &str, patience: Duration) -> Self {
        let images = images(Kernel::V6_1);
        let socket = PathBuf::from(format!("/tmp/{name}.console"));
        let mut command = Command::new(ballast());
        command.args(["run", "--memory", "192M", "--name", name]);
        command.arg("--kernel").arg(&images.bzimage).arg("--initrd").arg(&images.initrd);
        command.args(["--cmdline", "console=ttyS0 panic=-1 quiet ballast.console"]);
        command.arg("--console").arg(format!("socket:{}", socket.display()));
        let child = command.stdin(Stdio::null()).spawn().expect("ballast can be run");
        let mut vm = Self { child, console: connect(&socket), patience, begun: Instant::now() };
        vm.read_until("READY", BOOT);
        vm.read_until("\n", BOOT);
        vm
    }

    fn read(&mut self, buffer: &mut [u8], usually: Duration) -> usize {
        // Ten times that, as every wait in the lab.
        self.console.set_read_timeout(Some(usually * 10)).expect("a time");
        self.console.read(buffer).expect("something comes")
    }

    /// Everything up to `text`, and no more.
    fn read_until(&mut self, text: &str, usually: Duration) -> String {
        let mut all = Vec::new();
        while !all.ends_with(text.as_bytes()) {
            let mut byte = [0];
            assert_eq!(self.read(&mut byte, usually), 1, "the VM has ended");
            all.push(byte[0]);
        }
        String::from_utf8_lossy(&all).into_owned()
    }

    fn begin(&mut self, order: &str) {
        self.console.write_all(format!("{order}\n").as_bytes()).expect("it listens");
        // Behind the order's own echo.
        self.read_until("GO\n", TRANSFER);
        self.begun = Instant::now();
    }

    /// Reads the next `count` of the bytes that are `expected`.
    fn assert_reads(&mut self, count: usize, mut expected: impl Iterator<Item = u8>, what: &str) {
        let mut buffer = vec![0; 64 << 10];
        let mut place = 0;
        while place < count {
            let most = buffer.len().min(count - place);
            let read = self.read(&mut buffer[..most], self.patience);
            assert!(read > 0, "the VM has ended");
            for (place, byte) in (place..).zip(&buffer[..read]) {
                assert_eq!(Some(*byte), expected.next(), "byte {place} of {what}");
            }
            if (place + read) / TOLD > place / TOLD {
                println!("{what}: {} bytes in {:?}", place + read, self.begun.elapsed());
            }
            place += read;
        }
    }

    fn assert_done(&mut self, order: &str) {
        let answer = self.read_until("\n", self.patience);
        assert_eq!(answer.trim(), format!("DONE {order}"));
        println!("{order}: done in {:?}", self.begun.elapsed());
    }

    /// Bytes into the guest.
    fn take(&mut self, count: usize, seed: u64) {
        let order = format!("take:{count}:{seed}");
        self.begin(&order);
        let mut console = self.console.try_clone().expect("a descriptor");
        let all: Vec<u8> = bytes(seed).take(count).collect();
        let writes = thread::spawn(move || console.write_all(&all));
        self.assert_done(&order);
        writes.join().expect("it ends").expect("it listens");
    }

    /// Bytes into the guest that come back as its terminal's echo.
    fn take_with_echo(&mut self, count: usize, seed: u64) {
        let order = format!("take:{count}:{seed}:echo");
        self.begin(&order);
        let all: Vec<u8> = bytes(seed).take(count).collect();
        for piece in all.chunks(MOST_ECHOED) {
            self.console.write_all(piece).expect("it listens");
            self.assert_reads(piece.len(), piece.iter().copied(), &order);
        }
        self.assert_done(&order);
    }

    /// Bytes out of the guest, to a client who does not read for a while.
    fn give(&mut self, count: usize, seed: u64, pause: Duration) {
        let order = format!("give:{count}:{seed}");
        self.begin(&order);
        thread::sleep(pause);
        self.assert_reads(count, bytes(seed), &order);
        self.assert_done(&order);
    }

    fn end(mut self) {
        self.console.write_all(b"end\n").expect("it listens");
        let status = wait_for("the end of ballast", BOOT, || self.child.try_wait().expect("it is ours"));
        assert_eq!(status.code(), Some(0));
    }
}

fn connect(socket: &Path) -> UnixStream {
    wait_for("the console's socket", BOOT, || UnixStream::connect(socket).ok())
}

/// The bytes of a seed, as the guest knows them.
fn bytes(seed: u64) -> impl Iterator<Item = u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    for _ in 0..8 {
        next();
    }
    std::iter::from_fn(move || Some(next().to_le_bytes())).flatten()
}

#[test]
fn bytes_go_through_the_console_whole() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(90)).run(|| {
        let mut vm = Vm::start("bytes", TRANSFER);
        // Around what a driver takes at a time, and what a port holds.
        for size in
            [1, 15, 17, 63, 65, 255, 256, 257, 266, 300, 319, 321, 511, 513, 600, 1025, 4095, 4097, 9000]
        {
            vm.take(size, size as u64);
        }
        for size in [266, 4097, 60_000] {
            vm.take_with_echo(size, size as u64);
        }
        vm.take(100_000, 1);
        vm.give(100_000, 2, Duration::ZERO);
        vm.give(100_000, 3, Duration::from_secs(2));
        vm.end();
    });
}

#[test]
#[ignore = "takes some minutes for each of its 30 MB"]
fn ten_megabytes_go_each_way() {
    const COUNT: usize = 10_000_000;
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(1200)).run(|| {
        let mut vm = Vm::start("megabytes", Duration::from_secs(600));
        vm.give(COUNT, 1, Duration::from_secs(2));
        vm.take(COUNT, 2);
        vm.take_with_echo(COUNT, 3);
        vm.end();
    });
}
