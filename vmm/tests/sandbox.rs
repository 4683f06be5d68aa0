//! What a process can do inside the sandbox, seen from inside: each test runs itself again as a
//! child, because nobody leaves a sandbox.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use std::{env, io, ptr};

use api::units::Bytes;
use devices::sandbox::{Call, SandboxNeeds};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use tempfile::TempDir;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::api_server::Server;
use vmm::config::{Backing, Cpus, MemoryOptions};
use vmm::control::Control;
use vmm::memory::Ram;
use vmm::sandbox;

/// Tells the child that it is one, and where it may leave files.
const DIRECTORY: &str = "SANDBOX_TEST_DIRECTORY";

/// Runs `inside` in a child of this test, `test`, with a directory that is there afterwards, and what the child
/// said on standard error. `None` in the child.
fn in_child(test: &str, inside: fn(&Path)) -> Option<(TempDir, String)> {
    if let Some(directory) = env::var_os(DIRECTORY) {
        inside(&PathBuf::from(directory));
        return None;
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
    Some((directory, String::from_utf8_lossy(&output.stderr).into_owned()))
}

fn needs() -> SandboxNeeds {
    SandboxNeeds::default()
}

fn done(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
        sandbox::close_files(&SandboxNeeds { remove: vec![own.clone()], ..needs() }).unwrap();

        assert_kept_back("reading a user's files", fs::read("/etc/passwd"));
        assert_kept_back("reading another process", fs::read("/proc/1/maps"));
        assert_kept_back("reading its own memory", File::open("/proc/self/mem"));
        assert_kept_back("making a file", File::create(foreign));
        assert_kept_back("overwriting a file", File::create(&own));
        assert_kept_back("reading even there", fs::read(&own));
        fs::remove_file(&own).expect("its own socket goes with it");
    });
}

/// Fails a system call as a kernel does that does not know it, or keeps it for another.
fn without_call(call: libc::c_long, error: libc::c_int) {
    let rules = [(call, Vec::new())].into_iter().collect();
    let (refused, others) = (SeccompAction::Errno(error as u32), SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, others, refused, TargetArch::x86_64).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

fn assert_refuses(needs: &SandboxNeeds) {
    let error = sandbox::close_files(needs).expect_err("files can't be closed").to_string();
    assert!(error.contains("Landlock") && error.contains("--no-sandbox"), "{error}");
}

#[test]
fn no_guest_runs_where_the_kernel_has_no_landlock() {
    in_child("no_guest_runs_where_the_kernel_has_no_landlock", |_| {
        without_call(libc::SYS_landlock_create_ruleset, libc::ENOSYS);
        assert_refuses(&needs());
        sandbox::check().expect_err("`ballast check` says so");
    });
}

#[test]
fn no_guest_runs_where_landlock_is_not_switched_on() {
    in_child("no_guest_runs_where_landlock_is_not_switched_on", |_| {
        without_call(libc::SYS_landlock_create_ruleset, libc::EOPNOTSUPP);
        assert_refuses(&needs());
    });
}

#[test]
fn no_guest_runs_where_landlock_can_not_be_enforced() {
    in_child("no_guest_runs_where_landlock_can_not_be_enforced", |_| {
        without_call(libc::SYS_landlock_restrict_self, libc::E2BIG);
        assert_refuses(&needs());
    });
}

/// Without a wall for files, as Landlock may have a hole.
#[test]
fn calls_reach_no_file_either() {
    in_child("calls_reach_no_file_either", |directory| {
        let (file, path) = (directory.join("file"), directory.join("link"));
        fs::write(&file, "x").unwrap();
        sandbox::close_calls(&needs()).unwrap();
        assert_kept_back("reading a file", File::open(&file));
        assert_kept_back("looking at a file", fs::metadata(&file));
        assert_kept_back("removing a file", fs::remove_file(&file));
        assert_kept_back("moving a file", fs::rename(&file, &path));
        assert_kept_back("another name", fs::hard_link(&file, &path));
        assert_kept_back("a link", std::os::unix::fs::symlink(&file, &path));
        assert_kept_back("a directory's names", fs::read_dir(directory));
    });
}

/// The sockets of all VMs of a user lie in one directory.
#[test]
fn a_vm_removes_its_own_socket_and_no_other() {
    let left = in_child("a_vm_removes_its_own_socket_and_no_other", |directory| {
        let (own, other) = (directory.join("own.sock"), directory.join("other.sock"));
        let server = Server::bind(&own).unwrap();
        let _other = UnixListener::bind(&other).unwrap();
        let needs = SandboxNeeds { remove: vec![own], ..needs() };
        sandbox::close_files(&needs).unwrap();
        sandbox::close_calls(&needs).unwrap();

        let other = CString::new(other.into_os_string().into_vec()).unwrap();
        // SAFETY: a string with its end.
        let remove = |at: *const libc::c_char| done(unsafe { libc::unlinkat(libc::AT_FDCWD, at, 0) }.into());
        assert_kept_back("removing another's", remove(other.as_ptr()));

        // Where the one path lies that may be removed: no other can be put there.
        let at = 1 << 20;
        let kept: *mut libc::c_void = ptr::without_provenance_mut(at);
        let call = |number, arguments: [usize; 6]| {
            let [a, b, c, d, e, f] = arguments;
            // SAFETY: where one of these succeeds the test has failed.
            done(unsafe { libc::syscall(number, a, b, c, d, e, f) })
        };
        let (read_write, page) = ((libc::PROT_READ | libc::PROT_WRITE) as usize, 4096);
        let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        let (fixed, none) = (anonymous | libc::MAP_FIXED as usize, usize::MAX);
        assert_kept_back("writing there", call(libc::SYS_mprotect, [at, page, read_write, 0, 0, 0]));
        assert_kept_back("a mapping there", call(libc::SYS_mmap, [at, page, read_write, fixed, none, 0]));
        let below = at - 16 * page;
        assert_kept_back("one that covers it", call(libc::SYS_mmap, [below, 64 * page, 3, fixed, none, 0]));
        let from_zero = [0, at + page, read_write, fixed, none, 0];
        assert_kept_back("one from address 0 that covers it", call(libc::SYS_mmap, from_zero));
        assert_kept_back("one close by", call(libc::SYS_mmap, [below, page, 3, anonymous, none, 0]));
        assert_kept_back("taking it away", call(libc::SYS_munmap, [at, page, 0, 0, 0, 0]));
        assert_kept_back("taking it away from below", call(libc::SYS_munmap, [below, 64 * page, 0, 0, 0, 0]));
        let mine = vec![0u8; 3 * page];
        let whole = mine.as_ptr() as usize / page * page + page;
        let moves = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize;
        assert_kept_back("moving one there", call(libc::SYS_mremap, [whole, page, page, moves, at, 0]));
        // SAFETY: advice about a mapping that may lose its contents, but for a file behind it.
        let advice = |advice| done(unsafe { libc::madvise(kept, page, advice) }.into());
        advice(libc::MADV_DONTNEED).expect("it is read from its file again");
        assert_kept_back("emptying its file", advice(libc::MADV_REMOVE));
        assert_kept_back("breaking the host's memory", advice(libc::MADV_HWPOISON));

        drop(server);
    });
    if let Some((directory, _)) = left {
        let left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["other.sock"]);
    }
}

