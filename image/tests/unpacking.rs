//! A bzImage becomes what its own decompressor would make of it, and hostile ones are refused within bounds.

use std::fs::File;
use std::io::{Seek, Write};

use image::Error;
use image::kernel::payload::{self, Format};
use image::kernel::prepared::{self, PreparedKernel};
use image::kernel::{IMAGE_SPACE, LINK_MAP};
use image::testing::{BASE, TestKernel, pack};
use proptest::prelude::*;
use vm_memory::VolatileSlice;

const FORMATS: [Format; 5] = [Format::Gzip, Format::Lz4, Format::Zstd, Format::Xz, Format::Lzma];

fn file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(contents).expect("written");
    file.rewind().expect("a file");
    file
}

/// What is made of a bzImage, checked.
fn prepared(image: &[u8]) -> Result<PreparedKernel, Error> {
    let mut made = Vec::new();
    prepared::prepare(image, &mut made)?;
    Ok(PreparedKernel::open(file(&made), &key(image)).expect("what is made can be used"))
}

fn key(image: &[u8]) -> prepared::Key {
    prepared::key(&mut std::io::Cursor::new(image)).expect("memory can be read")
}

/// The kernel in memory, linked `distance` higher.
fn loaded(kernel: &PreparedKernel, distance: u64) -> Vec<u8> {
    let mut memory = vec![0; kernel.shape().size as usize];
    kernel.load(&VolatileSlice::from(&mut memory[..]), distance).expect("loaded");
    memory
}

/// `handle_relocations` of arch/x86/boot/compressed/misc.c, word for word: `unpacked` is its `output` with
/// `output_len`, `memory` what it lies in at [`BASE`].
fn handle_relocations(unpacked: &[u8], memory: &mut [u8], delta: u64, has_inverse: bool) {
    let word = |at: usize| i64::from(i32::from_le_bytes(unpacked[at..at + 4].try_into().expect("four")));
    let place = |extended: i64| (extended as u64).wrapping_sub(LINK_MAP).wrapping_sub(BASE) as usize;
    let mut reloc = unpacked.len() - 4;
    while word(reloc) != 0 {
        let bytes = &mut memory[place(word(reloc))..][..4];
        let value = u32::from_le_bytes((&*bytes).try_into().expect("four"));
        bytes.copy_from_slice(&value.wrapping_add(delta as u32).to_le_bytes());
        reloc -= 4;
    }
    reloc -= 4;
    while has_inverse && word(reloc) != 0 {
        let bytes = &mut memory[place(word(reloc))..][..4];
        let value = i32::from_le_bytes((&*bytes).try_into().expect("four"));
        bytes.copy_from_slice(&value.wrapping_sub(delta as i32).to_le_bytes());
        reloc -= 4;
    }
    if has_inverse {
        reloc -= 4;
    }
    while word(reloc) != 0 {
        let bytes = &mut memory[place(word(reloc))..][..8];
        let value = u64::from_le_bytes((&*bytes).try_into().expect("eight"));
        bytes.copy_from_slice(&value.wrapping_add(delta).to_le_bytes());
        reloc -= 4;
    }
}

#[test]
fn each_format_gives_the_same_kernel() {
    for format in FORMATS {
        let kernel = TestKernel { format, ..TestKernel::default() };
        let ready = prepared(&kernel.bzimage()).unwrap_or_else(|error| panic!("{format}: {error}"));
        assert_eq!(loaded(&ready, 0), kernel.in_memory(), "{format}");
        assert_eq!((ready.shape().base, ready.shape().entry), (BASE, 0), "{format}");
        assert_eq!(ready.relocations().len(), 3, "{format}");
    }
}

#[test]
fn a_kernel_without_relocations_is_one_that_stays() {
    let kernel = TestKernel { runs: Vec::new(), ..TestKernel::default() };
    assert!(prepared(&kernel.bzimage()).expect("it is a kernel").relocations().is_empty());
    // Whatever lies behind a kernel that says that it can't move.
    let mut image = TestKernel::default().bzimage();
    image[0x234] = 0;
    assert!(prepared(&image).expect("it is a kernel").relocations().is_empty());
}

#[test]
fn zeros_are_not_written() {
    let mut data = vec![0; 1 << 20];
    data[..8].copy_from_slice(&(LINK_MAP + BASE).to_le_bytes());
    let kernel = TestKernel { data, runs: vec![vec![], vec![2 << 20]], ..TestKernel::default() };
    let mut made = Vec::new();
    prepared::prepare(&kernel.bzimage(), &mut made).expect("it is a kernel");
    assert!(made.len() < 4 * 4096, "{}", made.len());
    assert_eq!(loaded(&prepared(&kernel.bzimage()).expect("a kernel"), 0), kernel.in_memory());
}

