//! The block device: an honest driver and a hostile one, over real files and images.

mod durable;
mod errors;
mod grow;
mod images;
mod limits;
mod model;
mod qcow2;
mod ring;
mod room;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use devices::testing::{CARRIERS, RUNNING};
use devices::virtio::block::disk::{ByteRange, Disk, DiskError};
use devices::virtio::block::raw::{Cache, RawDisk, RawOptions};
use devices::virtio::queue::IoVectors;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use room::*;

#[test]
fn what_is_written_is_read_and_is_in_the_file() {
    for carrier in CARRIERS {
        for cache in [Cache::Direct, Cache::Buffered] {
            let file = file();
            let mut room = Room::new(carrier, raw(file.as_path(), RawOptions { cache, ..WRITABLE }), 0);
            assert_eq!(room.read(0, 4096), content()[..4096]);
            assert_eq!(room.read(255, 512), content()[255 * 512..]);
            assert_eq!(room.write(3, &[7; 1024]), OK);
            assert_eq!(room.read(2, 2048)[512..1536], [7; 1024]);
            assert_eq!(room.request(0, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
            assert_eq!(fs::read(file.as_path()).unwrap()[3 * 512..5 * 512], [7; 1024]);
            room.guest.ram.assert_canaries();
        }
    }
}

#[test]
fn buffers_may_lie_anywhere() {
    let file = file();
    let mut room = Room::new(CARRIERS[0], raw(file.as_path(), WRITABLE), 0);
    // Odd places and lengths: past what the page cache can be left out for.
    let parts = [
        (DATA + 1, 5, VRING_DESC_F_WRITE),
        (DATA + 0x2003, 1000, VRING_DESC_F_WRITE),
        (DATA + 0x9000, 19, VRING_DESC_F_WRITE),
    ];
    assert_eq!(room.request(0, VIRTIO_BLK_T_IN, 9, &parts), (OK, 1025));
    let mut read = Vec::new();
    for (address, len, _) in parts {
        let mut bytes = vec![0; len as usize];
        room.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        read.extend(bytes);
    }
    assert_eq!(read, content()[9 * 512..11 * 512]);
    let parts = parts.map(|(address, len, _)| (address, len, 0));
    assert_eq!(room.request(0, VIRTIO_BLK_T_OUT, 100, &parts), (OK, 1));
    assert_eq!(room.read(100, 1024), content()[9 * 512..11 * 512]);
}

#[test]
fn requests_beyond_the_disk_or_of_no_whole_sectors_fail_and_change_nothing() {
    let file = file();
    let mut room = Room::new(CARRIERS[0], raw(file.as_path(), WRITABLE), 0);
    for (sector, len) in
        [(256, 512), (255, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512), (0, 511), (0, 1)]
    {
        for (kind, flag) in [(VIRTIO_BLK_T_IN, VRING_DESC_F_WRITE), (VIRTIO_BLK_T_OUT, 0)] {
            assert_eq!(room.request(0, kind, sector, &[(DATA, len, flag)]), (IO_ERROR, 1), "{sector} {len}");
        }
    }
    for (sector, sectors) in [(256, 1), (0, 257), (u64::MAX, 1), (0, u32::MAX), (0, 0)] {
        assert_eq!(room.clear(VIRTIO_BLK_T_DISCARD, sector, sectors, 0), IO_ERROR);
        assert_eq!(room.clear(VIRTIO_BLK_T_WRITE_ZEROES, sector, sectors, 1), IO_ERROR);
    }
    assert_eq!(fs::read(file.as_path()).unwrap(), content());
    assert_eq!(room.guest.status(), RUNNING);
}

#[test]
fn what_is_no_request_comes_back_and_what_is_not_known_is_said_so() {
    let file = file();
    let mut room = Room::new(CARRIERS[0], raw(file.as_path(), WRITABLE), 0);
    assert_eq!(room.request(0, 77, 0, &[]), (UNSUPPORTED, 1));
    assert_eq!(room.request(0, VIRTIO_BLK_T_SECURE_ERASE, 0, &[(DATA, 16, 0)]).0, UNSUPPORTED);
    assert_eq!(room.clear(VIRTIO_BLK_T_DISCARD, 0, 8, 1), UNSUPPORTED);
    assert_eq!(room.clear(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 2), UNSUPPORTED);
    // No status, and a header that is too short.
    room.guest.describe(0, 0, HEADER, 16, 0, 0);
    room.guest.send(0, 0);
    assert_eq!(room.finished(0), 0);
    room.guest.describe(0, 0, HEADER, 15, VRING_DESC_F_NEXT, 1);
    room.guest.describe(0, 1, STATUS, 1, VRING_DESC_F_WRITE, 0);
    room.guest.send(0, 0);
    assert_eq!(room.finished(0), 0);
    assert_eq!(room.guest.status(), RUNNING);
    // Its name.
    assert_eq!(room.request(0, VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, VRING_DESC_F_WRITE)]), (OK, 21));
    let mut name = [0; 20];
    room.memory().read_slice(&mut name, GuestAddress(DATA)).unwrap();
    assert_eq!(&name, b"disk-of-a-long-name-");
}

