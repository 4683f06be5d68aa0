//! What a process can do inside the sandbox, seen from inside: each test runs itself again as a
//! child, because nobody leaves a sandbox.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, io, ptr};

use devices::sandbox::{Call, SandboxNeeds};
use vmm::sandbox;

/// Tells the child that it is one, and where it may remove files.
const DIRECTORY: &str = "SANDBOX_TEST_DIRECTORY";

/// Runs `inside` in a child of this test, `test`, with a directory that it may tidy up.
fn in_child(test: &str, inside: fn(&Path)) {
    if let Some(directory) = env::var_os(DIRECTORY) {
        inside(&PathBuf::from(directory));
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let output = Command::new(env::current_exe().expect("this program has a path"))
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(DIRECTORY, directory.path())
        .output()
        .expect("the child starts");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("1 passed"), "the child ran the test: {text}");
}

fn assert_kept_back<T>(what: &str, result: io::Result<T>) {
    match result {
        Ok(_) => panic!("{what} is possible"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}"),
    }
}

/// Maps a page with `protection`.
fn map(protection: libc::c_int) -> io::Result<()> {
    // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that is there.
    let page = unsafe {
        libc::mmap(ptr::null_mut(), 4096, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping was just made, is of this length and nobody else knows it.
    unsafe { libc::munmap(page, 4096) };
    Ok(())
}

#[test]
fn files_are_out_of_reach() {
    in_child("files_are_out_of_reach", |directory| {
        let (own, foreign) = (directory.join("own"), env::temp_dir().join("sandbox-test-foreign"));
        fs::write(&own, "x").unwrap();
        sandbox::close_files(&SandboxNeeds { remove: vec![directory.to_owned()], ..SandboxNeeds::default() })
            .unwrap();

        let mut smaps = String::new();
        File::open("/proc/self/smaps").unwrap().read_to_string(&mut smaps).unwrap();
        assert!(smaps.contains("[stack]"), "its own memory can be counted");
        assert_kept_back("reading a user's files", fs::read("/etc/passwd"));
        assert_kept_back("reading another process", fs::read("/proc/1/maps"));
        assert_kept_back("making a file", File::create(foreign));
        assert_kept_back("overwriting a file", File::create(&own));
        assert_kept_back("reading even there", fs::read(&own));
        fs::remove_file(&own).expect("its own socket goes with it");
    });
}

#[test]
fn a_device_reads_its_files_and_no_others() {
    in_child("a_device_reads_its_files_and_no_others", |directory| {
        let (image, other) = (directory.join("image"), directory.join("other"));
        fs::write(&image, "x").unwrap();
        fs::write(&other, "x").unwrap();
        sandbox::close_files(&SandboxNeeds { read: vec![image.clone()], ..SandboxNeeds::default() }).unwrap();
        assert_eq!(fs::read(&image).unwrap(), b"x");
        assert_kept_back("reading beside it", fs::read(&other));
        assert_kept_back("writing it", File::create(&image));
    });
}

#[test]
fn a_device_makes_its_calls_and_no_others() {
    in_child("a_device_makes_its_calls_and_no_others", |directory| {
        let file = File::create(directory.join("file")).unwrap();
        let (fd, end) = (file.as_raw_fd(), UnixStream::pair().unwrap().0);
        let answer = |result: i64| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        // SAFETY: calls without pointers.
        let sync = || answer(unsafe { libc::syscall(libc::SYS_fdatasync, fd) });
        // SAFETY: as above.
        let sync_all = || answer(unsafe { libc::syscall(libc::SYS_fsync, fd) });
        // SAFETY: the request reads one number.
        let request = |request| answer(unsafe { libc::ioctl(end.as_raw_fd(), request, &0) }.into());
        let calls = [Call::any(libc::SYS_fdatasync), Call::ioctl(libc::FIOASYNC)];
        sandbox::close_calls(&calls).unwrap();
        sync().expect("it said that it does");
        request(libc::FIOASYNC).expect("it said that it does");
        assert_kept_back("another call", sync_all());
        assert_kept_back("another request", request(0x8901));
        request(libc::FIONBIO).expect("each VM does");
    });
}

#[test]
fn calls_are_those_of_a_running_vm() {
    in_child("calls_are_those_of_a_running_vm", |directory| {
        let path = directory.join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        let worker = std::thread::spawn(std::thread::park);
        sandbox::close_calls(&[]).unwrap();

        client.write_all(b"x").expect("open sockets work");
        let (mut served, _) = listener.accept().expect("clients are served");
        let mut byte = [0; 1];
        served.read_exact(&mut byte).unwrap();
        map(libc::PROT_READ | libc::PROT_WRITE).expect("memory can be had");
        File::open("/proc/self/smaps").expect("seccomp leaves reading to Landlock");
        worker.thread().unpark();
        worker.join().expect("threads end");

        assert_kept_back("running a program", Command::new("/bin/true").status());
        assert_kept_back("calling out", TcpStream::connect("127.0.0.1:9"));
        assert_kept_back("listening", TcpListener::bind("127.0.0.1:0"));
        assert_kept_back("a daemon's socket", UnixStream::connect(&path));
        assert_kept_back("new code", map(libc::PROT_READ | libc::PROT_EXEC));
        assert_kept_back("making a file", File::create(directory.join("new")));
        assert_kept_back("changing a file", File::options().write(true).open("/dev/null"));
        // SAFETY: signal 0 only asks whether the process could be signalled.
        let signalled = unsafe { libc::syscall(libc::SYS_kill, 1, 0) };
        assert_kept_back(
            "signals to others",
            if signalled == 0 { Ok(()) } else { Err(io::Error::last_os_error()) },
        );
    });
}

/// A socket's owner is sent a signal of one's choice when something comes: a kill(2) by other means.
#[test]
fn no_descriptor_sends_signals() {
    in_child("no_descriptor_sends_signals", |_| {
        let (socket, _other) = UnixStream::pair().unwrap();
        let fd = socket.as_raw_fd();
        sandbox::close_calls(&[]).unwrap();

        let answer =
            |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
        // SAFETY: no command below takes a pointer.
        let control = |command, value: libc::c_int| answer(unsafe { libc::fcntl(fd, command, value) });
        // SAFETY: the requests below read one number.
        let request = |request, value: libc::c_int| answer(unsafe { libc::ioctl(fd, request, &value) });
        const F_SETSIG: libc::c_int = 10;
        const F_SETOWN_EX: libc::c_int = 15;
        const FIOSETOWN: libc::Ioctl = 0x8901;
        const SIOCSPGRP: libc::Ioctl = 0x8902;
        assert_kept_back("an owner", control(libc::F_SETOWN, 1));
        assert_kept_back("an owner's thread", control(F_SETOWN_EX, 0));
        assert_kept_back("a signal", control(F_SETSIG, libc::SIGKILL));
        assert_kept_back("signals", control(libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK));
        assert_kept_back("signals by request", request(libc::FIOASYNC, 1));
        assert_kept_back("an owner by request", request(FIOSETOWN, 1));
        assert_kept_back("a group by request", request(SIOCSPGRP, 1));

        control(libc::F_SETFL, libc::O_NONBLOCK).expect("reads need not wait");
        assert_ne!(control(libc::F_GETFL, 0).expect("flags") & libc::O_NONBLOCK, 0);
        control(libc::F_SETFD, libc::FD_CLOEXEC).expect("a flag");
        control(libc::F_GETFD, 0).expect("a flag");
        socket.try_clone().expect("one more");
    });
}
