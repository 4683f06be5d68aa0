//! Disks that nobody should have written: each is refused or read, in bounded time.

use std::rc::Rc;
use std::sync::LazyLock;

use crc::{CRC_32_ISO_HDLC, Crc};
use image::disk::partitions;
use image::disk::search::Search;
use proptest::prelude::*;

use crate::journal::{Step, blocks, unclean};
use crate::{MIB, Tree, disk, file, find, text};

static DISK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let tree = Tree::debian(&["6.1", "6.2"])
        .link("vmlinuz", "boot/vmlinuz-6.1")
        .link("initrd.img", "boot/initrd.img-6.1")
        .file("boot/loader/entries/a.conf", "linux /boot/vmlinuz-6.2\n");
    let script = "label: gpt\nstart=1MiB, size=6MiB\n";
    disk(8, script, &[(1, &tree.ext4(6 * MIB, &["-O", "^metadata_csum"]))])
});

/// One that was not closed, without checksums that would tell what was changed.
static UNCLEAN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let steps = [Step::Write(b'1'), Step::Write(b'2'), Step::Revoke, Step::Write(b'3')];
    unclean(&["-b", "1024", "-O", "^metadata_csum"], "jo", &steps)
});

/// Where its journal lies: each place is that of one of its blocks.
static JOURNAL: LazyLock<Vec<u64>> = LazyLock::new(|| {
    let (_directory, path) = file(&UNCLEAN);
    blocks(&text(&path), "<8>")
});

/// Looks, and reads what is found.
fn look(disk: Vec<u8>) {
    if let Ok(search) = Search::on(Rc::new(disk)) {
        let _ = search.kernel(&mut |_| Ok(()));
        let _ = search.initrd(&mut |_| Ok(()));
    }
}

/// A GPT whose checksums are right, whatever it says.
fn gpt(header_size: u32, count: u32, size: u32, at: u64, entries: &[u8]) -> Vec<u8> {
    let crc = |bytes: &[u8]| Crc::<u32>::new(&CRC_32_ISO_HDLC).checksum(bytes);
    let mut disk = vec![0; MIB];
    disk[446 + 4] = 0xee;
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[1024..][..entries.len()].copy_from_slice(entries);
    let start = usize::try_from(at.saturating_mul(512)).unwrap_or(usize::MAX);
    let bytes = (count as usize).saturating_mul(size as usize);
    let covered = disk.get(start..start.saturating_add(bytes)).map_or(0, crc);
    let fields: [(usize, &[u8]); 6] = [
        (0, b"EFI PART"),
        (12, &header_size.to_le_bytes()),
        (24, &1u64.to_le_bytes()),
        (72, &at.to_le_bytes()),
        (80, &[count.to_le_bytes(), size.to_le_bytes()].concat()),
        (88, &covered.to_le_bytes()),
    ];
    for (place, value) in fields {
        disk[512 + place..][..value.len()].copy_from_slice(value);
    }
    let header = disk[512..1024].get(..header_size as usize).map_or(0, crc);
    disk[512 + 16..][..4].copy_from_slice(&header.to_le_bytes());
    disk
}

/// Numbers that matter more often than by chance.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), Just(92), Just(128), Just(512), Just(u32::MAX), 0..300_u32]
}

#[test]
fn a_gpt_by_these_tests_is_one() {
    let mut entry = vec![1; 32];
    entry.extend([2, 0, 0, 0, 0, 0, 0, 0].repeat(2));
    let volumes = partitions::read(Rc::new(gpt(92, 4, 128, 2, &entry))).expect("it is good");
    let [volume] = &volumes[..] else { panic!("{} partitions", volumes.len()) };
    assert_eq!((volume.number, volume.view.size()), (Some(1), 512));
}

/// Where the tables of the file system lie: places that matter.
fn place() -> impl Strategy<Value = usize> {
    prop_oneof![
        // MBR and GPT.
        0..1024_usize,
        1024..1536_usize,
        // The superblock and the groups.
        (MIB + 1024)..(MIB + 2048),
        (MIB + 2048)..(MIB + 8192),
        MIB..(3 * MIB),
    ]
}

proptest! {
    #[test]
    fn no_byte_breaks_the_search(changes in proptest::collection::vec((place(), any::<u8>()), 1..12)) {
        let mut disk = DISK.clone();
        for (place, value) in changes {
            disk[place] = value;
        }
        look(disk);
    }

    #[test]
    fn no_gpt_breaks_it(
        header_size in number(), count in number(), size in number(),
        at in prop_oneof![any::<u64>(), 0..2050_u64], entries in proptest::collection::vec(any::<u8>(), 512),
    ) {
        let disk = gpt(header_size, count, size, at, &entries);
        let len = disk.len() as u64;
        if let Ok(volumes) = partitions::read(Rc::new(disk.clone())) {
            prop_assert!(volumes.len() <= 128);
            prop_assert!(volumes.iter().all(|volume| volume.view.size() <= len));
        }
        look(disk);
    }

    #[test]
    fn no_journal_breaks_it(
        changes in proptest::collection::vec((0..16_usize, 0..128_usize, any::<u8>()), 1..12),
    ) {
        let mut disk = UNCLEAN.clone();
        for (block, place, value) in changes {
            disk[JOURNAL[block] as usize * 1024 + place] = value;
        }
        look(disk);
    }

    #[test]
    fn no_bytes_break_it(
        table in proptest::collection::vec(any::<u8>(), 64), at in 446..1100_usize, len in 0..2_usize,
    ) {
        let mut disk = DISK[..2 * MIB].to_vec();
        disk[at..][..table.len()].copy_from_slice(&table);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk.truncate(len * MIB + at);
        look(disk);
    }

    #[test]
    fn a_disk_that_ends_early_is_refused(len in 0..7 * MIB) {
        // The last of it is free room.
        let found = find(DISK[..len].to_vec());
        prop_assert!(found.is_err() || len > 2 * MIB);
    }
}