#[test]
fn tables_that_make_no_sense_are_refused() {
    let data = 2 << 20;
    for (what, runs) in [
        ("behind the kernel", vec![vec![4], vec![], vec![data + 3 * 4096 - 4]]),
        ("in what is not in the file", vec![vec![data + 4 * 4096], vec![], vec![data + 8]]),
        ("between the segments", vec![vec![4], vec![3 * 4096], vec![data + 8]]),
        ("no address", vec![vec![4], vec![], vec![16]]),
        ("one run", vec![vec![4]]),
        ("four runs", vec![vec![4], vec![], vec![16], vec![data + 8]]),
    ] {
        let image = TestKernel { runs, ..TestKernel::default() }.bzimage();
        assert!(matches!(prepared(&image), Err(Error::Relocations(_))), "{what}");
    }
    let mut odd = TestKernel::default().unpacked();
    odd.push(0);
    let image = TestKernel::default().bzimage_with(&pack(&odd, Format::Lz4));
    assert!(matches!(prepared(&image), Err(Error::Relocations(_))));
}

/// Some hundred KiB that would give a GiB.
#[test]
fn a_bomb_gives_no_more_than_it_may() {
    let zeros = vec![0; 32 << 20];
    for format in FORMATS {
        let honest = pack(&zeros, format);
        let error = payload::unpack(&honest, 16 << 20).expect_err("too large");
        assert!(matches!(error, Error::TooLarge { .. }), "{format}: {error}");
        // One that lies about its size, which in gzip's trailer is checked by gzip.
        let mut liar = honest;
        let end = liar.len();
        liar[end - 4..].copy_from_slice(&1000u32.to_le_bytes());
        let error = payload::unpack(&liar, 16 << 20).expect_err("it lies");
        assert!(matches!(error, Error::Damaged { .. }), "{format}: {error}");
    }
}

#[test]
fn what_is_packed_otherwise_is_named() {
    // LZO (CONFIG_KERNEL_LZO).
    let error = payload::unpack(&[0x89, 0x4c, 0x5a, 0x4f, 0, 0, 0, 0], 1 << 20).expect_err("not known");
    assert!(error.to_string().contains("89, 4c, 5a, 4f"), "{error}");
    for short in [&[][..], &[0x1f], &[0x28, 0xb5, 0x2f]] {
        assert!(payload::unpack(short, 1 << 20).is_err());
    }
}

#[test]
fn a_prepared_kernel_that_has_changed_is_refused() {
    let image = TestKernel::default().bzimage();
    let mut made = Vec::new();
    prepared::prepare(&image, &mut made).expect("it is a kernel");
    let used = |contents: &[u8]| {
        let kernel = PreparedKernel::open(file(contents), &key(&image))?;
        let mut memory = vec![0; kernel.shape().size as usize];
        kernel.load(&VolatileSlice::from(&mut memory[..]), 0)
    };
    used(&made).expect("it is as it was written");
    let refused = |contents: &[u8]| match used(contents) {
        Err(Error::Prepared(_)) => true,
        other => panic!("{other:?}"),
    };
    for at in (0..made.len()).step_by(61).chain(0..160) {
        let mut changed = made.clone();
        changed[at] ^= 1;
        assert!(refused(&changed), "{at}");
    }
    for length in [0, 15, 143, 144, 200, made.len() - 1] {
        assert!(refused(&made[..length]), "{length}");
    }
    assert!(refused(&[&made[..], &[0]].concat()));
    let other = PreparedKernel::open(file(&made), &key(b"another file"));
    assert!(matches!(other, Err(Error::Prepared(_))));
}

/// Bytes of a prepared kernel with other numbers, under hashes that are right.
fn forged(numbers: [u64; 8], behind: &[u8], image: &prepared::Key) -> Vec<u8> {
    let [.., extents, places_32, inverse_32, places_64] = numbers;
    let places = places_32.saturating_add(inverse_32).saturating_add(places_64);
    let tables = extents.saturating_mul(16).saturating_add(places.saturating_mul(4));
    let (tables, contents) = behind.split_at(behind.len().min(usize::try_from(tables).unwrap_or(usize::MAX)));
    let numbers: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let tables = [key(contents).as_bytes(), &numbers[..], tables].concat();
    [b"ballast kernel\0\x02", &image.as_bytes()[..], key(&tables).as_bytes(), &tables, contents].concat()
}

