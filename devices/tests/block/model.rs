//! A disk against a model of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use devices::testing::CARRIERS;
use devices::virtio::block::raw::{Cache, RawOptions};
use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;

use super::qcow2::{Image, check, contents};
use super::room::*;

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, u64),
    Zero(u64, u32, bool),
    Flush,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..SECTORS, any::<u8>(), 1..16_usize)
            .prop_map(|(sector, byte, len)| Step::Write(sector, vec![byte; len * 512])),
        (0..SECTORS, 1..32_u64).prop_map(|(sector, len)| Step::Read(sector, len)),
        (0..SECTORS, 1..32_u32, any::<bool>())
            .prop_map(|(sector, len, unmap)| Step::Zero(sector, len, unmap)),
        Just(Step::Flush),
        Just(Step::Restart),
    ]
}

/// Does one step, and the same to the model. Returns whether all before it is flushed.
fn follow(room: &mut Room, model: &mut [u8], step: Step) -> bool {
    let range = |sector: u64, len: usize| sector as usize * 512..sector as usize * 512 + len;
    match step {
        Step::Write(sector, bytes) => {
            let place = model.get_mut(range(sector, bytes.len()));
            assert_eq!(room.write(sector, &bytes), if place.is_some() { OK } else { IO_ERROR });
            if let Some(place) = place {
                place.copy_from_slice(&bytes);
            }
        }
        Step::Read(sector, sectors) => {
            let len = sectors.min(SECTORS - sector) as usize * 512;
            assert_eq!(room.read(sector, len as u32), model[range(sector, len)]);
        }
        Step::Zero(sector, sectors, unmap) => {
            let place = model.get_mut(range(sector, sectors as usize * 512));
            let status = room.clear(VIRTIO_BLK_T_WRITE_ZEROES, sector, sectors, u32::from(unmap));
            assert_eq!(status, if place.is_some() { OK } else { IO_ERROR });
            if let Some(place) = place {
                place.fill(0);
            }
        }
        Step::Flush => {
            assert_eq!(room.request(0, VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
            return true;
        }
        Step::Restart => room.guest.start(0),
    }
    false
}

fn cache(direct: bool) -> Cache {
    if direct { Cache::Direct } else { Cache::Buffered }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_raw_disk_is_what_was_written(steps in proptest::collection::vec(step(), 1..60), direct: bool) {
        let file = file();
        let mut model = content();
        let disk = raw(file.as_path(), RawOptions { cache: cache(direct), ..WRITABLE });
        let mut room = Room::new(CARRIERS[0], disk, 0);
        for step in steps {
            follow(&mut room, &mut model, step);
        }
        let mut bytes = vec![0; model.len()];
        File::open(file.as_path()).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        prop_assert_eq!(bytes, model);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// What was flushed is there if the process is killed at any moment: its writes to the file are what the
    /// next process finds.
    #[test]
    fn an_image_survives_its_process(
        steps in proptest::collection::vec(step(), 1..60), over: bool, direct: bool, small: bool,
        ends in 0..60_usize,
    ) {
        let image = Image::new();
        let made = if small { "cluster_size=512" } else { "cluster_size=64k" };
        let path = image.make("disk.qcow2", over, made);
        let mut model = content();
        let mut room = Room::new(CARRIERS[0], super::qcow2::open(&path, cache(direct)), 0);
        let mut flushed = None;
        for (number, step) in steps.into_iter().enumerate() {
            if follow(&mut room, &mut model, step) {
                flushed = Some(model.clone());
            } else {
                flushed = None;
            }
            if number == ends {
                break;
            }
        }
        let killed = image.path("killed.qcow2");
        fs::copy(&path, &killed).unwrap();
        check(&killed, true);
        if let Some(flushed) = flushed {
            prop_assert!(contents(&killed) == flushed);
        }
        drop(room);
        check(&path, false);
        prop_assert!(contents(&path) == model);
    }
}
