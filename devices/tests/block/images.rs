//! Images that anybody may have made: none breaks the process that opens it.

use std::fs;
use std::sync::Arc;

use devices::testing::{CARRIERS, RUNNING};
use devices::virtio::block::disk::Disk;
use devices::virtio::block::qcow2::Qcow2Disk;
use devices::virtio::block::raw::Cache;
use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

use super::qcow2::{Image, options};
use super::room::*;

/// A change of an image: where, in clusters and bytes, and to what.
fn change() -> impl Strategy<Value = (u64, u64, u64)> {
    let value = prop_oneof![
        any::<u64>(),
        (0..64u64).prop_map(|bit| 1 << bit),
        // What looks like an entry of a table.
        (0..64u64, any::<bool>()).prop_map(|(cluster, copied)| (cluster << 16) | (u64::from(copied) << 63)),
        (0..64u64).prop_map(|cluster| (1 << 62) | (cluster << 16)),
    ];
    (0..8u64, 0..16u64, value)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_image_breaks_its_process(
        changes in proptest::collection::vec(change(), 1..6), over: bool, len in proptest::option::of(0..20u64),
        sectors in proptest::collection::vec((0..SECTORS - 8, 0..4u8), 1..12),
    ) {
        let image = Image::new();
        let path = image.make("disk.qcow2", over, "cluster_size=64k");
        let mut bytes = fs::read(&path).unwrap();
        for (cluster, word, value) in changes {
            let place = ((cluster << 16) | (word * 8)) as usize;
            if let Some(there) = bytes.get_mut(place..place + 8) {
                there.copy_from_slice(&value.to_be_bytes());
            }
        }
        if let Some(len) = len {
            bytes.truncate((len << 15) as usize);
        }
        fs::write(&path, &bytes).unwrap();
        let Ok(disk) = Qcow2Disk::open(&path, options(Cache::Buffered)) else { return Ok(()) };
        let size = disk.size();
        let mut room = Room::new(CARRIERS[0], Arc::new(disk), 0);
        for (sector, what) in sectors {
            // Whatever comes of it.
            match what {
                0 => {
                    room.request(0, VIRTIO_BLK_T_IN, sector, &[(DATA, 4096, VRING_DESC_F_WRITE)]);
                },
                1 => {
                    room.write(sector, &[1; 4096]);
                }
                2 => {
                    room.clear(VIRTIO_BLK_T_WRITE_ZEROES, sector, 8, 1);
                }
                _ => {
                    room.request(0, VIRTIO_BLK_T_FLUSH, 0, &[]);
                }
            }
        }
        prop_assert_eq!(room.guest.status(), RUNNING);
        prop_assert!(size > 0);
        room.guest.ram.assert_canaries();
    }
}
