//! Where file systems lie, and what Linux calls their partitions.

use crate::{MIB, Tree, disk, find, refused, run};

const GPT: &str = "label: gpt
start=1MiB, size=1MiB, type=21686148-6449-6E6F-744E-656564454649
start=2MiB, size=8MiB, type=4f68bce3-e8cd-4db1-96e7-fbcaf984b709, uuid=0A1B2C3D-1111-2222-3333-444455556666
";

fn root() -> Vec<u8> {
    Tree::debian(&["6.1.0-9-amd64"]).ext4(8 * MIB, &[])
}

#[test]
fn a_partition_of_a_gpt_is_found_by_its_uuid() {
    let whole = disk(12, GPT, &[(2, &root())]);
    let (plan, kernel, initrd) = find(whole.clone()).expect("it boots");
    assert_eq!(plan.place, "partition 2 (ext4)");
    assert_eq!(plan.cmdline, "root=PARTUUID=0a1b2c3d-1111-2222-3333-444455556666 ro");
    assert_eq!((kernel.as_str(), initrd.as_str()), ("kernel 6.1.0-9-amd64", "initrd 6.1.0-9-amd64"));
    // The copy at the end serves where the first is damaged.
    for damaged in [512, 1024] {
        let mut disk = whole.clone();
        disk[damaged] ^= 1;
        assert_eq!(find(disk).expect("it boots").0, plan, "{damaged}");
    }
    let mut disk = whole;
    disk[1024] ^= 1;
    let copy = disk.len() - 512 - 32 * 512;
    disk[copy] ^= 1;
    let said = refused(disk);
    assert!(said.contains("partition table is damaged") && said.contains("--kernel"), "{said}");
}

#[test]
fn a_partition_of_an_mbr_is_found_in_its_extended_ones_too() {
    let script = "label: dos\nlabel-id: 0x1234abcd\nstart=1MiB, size=1MiB, type=82\nstart=2MiB, size=20MiB, type=5\n\
                  start=3MiB, size=1MiB, type=83\nstart=5MiB, size=8MiB, type=83\n";
    let (plan, ..) = find(disk(24, script, &[(5, &root())])).expect("it boots");
    assert_eq!(plan.place, "partition 6 (ext4)");
    assert_eq!(plan.cmdline, "root=PARTUUID=1234abcd-06 ro");
}

#[test]
fn a_disk_without_a_table_is_found_by_its_file_system() {
    let (plan, ..) = find(root()).expect("it boots");
    assert_eq!(plan.place, "the disk (ext4)");
    assert_eq!(plan.cmdline, "root=UUID=11111111-2222-3333-4444-555555555555 ro");
    // Without an initramfs the kernel itself has to find it.
    let bare = Tree::new().file("etc/os-release", "").file("boot/vmlinuz-6.1", "kernel").ext4(8 * MIB, &[]);
    let (plan, ..) = find(bare).expect("it boots");
    assert_eq!((plan.cmdline.as_str(), plan.initrd.len()), ("root=/dev/vda ro", 0));
}

#[test]
fn a_chain_of_extended_partitions_may_be_a_loop() {
    let script = "label: dos\nstart=1MiB, size=20MiB, type=5\nstart=2MiB, size=1MiB, type=83\nstart=4MiB, size=1MiB, type=83\n";
    let mut disk = disk(24, script, &[]);
    // The second link leads to itself.
    let second = 3 * MIB;
    assert_eq!(
        disk[second + 510..second + 512],
        [0x55, 0xaa],
        "the second link lies behind the first partition"
    );
    disk[second + 446 + 16 + 4] = 5;
    disk[second + 446 + 16 + 8..][..4].copy_from_slice(&(2 * MIB as u32 / 512).to_le_bytes());
    let said = refused(disk);
    assert!(said.contains("partitions are empty"), "{said}");
}

#[test]
fn what_can_not_be_read_is_named() {
    let swap = {
        let (_directory, path) = crate::file(&vec![0; 2 * MIB]);
        run("mkswap", &[path.to_str().expect("text")], "");
        std::fs::read(path).expect("it was made")
    };
    let mark = |offset: usize, mark: &[u8]| {
        let mut bytes = vec![0; 2 * MIB];
        bytes[offset..][..mark.len()].copy_from_slice(mark);
        bytes
    };
    for (contents, name) in [
        (mark(0, b"XFSB"), "XFS"),
        (mark(0x1_0040, b"_BHRfS_M"), "btrfs"),
        (mark(0, b"LUKS\xba\xbe"), "LUKS (encrypted)"),
        (mark(512, b"LABELONE\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0LVM2 001"), "LVM"),
        (swap, "swap"),
    ] {
        let script = "label: gpt\nstart=1MiB, size=2MiB\n";
        let said = refused(disk(5, script, &[(1, &contents)]));
        assert!(said.contains(&format!("partition 1 holds {name}")) && said.contains("--kernel"), "{said}");
        let said = refused(contents);
        assert!(said.contains(&format!("the disk holds {name}")), "{said}");
    }
    for blank in [vec![0; MIB], vec![0xff; MIB], Vec::new(), b"#!/bin/sh".to_vec()] {
        assert!(refused(blank).contains("neither a partition table nor a file system"));
    }
    let said = refused(disk(12, GPT, &[(2, &Tree::new().ext4(8 * MIB, &[]))]));
    assert!(said.contains("no kernel is on it") && said.contains("looked in partition 2 (ext4)"), "{said}");
}

#[test]
fn what_an_ext4_has_that_is_not_read_is_named() {
    let tree = Tree::debian(&["6.1"]);
    for (feature, word) in
        [("inline_data", "inline_data"), ("^resize_inode,meta_bg", "meta_bg"), ("casefold", "casefold")]
    {
        let said = refused(tree.ext4(8 * MIB, &["-O", feature]));
        assert!(said.contains(word) && said.contains("--kernel"), "{feature}: {said}");
    }
    // Those of other years.
    for options in [
        &["-O", "^metadata_csum,^64bit"][..],
        &["-O", "metadata_csum_seed"],
        &["-b", "1024"],
        &["-I", "128"],
        &["-O", "^has_journal"],
        &["-O", "^extents,^64bit"],
    ] {
        let found = find(tree.ext4(8 * MIB, options));
        assert_eq!(found.expect("it boots").1, "kernel 6.1", "{options:?}");
    }
}
