//! Files of disks, with QEMU's tools and its locks as the second opinion.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use api::units::Bytes;
use devices::virtio::block::raw::open_locked;
use disks::Stop;
use disks::file::{Check, Create, FileError, Format, Info, NewSize, check, resize};

fn new(path: PathBuf, size: Option<u64>) -> Create {
    let format = Format::of_name(&path);
    Create { path, format, size: size.map(Bytes), backing: None, force: false }
}

fn over(path: PathBuf, behind: PathBuf) -> Create {
    let format = Format::of_name(&behind);
    Create { backing: Some((behind, format)), ..new(path, None) }
}

fn checked(path: &Path) -> Check {
    check(path, Format::of_name(path), &Stop::new(false)).expect("it can be checked")
}

/// What QEMU reads in a disk.
fn contents(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("contents");
    let converted = Command::new("qemu-img").args(["convert", "-O", "raw"]).args([path, &raw]).status();
    assert!(converted.expect("qemu-img runs").success());
    fs::read(raw).expect("read")
}

#[test]
fn disks_are_made_as_they_are_asked_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    let raw = new(at("data.img"), Some(1 << 30)).run().expect("made");
    assert_eq!(
        (raw.format, raw.size, raw.allocated, raw.in_use),
        (Format::Raw, Bytes::gib(1), Bytes(0), false)
    );
    let image = new(at("data.qcow2"), Some(10 << 40)).run().expect("made");
    assert_eq!((image.format, image.size, image.version), (Format::Qcow2, Bytes::gib(10 << 10), Some(3)));
    assert!(image.allocated < Bytes::mib(1));
    let check = checked(&at("data.qcow2"));
    assert_eq!((check.corruptions, check.leaks, check.errors), (0, 0, 0));
    // As any new file: for others to read, where the user's mask lets them.
    assert_eq!(fs::metadata(at("data.img")).expect("there").mode() & 0o700, 0o600);
    for size in [None, Some(0), Some(511), Some(u64::MAX / 512 * 512)] {
        assert!(new(at("none.img"), size).run().is_err(), "{size:?}");
    }
    assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 2, "something was left behind");
}

#[test]
fn an_overlay_shows_what_lies_behind_it_and_grows_with_zeros() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    new(at("base.img"), Some(1 << 20)).run().expect("made");
    let base = File::options().write(true).open(at("base.img")).expect("opened");
    base.write_all_at(&[7; 1 << 20], 0).expect("written");
    drop(base);
    let overlay = over(at("web.qcow2"), at("base.img")).run().expect("made");
    let behind = overlay.backing.expect("it has a backing file");
    assert_eq!((behind.path, behind.format, overlay.size), ("base.img".into(), Format::Raw, Bytes::mib(1)));
    assert!(contents(&at("web.qcow2")).iter().all(|byte| *byte == 7));

    // The disk behind becomes longer, then this one: what is added is not what is there now.
    resize(&at("base.img"), Format::Raw, NewSize::By(Bytes::mib(1))).expect("grown");
    let base = File::options().write(true).open(at("base.img")).expect("opened");
    base.write_all_at(&[8; 1 << 20], 1 << 20).expect("written");
    drop(base);
    let grown = resize(&at("web.qcow2"), Format::Qcow2, "+1M".parse().expect("a size")).expect("grown");
    assert_eq!(grown.size, Bytes::mib(2));
    let contents = contents(&at("web.qcow2"));
    assert_eq!(contents.len(), 2 << 20);
    assert!(contents[..1 << 20].iter().all(|byte| *byte == 7));
    assert!(contents[1 << 20..].iter().all(|byte| *byte == 0), "the end of the base shows through");
    assert!(checked(&at("web.qcow2")).is_sound());

    // In other directories it is named by its whole path; none is smaller than what it shows.
    fs::create_dir(at("other")).expect("made");
    let far = over(at("other/far.qcow2"), at("web.qcow2")).run().expect("made");
    assert!(far.backing.expect("there").path.is_absolute());
    let small = Create { size: Some(Bytes::mib(1)), ..over(at("small.qcow2"), at("web.qcow2")) };
    assert!(matches!(small.run(), Err(FileError::SmallerThanBacking { .. })));
    let raw = Create { format: Format::Raw, ..over(at("raw.img"), at("base.img")) };
    assert!(matches!(raw.run(), Err(FileError::RawBacking)));
}

/// People write 1.1G.
#[test]
fn sizes_are_rounded_down_to_sectors() {
    let directory = tempfile::tempdir().expect("a directory");
    let whole = Bytes(1_181_116_006 / 512 * 512);
    for (name, format) in [("a.img", Format::Raw), ("a.qcow2", Format::Qcow2)] {
        let path = directory.path().join(name);
        let asked: Bytes = "1.1G".parse().expect("a size");
        assert_eq!(new(path.clone(), Some(asked.0)).run().expect("made").size, whole);
        let grown = resize(&path, format, "+1.1G".parse().expect("a size")).expect("grown");
        assert_eq!(grown.size, whole + whole);
        let grown = resize(&path, format, "3.3G".parse().expect("a size")).expect("grown");
        assert_eq!(grown.size, Bytes(3_543_348_019 / 512 * 512));
    }
    for nothing in [0, 511] {
        let small = new(directory.path().join("small.img"), Some(nothing)).run();
        assert!(matches!(small, Err(FileError::Size(_))), "{nothing}: {small:?}");
    }
}

