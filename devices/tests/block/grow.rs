//! Disks that grow while their guest runs.

use std::fs;
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use devices::testing::CARRIERS;
use devices::virtio::block::disk::Disk;
use devices::virtio::block::handle::GrowError;
use devices::virtio::block::raw::{Cache, RawDisk, RawOptions};
use virtio_bindings::virtio_blk::*;

use super::qcow2::{Image, check, contents};
use super::room::*;

/// Sectors, as the driver reads them.
fn capacity(room: &Room) -> u64 {
    u64::from(room.guest.read(0x104)) << 32 | u64::from(room.guest.read(0x100))
}

/// Has a disk grow, and waits until its driver knows. Says what came of it.
fn grow(room: &mut Room, size: u64) -> Result<(), GrowError> {
    // So that the next event is this one.
    room.guest.run();
    let (sender, grown) = mpsc::channel();
    room.handle.grow(size, move |outcome| sender.send(outcome).unwrap())?;
    let outcome = grown.recv_timeout(Duration::from_secs(10)).unwrap();
    room.guest.wait(1000);
    outcome
}

#[test]
fn a_file_grows_and_its_driver_is_told() {
    for carrier in CARRIERS {
        let file = file();
        let mut room = Room::new(carrier, raw(file.as_path(), WRITABLE), 0);
        assert_eq!(capacity(&room), SECTORS);
        let before = room.guest.interrupts();
        grow(&mut room, 2 * SECTORS * 512).unwrap();
        assert_eq!(capacity(&room), 2 * SECTORS);
        assert!(room.guest.interrupts() > before, "the driver is not told");
        assert_eq!(room.read(SECTORS, 4096), [0; 4096]);
        assert_eq!(room.write(2 * SECTORS - 1, &[5; 512]), OK);
        assert_eq!(room.write(2 * SECTORS, &[5; 512]), IO_ERROR);
        assert_eq!(fs::metadata(file.as_path()).unwrap().len(), 2 * SECTORS * 512);
        assert!(matches!(grow(&mut room, 512), Err(GrowError::Smaller { .. })));
        assert!(matches!(grow(&mut room, 2 * SECTORS * 512 + 1), Err(GrowError::Size(_))));
    }
}

#[test]
fn what_is_only_read_does_not_grow() {
    let file = file();
    let options = RawOptions { read_only: true, cache: Cache::Buffered, stated: false };
    let mut room = Room::new(CARRIERS[0], raw(file.as_path(), options), 0);
    assert!(matches!(grow(&mut room, 1 << 20), Err(GrowError::ReadOnly(_))));
    assert_eq!(fs::metadata(file.as_path()).unwrap().len(), SECTORS * 512);
}

#[test]
fn a_file_never_becomes_shorter() {
    let file = file();
    let disk = RawDisk::open(file.as_path(), WRITABLE).unwrap();
    fs::File::options().write(true).open(file.as_path()).unwrap().set_len(1 << 20).unwrap();
    disk.grow(1 << 18).unwrap();
    assert_eq!((disk.size(), fs::metadata(file.as_path()).unwrap().len()), (1 << 18, 1 << 20));
}

#[test]
fn an_image_grows_and_nothing_shows_through() {
    for (made, longer) in
        [("cluster_size=64k", false), ("cluster_size=512", false), ("cluster_size=64k", true)]
    {
        let image = Image::new();
        let path = image.make("disk.qcow2", true, made);
        if longer {
            // What lies behind it has more than the image shows.
            let more = [content(), vec![0x55; 1 << 20]].concat();
            fs::write(image.path("base.img"), more).unwrap();
        }
        let mut room = Room::new(CARRIERS[0], super::qcow2::open(&path, Cache::Direct), 0);
        let mut model = content();
        // The last cluster of the old size, too.
        assert_eq!(room.write(SECTORS - 1, &[9; 512]), OK);
        model[(SECTORS as usize - 1) * 512..].fill(9);
        let size = (4 << 20) + 512;
        grow(&mut room, size).unwrap();
        model.resize(size as usize, 0);
        assert_eq!(capacity(&room), size / 512);
        assert_eq!(room.read(SECTORS, 65536), [0; 65536], "{made} {longer}");
        assert_eq!(room.write(size / 512 - 1, &[5; 512]), OK);
        model[size as usize - 512..].fill(5);
        assert_eq!(room.request(0, VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
        drop(room);
        check(&path, false);
        assert!(contents(&path) == model, "{made} {longer}");
    }
}

#[test]
fn an_old_image_whose_backing_file_would_show_is_refused() {
    let image = Image::new();
    let path = image.make("disk.qcow2", true, "compat=0.10");
    fs::write(image.path("base.img"), [content(), vec![0x55; 1 << 20]].concat()).unwrap();
    let disk: Arc<dyn Disk> = super::qcow2::open(&path, Cache::Buffered);
    let error = disk.grow(4 << 20).unwrap_err().to_string();
    assert!(error.contains("qemu-img convert"), "{error}");
    drop(disk);
    let output = Command::new("qemu-img").args(["info", "--output=json"]).arg(&path).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"virtual-size\": 131072"));
}
