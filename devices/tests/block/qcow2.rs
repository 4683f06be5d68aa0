//! Disks in qcow2 images, with QEMU's tools as the judge.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::thread;

use devices::testing::{CARRIERS, GuestRam};
use devices::virtio::block::disk::{Disk, DiskError};
use devices::virtio::block::qcow2::{Qcow2Disk, Qcow2Options};
use devices::virtio::block::raw::Cache;
use devices::virtio::queue::IoVectors;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::room::*;

/// Images in a directory of their own.
pub struct Image {
    directory: TempDir,
}

pub fn qemu_img(arguments: &[&str]) -> String {
    let output =
        Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed (make setup)");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

impl Image {
    /// A place for images, with [`content`] in `base.img`.
    pub fn new() -> Self {
        let directory = TempDir::new().unwrap();
        fs::write(directory.as_path().join("base.img"), content()).unwrap();
        Self { directory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.as_path().join(name)
    }

    /// Makes the image `name` with `options`, over `base.img` or with its contents.
    pub fn make(&self, name: &str, over: bool, options: &str) -> PathBuf {
        let (path, base) = (self.path(name), self.path("base.img"));
        let [path_text, base] = [&path, &base].map(|path| path.to_str().unwrap());
        if over {
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "-F", "raw", "-b", base, path_text]);
        } else {
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", options, base, path_text]);
        }
        path
    }
}

pub fn options(cache: Cache) -> Qcow2Options {
    Qcow2Options { read_only: false, cache, backing: true }
}

pub fn open(path: &Path, cache: Cache) -> Arc<dyn Disk> {
    Arc::new(Qcow2Disk::open(path, options(cache)).unwrap())
}

/// What QEMU finds in an image.
pub fn contents(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    fs::read(raw).unwrap()
}

/// QEMU finds nothing wrong with an image. What no table names any more may have been left behind by a
/// process that was killed (`leaks`).
pub fn check(path: &Path, leaks: bool) {
    let output = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(path).output().unwrap();
    let code = output.status.code();
    assert!(code == Some(0) || (leaks && code == Some(3)), "{output:?}");
}

#[test]
fn what_a_guest_writes_is_what_qemu_reads() {
    for (over, made) in
        [(false, "compat=1.1"), (true, "compat=1.1"), (true, "compat=0.10"), (true, "cluster_size=512")]
    {
        for cache in [Cache::Direct, Cache::Buffered] {
            let image = Image::new();
            let path = image.make("disk.qcow2", over, made);
            let mut room = Room::new(CARRIERS[0], open(&path, cache), 0);
            let mut model = content();
            assert_eq!(room.read(0, 65536), model[..65536]);
            assert_eq!(room.write(7, &[9; 4096]), OK, "{made}");
            model[7 * 512..15 * 512].fill(9);
            assert_eq!(room.read(0, 65536), model[..65536]);
            for (sector, unmap) in [(100, 0), (140, 1)] {
                assert_eq!(
                    room.clear(virtio_bindings::virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES, sector, 33, unmap),
                    OK
                );
                model[sector as usize * 512..(sector as usize + 33) * 512].fill(0);
            }
            assert_eq!(room.request(0, virtio_bindings::virtio_blk::VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
            assert_eq!(room.read(0, 131_072), model);
            drop(room);
            check(&path, false);
            assert!(contents(&path) == model, "{made} {cache:?}");
            assert_eq!(fs::read(image.path("base.img")).unwrap(), content());
        }
    }
}

#[test]
fn qemu_and_a_vm_keep_each_other_out() {
    let image = Image::new();
    let path = image.make("disk.qcow2", false, "compat=1.1");
    let disk = open(&path, Cache::Direct);
    let mut command = Command::new("qemu-img");
    let output = command.args(["resize", "-f", "qcow2"]).arg(&path).arg("1M").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("lock"), "{said}");
    drop(disk);
    qemu_img(&["resize", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
}

#[test]
fn a_file_is_opened_only_where_the_user_said_so_and_none_twice() {
    let image = Image::new();
    let path = image.make("disk.qcow2", true, "compat=1.1");
    let closed = Qcow2Options { backing: false, ..options(Cache::Buffered) };
    assert!(matches!(Qcow2Disk::open(&path, closed), Err(DiskError::HasBacking { .. })));
    let [text, itself] = [path.to_str().unwrap(), "disk.qcow2"];
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", itself, text]);
    assert!(matches!(
        Qcow2Disk::open(&path, options(Cache::Buffered)),
        Err(DiskError::BackingLoop { .. } | DiskError::Locked { .. })
    ));
    // A long chain.
    let mut below = image.make("0.qcow2", true, "compat=1.1");
    for number in 1..10 {
        let next = image.path(&format!("{number}.qcow2"));
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            below.to_str().unwrap(),
            next.to_str().unwrap(),
        ]);
        below = next;
    }
    assert!(matches!(Qcow2Disk::open(&below, options(Cache::Buffered)), Err(DiskError::BackingDepth { .. })));
}

#[test]
fn an_image_that_is_refused_does_not_change() {
    let image = Image::new();
    let path = image.make("disk.qcow2", false, "compat=1.1");
    let mut bytes = fs::read(&path).unwrap();
    // An unknown feature that makes it unusable, and one that a writer clears.
    (bytes[72], bytes[88]) = (1, 1);
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(Qcow2Disk::open(&path, options(Cache::Buffered)), Err(DiskError::Image { .. })));
    assert!(fs::read(&path).unwrap() == bytes);
}

#[test]
fn zeros_beside_a_write_in_one_cluster_lose_nothing_of_it() {
    let image = Image::new();
    let path = image.make("disk.qcow2", false, "cluster_size=64k");
    let disk = open(&path, Cache::Buffered);
    let ram = GuestRam::new();
    let start = Barrier::new(2);
    for round in 1..=200u8 {
        disk.discard(0..65536).unwrap();
        ram.memory.write_slice(&[round; 4096], GuestAddress(0)).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut bytes = IoVectors::new(Arc::clone(&ram.memory));
                assert!(bytes.push(GuestAddress(0), 4096));
                start.wait();
                disk.write(&mut bytes, 32768).unwrap();
            });
            scope.spawn(|| {
                start.wait();
                disk.write_zeroes(8192..12288, false).unwrap();
            });
        });
        let mut there = IoVectors::new(Arc::clone(&ram.memory));
        assert!(there.push(GuestAddress(8192), 4096));
        disk.read(&mut there, 32768).unwrap();
        let mut bytes = [0; 4096];
        ram.memory.read_slice(&mut bytes, GuestAddress(8192)).unwrap();
        assert_eq!(bytes, [round; 4096], "round {round}");
    }
}
