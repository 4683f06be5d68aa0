//! Disks that nobody should have written: each is refused or read, in bounded time.

use std::rc::Rc;
use std::sync::LazyLock;

use image::disk::search::Search;
use proptest::prelude::*;

use crate::{MIB, Tree, disk, find};

static DISK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let tree = Tree::debian(&["6.1", "6.2"])
        .link("vmlinuz", "boot/vmlinuz-6.1")
        .link("initrd.img", "boot/initrd.img-6.1")
        .file("boot/loader/entries/a.conf", "linux /boot/vmlinuz-6.2\n");
    let script = "label: gpt\nstart=1MiB, size=6MiB\n";
    disk(8, script, &[(1, &tree.ext4(6 * MIB, &["-O", "^metadata_csum"]))])
});

/// Looks, and reads what is found.
fn look(disk: Vec<u8>) {
    if let Ok(search) = Search::on(Rc::new(disk)) {
        let _ = search.kernel(&mut |_| Ok(()));
        let _ = search.initrd(&mut |_| Ok(()));
    }
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
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_byte_breaks_the_search(changes in proptest::collection::vec((place(), any::<u8>()), 1..12)) {
        let mut disk = DISK.clone();
        for (place, value) in changes {
            disk[place] = value;
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