#[test]
fn zeros_keep_their_room_unless_it_may_go() {
    let file = file();
    let mut room = Room::new(CARRIERS[0], raw(file.as_path(), WRITABLE), 0);
    let blocks = || fs::metadata(file.as_path()).unwrap().blocks();
    let before = blocks();
    assert_eq!(room.clear(VIRTIO_BLK_T_WRITE_ZEROES, 8, 8, 0), OK);
    assert_eq!(room.read(0, 8192), [&content()[..4096], &[0; 4096]].concat());
    assert_eq!(blocks(), before);
    assert_eq!(room.clear(VIRTIO_BLK_T_WRITE_ZEROES, 16, 8, 1), OK);
    assert_eq!(room.read(16, 4096), [0; 4096]);
    assert_eq!(blocks(), before - 8);
    assert_eq!(room.clear(VIRTIO_BLK_T_DISCARD, 32, 8, 0), OK);
    assert_eq!(blocks(), before - 16);
    assert_eq!(room.read(40, 4096), content()[40 * 512..48 * 512]);
    assert_eq!(fs::metadata(file.as_path()).unwrap().len(), SECTORS * 512);
}

#[test]
fn a_disk_to_read_is_never_written() {
    let file = file();
    let mut room = Room::new(
        CARRIERS[0],
        raw(file.as_path(), RawOptions { read_only: true, cache: Cache::Buffered, stated: false }),
        0,
    );
    assert_ne!(room.guest.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(room.write(0, &[1; 512]), IO_ERROR);
    assert_eq!(room.clear(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IO_ERROR);
    assert_eq!(room.clear(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), IO_ERROR);
    // Firmware flushes whatever it is.
    assert_eq!(room.request(0, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(fs::read(file.as_path()).unwrap(), content());
}

#[test]
fn a_file_that_shrinks_is_an_error_of_the_disk() {
    for cache in [Cache::Direct, Cache::Buffered] {
        let file = file();
        let mut room = Room::new(CARRIERS[0], raw(file.as_path(), RawOptions { cache, ..WRITABLE }), 0);
        File::options().write(true).open(file.as_path()).unwrap().set_len(4096).unwrap();
        assert_eq!(room.request(0, VIRTIO_BLK_T_IN, 100, &[(DATA, 512, VRING_DESC_F_WRITE)]).0, IO_ERROR);
        assert_eq!(room.read(0, 512), content()[..512]);
    }
}

/// A disk whose host fails.
#[derive(Default)]
struct Failing {
    flushes: AtomicU32,
    /// The host's error; 0 is none.
    error: AtomicI32,
}

impl Failing {
    fn with(error: i32) -> Arc<Self> {
        Arc::new(Self { error: error.into(), ..Self::default() })
    }

    fn result(&self) -> io::Result<()> {
        match self.error.load(Ordering::Relaxed) {
            0 => Ok(()),
            number => Err(io::Error::from_raw_os_error(number)),
        }
    }
}

impl Disk for Failing {
    fn size(&self) -> u64 {
        SECTORS * 512
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn read(&self, _: &mut IoVectors, _: u64) -> io::Result<()> {
        self.result()
    }
    fn write(&self, _: &mut IoVectors, _: u64) -> io::Result<()> {
        self.result()
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.result()
    }
    fn discard(&self, _: ByteRange) -> io::Result<()> {
        self.result()
    }
    fn write_zeroes(&self, _: ByteRange, _: bool) -> io::Result<()> {
        self.result()
    }
    fn grow(&self, _: u64) -> io::Result<()> {
        self.result()
    }
}

#[test]
fn errors_of_the_host_are_the_guests_to_see() {
    for number in [libc::ENOSPC, libc::EIO] {
        let disk = Failing::with(number);
        let mut room = Room::new(CARRIERS[0], disk, 0);
        assert_eq!(room.write(0, &[1; 512]), IO_ERROR);
        assert_eq!(room.request(0, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, VRING_DESC_F_WRITE)]).0, IO_ERROR);
        assert_eq!(room.request(0, VIRTIO_BLK_T_FLUSH, 0, &[]).0, IO_ERROR);
        assert_eq!(room.clear(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IO_ERROR);
        assert_eq!(room.guest.status(), RUNNING);
    }
}

#[test]
fn a_driver_that_can_not_flush_has_each_write_made_to_last() {
    for (refused, wce, flushes) in [(0, 1, 0), (1 << VIRTIO_BLK_F_FLUSH, 1, 2), (0, 0, 2)] {
        let disk = Failing::with(0);
        let mut room = Room::new(CARRIERS[0], disk.clone(), refused);
        room.guest.raw_write(0x100 + 32, &[wce]);
        assert_eq!(room.write(0, &[1; 512]), OK);
        assert_eq!(room.clear(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), OK);
        assert_eq!(disk.flushes.load(Ordering::Relaxed), flushes, "{refused:#x} {wce}");
    }
}

#[test]
fn a_disk_belongs_to_one_vm() {
    let file = file();
    let open = |read_only| {
        RawDisk::open(file.as_path(), RawOptions { read_only, cache: Cache::Buffered, stated: false })
    };
    let first = open(false).unwrap();
    assert!(matches!(open(false), Err(DiskError::Locked { .. })));
    assert!(matches!(open(true), Err(DiskError::Locked { .. })));
    drop(first);
    let reader = open(true).unwrap();
    let other = open(true).unwrap();
    assert!(matches!(open(false), Err(DiskError::Locked { .. })));
    drop((reader, other));
    open(false).unwrap();
}

#[test]
fn what_is_no_disk_is_refused_with_a_reason() {
    let open = |path: &Path| RawDisk::open(path, WRITABLE).map(drop).map_err(|error| error.to_string());
    let error = |path: &Path| open(path).unwrap_err();
    assert!(error(Path::new("/tmp")).contains("a directory"), "{}", error(Path::new("/tmp")));
    assert!(error(Path::new("/nowhere")).contains("No such file"));
    assert!(error(Path::new("/dev/null")).contains("has no blocks"));
    let file = TempFile::new().unwrap();
    assert!(error(file.as_path()).contains("empty"));
    fs::write(file.as_path(), [0; 513]).unwrap();
    assert!(error(file.as_path()).contains("513 bytes"));
    fs::write(file.as_path(), [b"QFI\xfb".as_slice(), &[0; 508]].concat()).unwrap();
    assert!(error(file.as_path()).contains("format="));
    RawDisk::open(file.as_path(), RawOptions { stated: true, ..WRITABLE }).unwrap();
}