/// A number that comes to limits.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(BASE),
        Just(2u64 << 20),
        Just(IMAGE_SPACE),
        0..40u64,
        (0..64u32).prop_map(|bit| 1u64 << bit),
        any::<u64>()
    ]
}

proptest! {
    #[test]
    fn relocations_are_those_of_the_kernel(
        code in prop::collection::vec(any::<u8>(), 4096..8192), pointers in prop::collection::vec(0..IMAGE_SPACE, 64),
        add_32 in prop::collection::btree_set(0..4092u64, 0..40), subtract_32 in prop::collection::btree_set(0..4092u64, 0..40),
        add_64 in prop::collection::btree_set(0..64u64, 0..40), has_inverse: bool, step in 0..480u64
    ) {
        let data = pointers.iter().flat_map(|pointer| (LINK_MAP + pointer).to_le_bytes()).collect();
        let run = |places: std::collections::BTreeSet<u64>| places.into_iter().collect::<Vec<u64>>();
        let inverse = has_inverse.then(|| run(subtract_32));
        let runs = [Some(run(add_32)), inverse, Some(run(add_64).iter().map(|n| (2 << 20) + n * 8).collect())];
        let kernel = TestKernel { code, data, runs: runs.into_iter().flatten().collect(), ..TestKernel::default() };
        let delta = step << 21;
        let mut expected = kernel.in_memory();
        handle_relocations(&kernel.unpacked(), &mut expected, delta, has_inverse);
        let ready = prepared(&kernel.bzimage()).expect("it is a kernel");
        prop_assert!(loaded(&ready, delta) == expected);
    }

    #[test]
    fn any_change_to_a_bzimage_is_a_kernel_within_bounds_or_refused(
        changes in prop::collection::vec((0..4000usize, any::<u8>()), 1..20), header in prop::collection::vec((0x1f0..0x268usize, any::<u8>()), 0..3),
        format in prop::sample::select(&FORMATS)
    ) {
        let kernel = TestKernel { format, ..TestKernel::default() };
        let mut image = kernel.bzimage();
        for (at, byte) in header.into_iter().chain(changes.into_iter().map(|(at, byte)| (at + 1024, byte))) {
            if let Some(place) = image.get_mut(at) {
                *place = byte;
            }
        }
        let _ = prepared(&image);
    }

    #[test]
    fn any_change_to_what_is_packed_is_a_kernel_within_bounds_or_refused(
        changes in prop::collection::vec((prop_oneof![0..180usize, 0..30_000usize], any::<u8>()), 1..20), cut in 0..30_000usize
    ) {
        let kernel = TestKernel::default();
        let mut unpacked = kernel.unpacked();
        for (at, byte) in changes {
            if let Some(place) = unpacked.get_mut(at) {
                *place = byte;
            }
        }
        unpacked.truncate(unpacked.len().saturating_sub(cut / 10));
        let image = kernel.bzimage_with(&pack(&unpacked, Format::Lz4));
        if let Ok(ready) = prepared(&image) {
            let shape = ready.shape();
            prop_assert!(shape.entry < shape.size && shape.base + shape.size <= IMAGE_SPACE);
        }
    }

    /// The process that unpacks may have been taken over by what it has unpacked.
    #[test]
    fn whatever_the_helper_gives_stays_within_the_kernel(
        numbers in prop::array::uniform8(number()), behind in prop::collection::vec(any::<u8>(), 0..200), is_plausible: bool
    ) {
        let key = key(b"a file");
        let mut numbers = numbers;
        if is_plausible {
            numbers[..4].copy_from_slice(&[BASE, 2 << 20, 1 << 20, 0]);
        }
        if let Ok(ready) = PreparedKernel::open(file(&forged(numbers, &behind, &key)), &key) {
            prop_assert!(ready.shape().size <= 512 << 20);
            loaded(&ready, 2 << 20);
        }
    }
}

#[test]
fn a_forged_kernel_with_good_numbers_is_taken() {
    let key = key(b"a file");
    let extent = [0u64, 4].iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
    let numbers = [BASE, 2 << 20, 1 << 20, 0, 1, 1, 0, 0];
    let behind = [&extent[..], &4u32.to_le_bytes(), b"code"].concat();
    let ready = PreparedKernel::open(file(&forged(numbers, &behind, &key)), &key).expect("it is whole");
    let memory = loaded(&ready, 2 << 20);
    assert_eq!(&memory[..8], b"code\0\0\x20\0");
    let far = [&extent[..], &((1u32 << 20) - 3).to_le_bytes(), b"code"].concat();
    assert!(PreparedKernel::open(file(&forged(numbers, &far, &key)), &key).is_err());
}
