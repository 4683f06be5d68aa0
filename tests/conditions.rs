//! `ballast run` where it is short of what a VM takes, or nobody reads what it says. However it ends then, it
//! does so by itself, with a documented code and a sentence, and leaves no socket behind.
//!
//! The guest is a few instructions that reset the machine, so that a VM comes to its end at once if it is
//! started at all.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use guests::{Host, ballast, wait_for};
use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{Resource, Rlimit, setrlimit};

/// The codes of `ballast run --help`.
const DOCUMENTED: [i32; 9] = [0, 1, 2, 3, 10, 11, 12, 13, 14];
/// What the guest asks for.
const REBOOT: i32 = 10;
/// How long one VM takes in an emulated host.
const RUN: Duration = Duration::from_secs(10);

/// An ELF with a PVH note whose code pulses the reset line of the keyboard controller.
fn kernel() -> Vec<u8> {
    const CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 24;
    let (load, code) = (0x10_0000_u64, HEADERS + NOTE);
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    elf.extend([load + code, 64, 0].map(u64::to_le_bytes).concat()); // entry, program headers, no sections
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]); // sizes; two program headers
    for (kind, from, length) in [(1_u32, 0, code + CODE.len() as u64), (4, HEADERS, NOTE)] {
        elf.extend([kind, 7].map(u32::to_le_bytes).concat());
        elf.extend([from, load + from, load + from, length, length, 4].map(u64::to_le_bytes).concat());
    }
    elf.extend([4, 8, 18].map(u32::to_le_bytes).concat()); // XEN_ELFNOTE_PHYS32_ENTRY
    elf.extend(b"Xen\0");
    elf.extend((load + code).to_le_bytes());
    elf.extend(CODE);
    elf
}

/// What came of a VM.
struct Ended {
    what: String,
    status: ExitStatus,
    said: String,
}

impl Ended {
    /// # Panics
    /// Where it did not end as it may.
    fn check(&self) -> &Self {
        let Self { what, status, said } = self;
        assert!(!said.contains("panicked at"), "{what}: {said}");
        assert!(status.code().is_some_and(|code| DOCUMENTED.contains(&code)), "{what}: {status}: {said}");
        assert!(said.lines().count() < 12, "{what}: {status}: {said}");
        self
    }

    fn has_run(&self) -> bool {
        self.status.code() == Some(REBOOT)
    }
}

/// Runs the guest after `befall` has had its way with the command. Standard error is read where that left it alone.
fn run(what: impl ToString, directory: &Path, befall: impl FnOnce(&mut Command)) -> Ended {
    let (what, runtime) = (what.to_string(), directory.join("run"));
    let mut command = Command::new(ballast());
    let file = directory.join("kernel");
    command.arg("run").arg("--kernel").arg(file).args(["--name", "vm", "--memory", "64M"]);
    command.env("BALLAST_RUNTIME_DIR", &runtime).stdin(Stdio::null()).stdout(Stdio::null());
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    command.stderr(write);
    befall(&mut command);
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
    // The other end of the pipe stays with the VM alone.
    drop(command);
    let reading = thread::spawn(move || {
        let mut said = Vec::new();
        File::from(read).read_to_end(&mut said).map(|_| String::from_utf8_lossy(&said).into_owned())
    });
    let status = wait_for(&format!("the end of {what}"), RUN, || child.try_wait().unwrap());
    let said = reading.join().unwrap().unwrap();
    println!("{what}: {status}: {}", said.lines().last().unwrap_or_default());
    let left: Vec<_> =
        fs::read_dir(&runtime).into_iter().flatten().map(|left| left.unwrap().path()).collect();
    assert!(left.is_empty(), "{what} left {left:?} behind: {said}");
    Ended { what, status, said }
}

fn limit(command: &mut Command, resource: Resource, most: u64) {
    let limit = Rlimit { current: Some(most), maximum: Some(most) };
    // SAFETY: one system call.
    unsafe { command.pre_exec(move || Ok(setrlimit(resource, limit)?)) };
}

fn close(command: &mut Command, fd: i32) {
    // SAFETY: one system call; nobody uses the stream before the program begins.
    unsafe {
        command.pre_exec(move || {
            rustix::io::close(fd);
            Ok(())
        })
    };
}

/// A small pipe with no room left.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setpipe_size(&write, 4096).unwrap();
    let flags = rustix::fs::fcntl_getfl(&write).unwrap();
    rustix::fs::fcntl_setfl(&write, flags | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&write, &[b'x'; 512]).is_ok() {}
    rustix::fs::fcntl_setfl(&write, flags).unwrap();
    (read, write)
}

/// A directory with the kernel in it.
fn place() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("kernel"), kernel()).unwrap();
    directory
}

#[test]
#[ignore = "some seventy VMs: make test-long"]
fn a_vm_that_is_short_of_something_says_so_and_leaves_nothing() {
    Host::new().usually(Duration::from_secs(240)).run(|| {
        let place = place();
        assert!(run("a VM", place.path(), |_| ()).check().has_run());
        // As many as it is born with and no more, up to where it has all that it takes.
        let descriptors = (3..128).take_while(|&most| {
            let befall = |command: &mut Command| limit(command, Resource::Nofile, most);
            !run(format!("{most} descriptors"), place.path(), befall).check().has_run()
        });
        let few = descriptors.count();
        assert!((5..125).contains(&few), "{few}");
        // From less than the guest's memory to room for all that there is beside it.
        let memory = (40..400).step_by(8).take_while(|&mib| {
            let befall = |command: &mut Command| limit(command, Resource::As, mib << 20);
            let ended = run(format!("{mib} MiB of address space"), place.path(), befall);
            // No program begins with so little, or nothing is left for its heap.
            let signal = ended.status.signal();
            let nothing_left = signal == Some(libc::SIGSEGV) && ended.said.is_empty()
                || signal == Some(libc::SIGABRT) && ended.said.contains("memory allocation of");
            nothing_left || !ended.check().has_run()
        });
        assert!((1..45).contains(&memory.count()));
    });
}

#[test]
fn a_vm_runs_whoever_reads_what_it_says() {
    Host::new().usually(Duration::from_secs(60)).run(|| {
        let place = place();
        let full = || OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        for fd in 0..3 {
            let closed = run(format!("stream {fd} closed"), place.path(), |command| close(command, fd));
            assert!(closed.check().has_run());
            let filled = run(format!("stream {fd} full"), place.path(), |command| {
                match fd {
                    0 => command.stdin(full()),
                    1 => command.stdout(full()),
                    _ => command.stderr(full()),
                };
            });
            assert!(filled.check().has_run());
        }
        for fd in 1..3 {
            let (read, write) = full_pipe();
            let stalled = run(format!("stream {fd} stalled"), place.path(), |command| {
                if fd == 1 {
                    command.stdout(write)
                } else {
                    command.stderr(write)
                };
            });
            assert!(stalled.check().has_run());
            drop(read);
        }
        // The sandbox hands its filter over in a file in memory.
        run("files that may not grow", place.path(), |command| limit(command, Resource::Fsize, 0)).check();
        let ignored = run("signals ignored", place.path(), |command| {
            let ignore = || {
                for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE, libc::SIGXFSZ] {
                    // SAFETY: no handler is set.
                    unsafe { libc::signal(signal, libc::SIG_IGN) };
                }
                Ok(())
            };
            // SAFETY: system calls alone.
            unsafe { command.pre_exec(ignore) };
        });
        assert!(ignored.check().has_run());
    });
}