/// The sockets of other VMs, of the balancer and of the user's other services are no concern of a guest's.
#[test]
fn a_vm_connects_to_those_who_serve_it_and_to_nobody_else() {
    in_child("a_vm_connects_to_those_who_serve_it_and_to_nobody_else", |directory| {
        let (served, other) = (directory.join("served.sock"), directory.join("other.sock"));
        let listener = UnixListener::bind(&served).unwrap();
        let _other = UnixListener::bind(&other).unwrap();
        let needs = SandboxNeeds { connect: vec![served.clone()], ..needs() };
        sandbox::close_files(&needs).unwrap();
        sandbox::close_calls(&needs).unwrap();

        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let connect = |address: *const libc::c_void, length: usize| {
            // SAFETY: so many bytes lie at the address; the descriptor stays open until the process ends.
            done(
                unsafe {
                    let socket = libc::socket(libc::AF_UNIX, kind, 0);
                    assert!(socket >= 0, "a socket of the one kind can be made");
                    libc::connect(socket, address.cast(), length as libc::socklen_t)
                }
                .into(),
            )
        };
        let address_of = |path: PathBuf| {
            let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
            address.extend(path.into_os_string().into_vec());
            address.push(0);
            address
        };
        let (served, other) = (address_of(served), address_of(other));
        assert_kept_back("another's socket", connect(other.as_ptr().cast(), other.len()));
        assert_kept_back("a path that could be changed", connect(served.as_ptr().cast(), served.len()));
        let kept = ptr::without_provenance(1 << 20);
        assert_kept_back("a part of the path", connect(kept, served.len() - 1));
        connect(kept, served.len()).expect("the one that serves it");
        listener.accept().expect("it came");
        // SAFETY: a string with its end.
        let removed =
            done(unsafe { libc::unlinkat(libc::AT_FDCWD, kept.cast::<libc::c_char>().add(2), 0) }.into());
        assert_kept_back("removing it", removed);
    });
}

/// What somebody outside does: removes the socket, and then its directory, and waits for it each time.
const REMOVE: &str = r#"
there() {
    tries=0
    until [ -S own.sock ]; do
        tries=$((tries + 1)); [ $tries -lt 3000 ] || exit 1; sleep 0.02
    done
}
read go; cd "$0"/run && rm own.sock && there || exit 1
cd "$0" && rm -r run && mkdir run && cd run && there && echo there
"#;

