//! Any bytes as a disk: its partition table, its file system's tables and its files, laid over a good disk so that the
//! search comes far.
#![no_main]

use std::rc::Rc;

use image::disk::partitions;
use image::disk::search::Search;
use libfuzzer_sys::fuzz_target;

/// An ext4 of 128 KiB with a kernel, an entry, links and GRUB's defaults, and without checksums.
static GOOD: &[u8] = include_bytes!("../seeds/ext4.img");

fuzz_target!(|bytes: &[u8]| {
    let Some((how, rest)) = bytes.split_first() else { return };
    let mut disk = match how % 3 {
        0 => rest.to_vec(),
        1 => GOOD.to_vec(),
        // In a partition of an MBR.
        _ => {
            let mut disk = vec![0; 1 << 20];
            disk.extend_from_slice(GOOD);
            disk[446 + 4] = 0x83;
            disk[446 + 8..446 + 16].copy_from_slice(&[0, 8, 0, 0, 0, 2, 0, 0]);
            disk[510..512].copy_from_slice(&[0x55, 0xaa]);
            disk
        }
    };
    if how % 3 > 0 {
        // Each change is a place and a value.
        for change in rest.chunks_exact(4) {
            let place = usize::from(u16::from_le_bytes([change[0], change[1]])) + (usize::from(change[2] % 20) << 16);
            if let Some(byte) = disk.get_mut(place) {
                *byte = change[3];
            }
        }
    }
    let _ = partitions::read(Rc::new(disk.clone()));
    if let Ok(search) = Search::on(Rc::new(disk)) {
        let mut len = 0;
        let mut take = |piece: &[u8]| {
            len += piece.len();
            Ok(())
        };
        let _ = search.kernel(&mut take);
        let _ = search.initrd(&mut take);
        assert!(len as u64 <= image::disk::search::LARGEST_KERNEL + image::disk::search::LARGEST_INITRD);
    }
});
