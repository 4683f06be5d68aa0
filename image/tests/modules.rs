//! What is found in an initramfs, however it is packed, and that nothing in one does harm.

use std::fs::File;
use std::io::Write;

use image::Error;
use image::kernel::payload::Format;
use image::modules::{Module, has_parameter, in_initramfs};
use image::testing;
use proptest::collection::vec;
use proptest::prelude::*;

/// An archive of these files (`newc`).
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, contents) in files.iter().copied().chain([("TRAILER!!!", &[][..])]) {
        let numbers = [1, 0o100_644, 0, 0, 1, 0, contents.len(), 0, 0, 0, 0, name.len() + 1, 0];
        bytes.extend(b"070701");
        numbers.iter().for_each(|number| bytes.extend(format!("{number:08x}").bytes()));
        bytes.extend(name.bytes().chain([0]));
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(contents);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Packs as distributions do: no size behind it.
fn pack(format: Format, unpacked: &[u8]) -> Vec<u8> {
    let mut packed = testing::pack(unpacked, format);
    if format != Format::Gzip {
        packed.truncate(packed.len() - 4);
    }
    packed
}

fn find(initramfs: &[u8]) -> Result<Option<Module>, Error> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(initramfs).unwrap();
    in_initramfs(&file, "virtio_mem")
}

const PLACE: &str = "usr/lib/modules/6.12.1/kernel/drivers/virtio/virtio_mem.ko.xz";

fn with_module() -> Vec<u8> {
    archive(&[("init", b"#!/bin/sh"), ("lib/virtio_mem.ko.txt", b"x"), (PLACE, b"module"), ("last", b"")])
}

#[test]
fn a_module_is_found_however_the_initramfs_is_packed() {
    let found = Some(Module::InInitramfs(PLACE.to_owned()));
    assert_eq!(find(&with_module()).unwrap(), found);
    let microcode = archive(&[("kernel/x86/microcode/GenuineIntel.bin", &[7; 5000])]);
    for format in [Format::Gzip, Format::Lz4, Format::Zstd, Format::Xz, Format::Lzma] {
        let packed = pack(format, &with_module());
        // As distributions put it behind what the processor needs.
        for zeros in [0, 508] {
            let both = [&microcode[..], &vec![0; zeros], &packed].concat();
            assert_eq!(find(&both).unwrap(), found, "{format}");
        }
        let without = pack(format, &archive(&[("init", b"#!/bin/sh")]));
        assert_eq!(find(&without).unwrap(), None, "{format}");
    }
}

#[test]
fn what_is_built_in_is_listed() {
    let list = b"kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio_mem.ko\nkernel/x.ko\n";
    let listed = |name| find(&archive(&[(name, list)])).unwrap();
    assert_eq!(listed("lib/modules/6.1/modules.builtin"), Some(Module::BuiltIn));
    assert_eq!(listed("home/modules.builtin"), None);
    let other = archive(&[("lib/modules/6.1/modules.builtin", b"kernel/drivers/virtio/virtio_mem2.ko\n")]);
    assert_eq!(find(&other).unwrap(), None);
    assert!(find(&archive(&[("lib/modules/virtio-mem.ko", b"x")])).unwrap().is_some());
    assert_eq!(find(&archive(&[("lib/modules/virtio_mem.ko", b"")])).unwrap(), None, "an empty file");
}

#[test]
fn what_is_not_understood_is_no_answer() {
    let whole = with_module();
    assert_eq!(find(&[]).unwrap(), None);
    assert!(matches!(find(&whole[..200]), Err(Error::CutOff(_))));
    assert!(matches!(find(b"BZh91AY&SY"), Err(Error::UnknownFormat(_))));
    let packed = pack(Format::Gzip, &pack(Format::Gzip, &whole));
    assert!(matches!(find(&packed), Err(Error::Initramfs(_))));
    let mut huge = whole.clone();
    huge[6 + 6 * 8..6 + 7 * 8].copy_from_slice(b"ffffffff");
    assert!(matches!(find(&huge), Err(Error::CutOff(_) | Error::TooLarge { .. })));
    let mut long = whole.clone();
    long[6 + 11 * 8..6 + 12 * 8].copy_from_slice(b"ffffffff");
    assert!(matches!(find(&long), Err(Error::Initramfs(_))));
    let directory = File::open("/").unwrap();
    assert!(matches!(in_initramfs(&directory, "virtio_mem"), Err(Error::Read(_))));
}

#[test]
fn a_parameter_is_found_across_pieces() {
    for before in [0, 1, (256 << 10) - 10, 600_000] {
        let mut kernel = vec![1; before];
        kernel.extend(b"virtio_mem.unplug_online\0");
        kernel.extend(vec![1; 1000]);
        assert!(has_parameter(&mut &kernel[..], "virtio_mem", "unplug_online").unwrap(), "{before}");
        assert!(!has_parameter(&mut &kernel[..], "virtio_mem", "unplug").unwrap());
    }
}

proptest! {
    /// Whatever is in it, it is looked through to an end.
    #[test]
    fn any_change_does_no_harm(
        format in 0usize..6, changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let formats = [Format::Gzip, Format::Lz4, Format::Zstd, Format::Xz, Format::Lzma];
        let mut bytes = formats.get(format).map_or_else(with_module, |format| pack(*format, &with_module()));
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        let _ = find(&bytes);
    }
}