#[test]
fn a_vm_makes_its_own_socket_again_and_no_other() {
    in_child("a_vm_makes_its_own_socket_again_and_no_other", |directory| {
        let own = directory.join("run/own.sock");
        fs::create_dir(directory.join("run")).unwrap();
        let server = Server::bind(&own).unwrap().looking_every(Duration::from_millis(5));
        let limits = "256M".parse().unwrap();
        let control = Arc::new(Control::new("own".parse().unwrap(), Cpus::ONE, limits));
        #[expect(
            clippy::zombie_processes,
            reason = "to wait for it is no call of a VM, and this process ends first"
        )]
        let mut outside = Command::new("sh")
            .args(["-c", REMOVE])
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let needs = SandboxNeeds { remove: vec![own], ..needs() };
        sandbox::close_files(&needs).unwrap();
        std::thread::spawn(move || server.run(&control));
        sandbox::close_calls(&needs).unwrap();

        outside.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let mut said = String::new();
        outside.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said, "there\n");

        let bind = |address: *const libc::sockaddr, length: usize| {
            let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            // SAFETY: no pointers.
            let socket = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
            assert!(socket >= 0, "{}", io::Error::last_os_error());
            // SAFETY: the address has this length; where this succeeds the test has failed.
            done(unsafe { libc::bind(socket, address, length as libc::socklen_t) }.into())
        };
        let mut other = vec![libc::AF_UNIX as u8, 0];
        other.extend_from_slice(directory.join("run/other.sock").as_os_str().as_encoded_bytes());
        other.push(0);
        assert_kept_back("a socket of another name", bind(other.as_ptr().cast(), other.len()));
        let kept = ptr::without_provenance(1 << 20);
        assert_kept_back("a part of its own name", bind(kept, 12));
        assert_kept_back("any name", bind(kept, 2));
        // SAFETY: no pointers.
        let datagrams = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0) };
        assert_kept_back("datagrams", done(datagrams.into()));
    });
}

#[test]
fn the_guests_memory_is_counted_inside() {
    in_child("the_guests_memory_is_counted_inside", |_| {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let ram =
                Ram::new(Bytes::mib(64), MemoryOptions { backing, ..MemoryOptions::default() }).unwrap();
            ram.count().unwrap();
            if backing == Backing::Anonymous {
                continue;
            }
            sandbox::close_files(&needs()).unwrap();
            sandbox::close_calls(&needs()).unwrap();
            ram.guest().write_obj(7u8, GuestAddress(0)).unwrap();
            assert_eq!(ram.held().unwrap().resident, Bytes::kib(4));
        }
    });
}

/// Else nobody would learn that the list lacks a call that a VM makes.
#[test]
fn a_refused_call_is_told_once() {
    let said = in_child("a_refused_call_is_told_once", |_| {
        sandbox::close_calls(&needs()).unwrap();
        for _ in 0..3 {
            // SAFETY: a call without arguments, and one without pointers.
            assert_kept_back("a new session", done(unsafe { libc::setsid() }.into()));
            // SAFETY: as above.
            assert_kept_back("a call of a large number", done(unsafe { libc::syscall(100_000, 0) }));
        }
    });
    if let Some((_, said)) = said {
        let line = format!("ballast: the sandbox refused system call {}.", libc::SYS_setsid);
        assert_eq!(said.matches(&line).count(), 1, "{said}");
    }
}

#[test]
fn a_device_reads_its_files_and_no_others() {
    in_child("a_device_reads_its_files_and_no_others", |directory| {
        let (image, other) = (directory.join("image"), directory.join("other"));
        fs::write(&image, "x").unwrap();
        fs::write(&other, "x").unwrap();
        let needs = SandboxNeeds { read: vec![image.clone()], ..needs() };
        sandbox::close_files(&needs).unwrap();
        sandbox::close_calls(&needs).unwrap();
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
        // SAFETY: calls without pointers.
        let sync = || done(unsafe { libc::syscall(libc::SYS_fdatasync, fd) });
        // SAFETY: as above.
        let sync_all = || done(unsafe { libc::syscall(libc::SYS_fsync, fd) });
        // SAFETY: the request reads one number.
        let request = |request| done(unsafe { libc::ioctl(end.as_raw_fd(), request, &0) }.into());
        let calls = [Call::any(libc::SYS_fdatasync), Call::ioctl(libc::FIOASYNC)];
        sandbox::close_calls(&SandboxNeeds::calls(&calls)).unwrap();
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
        sandbox::close_calls(&needs()).unwrap();

        client.write_all(b"x").expect("open sockets work");
        let (mut served, _) = listener.accept().expect("clients are served");
        let mut byte = [0; 1];
        served.read_exact(&mut byte).unwrap();
        map(libc::PROT_READ | libc::PROT_WRITE).expect("memory can be had");
        worker.thread().unpark();
        worker.join().expect("threads end");

        assert_kept_back::<()>("running a program", Err(Command::new("/bin/true").exec()));
        // SAFETY: were there a child, it would end with the test that has failed.
        assert_kept_back("another process", done(unsafe { libc::syscall(libc::SYS_fork) }));
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
        sandbox::close_calls(&needs()).unwrap();

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
