//! Requests that the kernel has (io_uring) while something else happens, and hosts that have none.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use devices::testing::{CARRIERS, HIGH, RUNNING};
use devices::virtio::block::Block;
use devices::virtio::block::raw::{Cache, RawOptions, open_locked};
use devices::virtio::block::ring::{self, NoRing};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

use super::room::*;

const PIECE: u32 = 4096;

/// Offers so many reads or writes of 4 KiB in a row on queue 0, each with a buffer of its own that begins `odd` bytes
/// into its page, and has the device know of all at once.
fn ask_for(room: &mut Room, kind: u32, count: u16, odd: u64) {
    for place in 0..count {
        let (head, index) = (3 * place, u64::from(place));
        let flag = if kind == VIRTIO_BLK_T_IN { VRING_DESC_F_WRITE } else { 0 };
        let header = HEADER + 16 * index;
        room.memory().write_obj([u64::from(kind), 8 * index % SECTORS], GuestAddress(header)).unwrap();
        room.guest.describe(0, head, header, 16, VRING_DESC_F_NEXT, head + 1);
        let data = HIGH + 8192 * index + odd;
        room.guest.describe(0, head + 1, data, PIECE, flag | VRING_DESC_F_NEXT, head + 2);
        room.guest.describe(0, head + 2, STATUS + index, 1, VRING_DESC_F_WRITE, 0);
        room.guest.offer(0, head);
    }
    room.guest.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
}

#[test]
fn a_raw_disk_has_a_ring_where_the_host_has_one() {
    let file = file();
    let block = Block::new(raw(file.as_path(), WRITABLE), "disk", 1).unwrap();
    assert_eq!(block.has_ring(), ring::look().is_ok());
    assert!(!block.on_threads().has_ring());
}

#[test]
fn nothing_touches_memory_after_a_reset() {
    for carrier in CARRIERS {
        let file = file();
        let mut room = Room::new(carrier, raw(file.as_path(), WRITABLE), 0);
        for _ in 0..20 {
            ask_for(&mut room, VIRTIO_BLK_T_IN, 32, 0);
            // One event: the requests are taken, and most are on their way.
            assert!(room.guest.wait(10_000));
            room.guest.reset();
            room.memory().write_slice(&[0x77; 32 * 8192], GuestAddress(HIGH)).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            let mut bytes = vec![0; 32 * 8192];
            room.memory().read_slice(&mut bytes, GuestAddress(HIGH)).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 0x77), "a read came after the reset");
            room.guest.run();
            room.guest.start(0);
            room.guest.run();
            assert!(room.guest.used(0).is_empty());
        }
        room.guest.ram.assert_canaries();
    }
}

#[test]
fn a_pause_has_all_given_back() {
    let file = file();
    let mut room = Room::new(CARRIERS[1], raw(file.as_path(), WRITABLE), 0);
    for round in 0..20 {
        let kind = if round % 2 == 0 { VIRTIO_BLK_T_IN } else { VIRTIO_BLK_T_OUT };
        // Some that the kernel does, or all of them by threads.
        ask_for(&mut room, kind, 32, u64::from(round % 3 == 0));
        assert!(room.guest.wait(10_000));
        let transport = room.guest.transport();
        transport.lock().unwrap().drain();
        let taken = room.guest.used(0).len();
        room.guest.run();
        assert!(room.guest.used(0).is_empty(), "something comes while it is paused");
        transport.lock().unwrap().resume();
        let mut done = taken;
        while done < 32 {
            assert!(room.guest.wait(10_000), "nothing comes back");
            done += room.guest.used(0).len();
        }
        assert_eq!((done, room.guest.status()), (32, RUNNING));
    }
}