#[test]
fn disks_only_grow() {
    let directory = tempfile::tempdir().expect("a directory");
    for (name, format) in [("a.img", Format::Raw), ("a.qcow2", Format::Qcow2)] {
        let path = directory.path().join(name);
        new(path.clone(), Some(64 << 20)).run().expect("made");
        // So that its first table has to move.
        let grown = resize(&path, format, "1T".parse().expect("a size")).expect("grown");
        assert_eq!(grown.size, Bytes::gib(1 << 10));
        assert_eq!(resize(&path, format, NewSize::To(Bytes::gib(1 << 10))).expect("as it is"), grown);
        for (size, smaller) in [("1G", true), ("+1", false), ("+17E", false)] {
            let Ok(size) = size.parse() else { continue };
            match resize(&path, format, size) {
                Err(FileError::Smaller { .. }) if smaller => {}
                Err(FileError::Size(_)) if !smaller => {}
                other => panic!("{size:?}: {other:?}"),
            }
        }
        assert!(checked(&path).is_sound());
        let command = ["info", "--output=json", "-f", if format == Format::Raw { "raw" } else { "qcow2" }];
        let told = Command::new("qemu-img").args(command).arg(&path).output().expect("qemu-img runs");
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(told.contains(&format!("\"virtual-size\": {}", 1u64 << 40)), "{told}");
    }
}

#[test]
fn a_disk_in_use_is_left_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    for (name, format) in [("a.img", Format::Raw), ("a.qcow2", Format::Qcow2)] {
        let path = directory.path().join(name);
        new(path.clone(), Some(1 << 20)).run().expect("made");
        let before = fs::read(&path).expect("read");
        let used = open_locked(&path, false).expect("locked");
        let locked = |error: FileError| error.to_string().contains("is used by another process");
        assert!(locked(resize(&path, format, NewSize::By(Bytes::mib(1))).expect_err("in use")));
        assert!(locked(check(&path, format, &Stop::new(false)).expect_err("in use")));
        let again = Create { force: true, ..new(path.clone(), Some(1 << 30)) };
        assert!(locked(again.run().expect_err("in use")));
        let above = over(directory.path().join(format!("over-{name}.qcow2")), path.clone());
        assert!(locked(above.run().expect_err("in use")));
        assert!(Info::of(&path, format).expect("told").in_use);
        assert_eq!(fs::read(&path).expect("read"), before);
        drop(used);
        // Whoever only reads it disturbs no other reader.
        let reader = open_locked(&path, true).expect("locked");
        assert!(!Info::of(&path, format).expect("told").in_use);
        above.run().expect("made");
        drop(reader);
        again.run().expect("replaced");
        assert_eq!(Info::of(&path, format).expect("told").size, Bytes::gib(1));
    }
}

#[test]
fn what_is_there_is_not_lost() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    fs::write(at("letter"), "dear").expect("written");
    symlink(at("letter"), at("link")).expect("linked");
    for name in ["letter", "link"] {
        assert!(matches!(new(at(name), Some(512)).run(), Err(FileError::Exists(_))), "{name}");
    }
    fs::create_dir(at("directory")).expect("made");
    for name in ["directory", "link"] {
        let forced = Create { force: true, ..new(at(name), Some(512)) };
        assert!(matches!(forced.run(), Err(FileError::NoFile(_))), "{name}");
    }
    assert_eq!(fs::read_to_string(at("letter")).expect("read"), "dear");
    // A raw disk whose guest wrote the head of an image is a raw disk.
    new(at("guest.img"), Some(1 << 20)).run().expect("made");
    new(at("image.qcow2"), Some(1 << 30)).run().expect("made");
    let head = fs::read(at("image.qcow2")).expect("read");
    let disk = File::options().write(true).open(at("guest.img")).expect("opened");
    disk.write_all_at(&head[..4096], 0).expect("written");
    let told = Info::of(&at("guest.img"), Format::of_name(&at("guest.img"))).expect("told");
    assert_eq!((told.format, told.size), (Format::Raw, Bytes::mib(1)));
}

#[test]
fn damage_is_found() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("a.qcow2");
    new(path.clone(), Some(1 << 20)).run().expect("made");
    let wrote = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 1M"]).arg(&path).output();
    assert!(wrote.expect("qemu-io runs").status.success());
    assert!(checked(&path).is_sound());
    // The first block of reference counts, in cluster 2: nothing is counted any more.
    let file = File::options().write(true).open(&path).expect("opened");
    file.write_all_at(&[0; 4096], 2 << 16).expect("written");
    let found = checked(&path);
    assert!(!found.is_sound() && found.corruptions > 0, "{found:?}");
    file.set_len(100).expect("cut");
    let error = check(&path, Format::Qcow2, &Stop::new(false)).expect_err("cut short").to_string();
    assert!(error.contains("a.qcow2"), "{error}");
}
