//! A host that fails, and what becomes of the guest's requests.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::testing::{CARRIERS, RUNNING};
use devices::virtio::block::disk::Disk;
use devices::virtio::block::handle::OnError;
use devices::virtio::block::qcow2::Qcow2Disk;
use devices::virtio::block::raw::{Cache, RawOptions};
use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress};

use super::Failing;
use super::durable::{Files, KINDS};
use super::room::*;

fn room(disk: Arc<dyn Disk>, on_error: OnError) -> Room {
    Room::of(CARRIERS[0], block(disk, "data", 2).on_error(on_error), 0)
}

/// Asks for a write that is to wait.
fn ask(room: &mut Room, bytes: &[u8]) {
    room.memory().write_slice(bytes, GuestAddress(DATA)).unwrap();
    room.ask(1, VIRTIO_BLK_T_OUT, 0, &[(DATA, bytes.len() as u32, 0)]);
    while room.handle.failure().is_none() {
        assert!(room.guest.wait(10_000), "nothing fails");
    }
    assert!(room.guest.used(1).is_empty());
    assert_eq!(room.handle.failed().read().unwrap(), 1);
}

#[test]
fn what_the_host_can_not_do_waits_and_is_tried_again() {
    for (on_error, number) in [
        (OnError::Pause, libc::EIO),
        (OnError::Pause, libc::ENOSPC),
        (OnError::PauseWhenFull, libc::ENOSPC),
        (OnError::PauseWhenFull, libc::EDQUOT),
        (OnError::PauseWhenFull, libc::EFBIG),
    ] {
        let disk = Failing::with(number);
        let mut room = room(disk.clone(), on_error);
        ask(&mut room, &[1; 512]);
        assert!(room.handle.failure().unwrap().contains("os error"));
        // It fails again.
        room.handle.retry();
        while room.handle.failed().read().is_err() {
            assert!(room.guest.wait(10_000), "nothing fails");
        }
        assert!(room.guest.used(1).is_empty() && room.handle.failure().is_some());
        // Now it does not.
        disk.error.store(0, Ordering::Relaxed);
        room.handle.retry();
        assert_eq!((room.finished(1), room.status()), (1, OK));
        assert_eq!((room.handle.failure(), room.handle.counts().errors), (None, 2));
        assert_eq!(room.handle.counts().writes.operations, 1);
    }
}

#[test]
fn the_guest_is_told_of_what_does_not_wait() {
    for (on_error, number) in [
        (OnError::Report, libc::ENOSPC),
        (OnError::PauseWhenFull, libc::EIO),
        // Buffers that are no memory are the guest's own fault.
        (OnError::Pause, libc::EFAULT),
    ] {
        let mut room = room(Failing::with(number), on_error);
        assert_eq!(room.write(0, &[1; 512]), IO_ERROR);
        assert_eq!((room.handle.failure(), room.handle.counts().errors), (None, 1));
    }
}

#[test]
fn a_reset_forgets_what_waits() {
    let disk = Failing::with(libc::EIO);
    let mut room = room(disk.clone(), OnError::Pause);
    ask(&mut room, &[1; 512]);
    assert!(room.guest.save().unwrap_err().to_string().contains("wait"));
    room.guest.start(0);
    assert_eq!(room.handle.failure(), None);
    disk.error.store(0, Ordering::Relaxed);
    room.handle.retry();
    room.guest.run();
    assert!(room.guest.used(1).is_empty());
    assert_eq!(room.write(0, &[1; 512]), OK);
    // A driver that changes a request while it waits harms nobody.
    disk.error.store(libc::EIO, Ordering::Relaxed);
    ask(&mut room, &[1; 512]);
    room.memory().write_slice(&[0xff; 16], GuestAddress(HEADER)).unwrap();
    disk.error.store(0, Ordering::Relaxed);
    room.handle.retry();
    assert_eq!(room.finished(1), 0);
    assert_eq!(room.guest.status(), RUNNING);
    room.guest.ram.assert_canaries();
}

/// What makes this program one whose files may grow no further, which is a limit of the whole process.
const FULL: &str = "BALLAST_FULL_DISK";

/// Sets how long this process's files may become.
fn files_may_have(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a valid struct, and a signal of which nobody here has a handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
}

#[test]
fn the_one_whose_files_are_full() {
    if std::env::var_os(FULL).is_none() {
        return;
    }
    // An image that grows as it is written.
    for kind in [KINDS[2], KINDS[4]] {
        let files = Files::new(kind);
        let path = files.disk();
        let disk = Qcow2Disk::open(&path, super::qcow2::options(Cache::Buffered)).unwrap();
        let mut room = room(Arc::new(disk), OnError::PauseWhenFull);
        let before = room.read(0, 4096);
        assert_eq!(room.request(0, VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
        files_may_have(fs::metadata(&path).unwrap().len());
        let mut sector = 0;
        let failed = loop {
            room.memory().write_slice(&[7; 4096], GuestAddress(DATA)).unwrap();
            room.ask(1, VIRTIO_BLK_T_OUT, sector, &[(DATA, 4096, 0)]);
            while room.status().is_none() && room.handle.failure().is_none() {
                assert!(room.guest.wait(10_000));
            }
            if let Some(failure) = room.handle.failure() {
                break failure;
            }
            assert_eq!((room.status(), room.guest.used(1).len()), (OK, 1));
            sector += 8;
            assert!(sector < 16384, "{kind:?} never fills its file");
        };
        assert!(failed.contains("too large"), "{failed}");
        files_may_have(libc::RLIM_INFINITY);
        room.handle.retry();
        assert_eq!((room.finished(1), room.status()), (1, OK));
        assert_eq!(room.request(0, VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
        assert_eq!(room.read(sector, 4096), [7; 4096]);
        drop(room);
        super::qcow2::check(&path, true);
        let contents = super::qcow2::contents(&path);
        assert_eq!(contents[sector as usize * 512..][..4096], [7; 4096]);
        assert_ne!(contents[..4096], before);
    }
    // A raw disk with holes, behind a length that its process may not write.
    let file = file();
    let disk = raw(file.as_path(), RawOptions { cache: Cache::Buffered, ..WRITABLE });
    let mut room = room(disk, OnError::PauseWhenFull);
    files_may_have(0);
    ask(&mut room, &[3; 512]);
    files_may_have(libc::RLIM_INFINITY);
    room.handle.retry();
    assert_eq!((room.finished(1), room.status()), (1, OK));
    assert_eq!(fs::read(file.as_path()).unwrap()[..512], [3; 512]);
}

#[test]
fn a_full_host_loses_nothing_and_goes_on_when_there_is_room() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([&this_test(module_path!(), "the_one_whose_files_are_full"), "--exact", "--nocapture"])
        .env(FULL, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}