#[test]
fn neighbours_of_one_page_do_not_lose_each_other() {
    // Requests past the page cache, and through it as their buffers are odd, side by side in the same pages.
    let file = file();
    let mut room = Room::new(CARRIERS[1], raw(file.as_path(), WRITABLE), 0);
    for round in 1..=40u8 {
        for place in 0..64u16 {
            let (head, index) = (3 * place, u64::from(place));
            let header = HEADER + 16 * index;
            room.memory().write_obj([u64::from(VIRTIO_BLK_T_OUT), index], GuestAddress(header)).unwrap();
            let data = HIGH + 4096 * index + index % 2;
            room.memory().write_slice(&[round ^ place as u8; 512], GuestAddress(data)).unwrap();
            room.guest.describe(0, head, header, 16, VRING_DESC_F_NEXT, head + 1);
            room.guest.describe(0, head + 1, data, 512, VRING_DESC_F_NEXT, head + 2);
            room.guest.describe(0, head + 2, STATUS + index, 1, VRING_DESC_F_WRITE, 0);
            room.guest.offer(0, head);
        }
        room.guest.notify(0);
        let mut done = room.guest.used(0).len();
        while done < 64 {
            assert!(room.guest.wait(10_000), "nothing comes back");
            done += room.guest.used(0).len();
        }
        let there = fs::read(file.as_path()).unwrap();
        for (place, sector) in there.chunks(512).take(64).enumerate() {
            assert!(
                sector.iter().all(|byte| *byte == round ^ place as u8),
                "sector {place} of round {round}"
            );
        }
    }
}

#[test]
fn what_is_only_there_in_part_is_an_error_and_the_rest_is_read() {
    // The file ends in the middle of a request.
    for cache in [Cache::Direct, Cache::Buffered] {
        let file = file();
        let mut room = Room::new(CARRIERS[0], raw(file.as_path(), RawOptions { cache, ..WRITABLE }), 0);
        fs::File::options().write(true).open(file.as_path()).unwrap().set_len(4096 + 512).unwrap();
        assert_eq!(room.request(0, VIRTIO_BLK_T_IN, 8, &[(DATA, 4096, VRING_DESC_F_WRITE)]).0, IO_ERROR);
        assert_eq!(room.read(8, 512), content()[4096..4608]);
        let more = content();
        fs::File::options().write(true).open(file.as_path()).unwrap().write_all_at(&more, 0).unwrap();
        assert_eq!(room.read(8, 4096), content()[4096..8192]);
    }
}

#[test]
fn a_disk_is_free_once_its_device_is_gone() {
    for cache in [Cache::Direct, Cache::Buffered] {
        let file = file();
        let mut room = Room::new(CARRIERS[0], raw(file.as_path(), RawOptions { cache, ..WRITABLE }), 0);
        ask_for(&mut room, VIRTIO_BLK_T_OUT, 32, 0);
        assert!(room.guest.wait(10_000));
        drop(room);
        let start = Instant::now();
        open_locked(file.as_path(), false).unwrap();
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

/// Has system calls of this thread, and of those that it starts, end in `error` where they make a ring.
fn keep_io_uring_away(error: i32) {
    let statement = |code: u32, jump: (u8, u8), value: u32| libc::sock_filter {
        code: code as u16,
        jt: jump.0,
        jf: jump.1,
        k: value,
    };
    let mut program = [
        // The number of the call (seccomp(2): `struct seccomp_data`).
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, (0, 0), 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, (0, 1), libc::SYS_io_uring_setup as u32),
        statement(libc::BPF_RET | libc::BPF_K, (0, 0), libc::SECCOMP_RET_ERRNO | error as u32),
        statement(libc::BPF_RET | libc::BPF_K, (0, 0), libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: a valid program of as many statements, for this thread alone.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn threads_do_all_where_io_uring_is_not_to_be_had() {
    for error in [libc::ENOSYS, libc::EPERM, libc::ENOMEM] {
        let (sender, outcome) = mpsc::channel();
        std::thread::spawn(move || {
            keep_io_uring_away(error);
            let why = ring::look().unwrap_err();
            match error {
                libc::ENOSYS => assert!(matches!(why, NoRing::Missing), "{why}"),
                libc::EPERM => assert!(matches!(why, NoRing::Forbidden | NoRing::Disabled(_)), "{why}"),
                _ => assert!(matches!(why, NoRing::Host(_)), "{why}"),
            }
            let file = file();
            let device = Block::new(raw(file.as_path(), WRITABLE), "disk", 2).unwrap();
            assert!(!device.has_ring());
            let mut room = Room::of(CARRIERS[1], device, 0);
            assert_eq!(room.write(3, &[7; 1024]), OK);
            assert_eq!(room.read(3, 1024), [7; 1024]);
            sender.send(()).unwrap();
        });
        outcome.recv_timeout(Duration::from_secs(60)).unwrap();
    }
}
