use std::io::Write;

use elf::abi::SHT_STRTAB;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

const KIB: u64 = 1 << 10;
/// Where names of sections are in these files, and headers behind them.
const NAMES: u64 = 64;
const HEADERS: u64 = 128;
/// Where the first segment is in these files, and in memory.
const BEGIN: u64 = 64 * KIB;
const MEMORY: u64 = 4096 * KIB;
// Sizes of headers for 64 bits.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: usize = 64;

#[derive(Clone, Debug)]
struct Load {
    offset: u64,
    address: u64,
    physical: u64,
    size: u64,
}

#[derive(Clone, Debug)]
struct Part {
    kind: u32,
    address: u64,
    offset: u64,
    size: u64,
    is_scratch: bool,
}

impl Part {
    const fn new(kind: u32, address: u64, offset: u64, size: u64) -> Self {
        Self { kind, address, offset, size, is_scratch: false }
    }
}

/// A file with these headers, in which every byte of a section with contents is one, and all else `rest`.
fn file(loads: &[Load], parts: &[Part], length: u64, rest: u8) -> Vec<u8> {
    let mut file = vec![rest; length as usize];
    for part in parts.iter().filter(|part| !matches!(part.kind, SHT_NULL | SHT_NOBITS) && !part.is_scratch) {
        let end = part.offset.saturating_add(part.size).min(length);
        file[part.offset.min(length) as usize..end as usize].fill(1);
    }
    let mut put = |at: u64, bytes: &[u8]| file[at as usize..][..bytes.len()].copy_from_slice(bytes);
    let (program, section) = (PROGRAM_HEADER as u64, SECTION_HEADER as u64);
    let sections = HEADERS + loads.len() as u64 * program;
    put(0, &[0; HEADER]);
    put(0, b"\x7fELF\x02\x01\x01");
    put(24, &(1024 * KIB).to_le_bytes());
    put(32, &HEADERS.to_le_bytes());
    put(40, &sections.to_le_bytes());
    for (at, value) in [(54, 56), (56, loads.len()), (58, 64), (60, parts.len() + 2), (62, 1)] {
        put(at, &(value as u16).to_le_bytes());
    }
    put(NAMES, &[0; 64]);
    put(NAMES + 1, SCRATCH.as_bytes());
    for (at, load) in (HEADERS..).step_by(PROGRAM_HEADER).zip(loads) {
        put(at, &[PT_LOAD.to_le_bytes(), [0; 4]].concat());
        let fields = [load.offset, load.address, load.physical, load.size, load.size, MOST_ALIGN];
        fields.iter().zip((at + 8..).step_by(8)).for_each(|(field, at)| put(at, &field.to_le_bytes()));
    }
    put(sections, &[0; 2 * SECTION_HEADER]);
    put(sections + section + 4, &SHT_STRTAB.to_le_bytes());
    put(sections + section + 24, &NAMES.to_le_bytes());
    put(sections + section + 32, &64_u64.to_le_bytes());
    for (at, part) in (sections + 2 * section..).step_by(SECTION_HEADER).zip(parts) {
        put(at, &[u32::from(part.is_scratch).to_le_bytes(), part.kind.to_le_bytes()].concat());
        let fields = [u64::from(SHF_ALLOC), part.address, part.offset, part.size, 0, 0, 0];
        fields.iter().zip((at + 8..).step_by(8)).for_each(|(field, at)| put(at, &field.to_le_bytes()));
    }
    file
}

fn load<F: Read + ReadVolatile + Seek>(kernel: &mut F) -> (Result<KernelLoaderResult, String>, Vec<u8>) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let loaded = Elf::load(&memory, None, kernel, Some(layout::HIGH_MEMORY));
    let mut all = vec![0; MEMORY as usize];
    memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    (loaded.map_err(|error| error.to_string()), all)
}

/// What the loader makes of a file as it is, and without its zeros.
fn both(bytes: &[u8]) -> [(Result<KernelLoaderResult, String>, Vec<u8>); 2] {
    let mut named = NamedTempFile::new().unwrap();
    named.write_all(bytes).unwrap();
    let file = named.as_file_mut();
    let whole = load(file);
    [whole, load(&mut SparseElf::new(file))]
}

/// As Linux's linker script has it: zeros, what fills up to the next huge page, scratch at the end.
fn kernel() -> (Vec<Load>, Vec<Part>) {
    let (text, data) = (0xffff_ffff_8100_0000, 0);
    let loads = vec![
        Load { offset: BEGIN, address: text, physical: 1024 * KIB, size: 1000 * KIB },
        Load { offset: 1100 * KIB, address: data, physical: 2048 * KIB, size: 100 * KIB },
    ];
    let mut scratch = Part::new(SHT_PROGBITS, text + 800 * KIB, BEGIN + 800 * KIB, 200 * KIB);
    scratch.is_scratch = true;
    let parts = vec![
        Part::new(SHT_PROGBITS, text, BEGIN, 300 * KIB),
        Part::new(SHT_NOBITS, text + 300 * KIB, BEGIN + 300 * KIB, 100 * KIB),
        Part::new(SHT_PROGBITS, text + 500 * KIB, BEGIN + 500 * KIB, 100 * KIB),
        // The linker gives zeros at the end no place of their own.
        Part::new(SHT_NOBITS, text + 600 * KIB, BEGIN + 600 * KIB, 80 * KIB),
        Part::new(SHT_NOBITS, text + 700 * KIB, BEGIN + 600 * KIB, 40 * KIB),
        scratch,
        Part::new(SHT_PROGBITS, data, 1100 * KIB, 100 * KIB),
    ];
    (loads, parts)
}

#[test]
fn zeros_of_a_kernel_are_not_read() {
    let (loads, parts) = kernel();
    // What is no section is not zero here, so that reading it shows.
    let [(whole, read), (sparse, left)] = both(&file(&loads, &parts, 1200 * KIB, 7));
    assert_eq!(whole, sparse);
    let count = |memory: &[u8], value| memory.iter().filter(|byte| **byte == value).count() as u64;
    assert_eq!((count(&read, 1), count(&left, 1)), (500 * KIB, 500 * KIB), "contents");
    assert_eq!((count(&read, 7), count(&left, 7)), (600 * KIB, 0), "zeros");
}

#[test]
fn contents_are_read_even_where_a_header_calls_them_zeros() {
    let (loads, mut parts) = kernel();
    for offset in [0, 299, 350, 480, 599] {
        let address = loads[0].address + offset * KIB;
        parts.push(Part::new(SHT_NOBITS, address, 0, 300 * KIB));
        parts.push(Part { is_scratch: true, ..Part::new(SHT_PROGBITS, address, 0, 300 * KIB) });
    }
    let [(_, read), (_, left)] = both(&file(&loads, &parts, 1200 * KIB, 0));
    assert!(read == left);
}

#[test]
fn a_file_that_is_cut_off_within_its_zeros_is_refused() {
    let (loads, parts) = kernel();
    let mut loads = loads;
    loads.truncate(1);
    let [(whole, _), (sparse, _)] = both(&file(&loads, &parts[..6], BEGIN + 999 * KIB, 0));
    assert!(whole.is_err() && whole == sparse, "{whole:?} {sparse:?}");
}

#[test]
fn segments_that_share_memory_or_a_place_in_the_file_are_read_whole() {
    let (loads, parts) = kernel();
    for (offset, physical) in [(1100, 2000), (1000, 2048), (1100, 512)] {
        let mut loads = loads.clone();
        (loads[1].offset, loads[1].physical) = (offset * KIB, physical * KIB);
        let [(whole, read), (sparse, left)] = both(&file(&loads, &parts, 1200 * KIB, 7));
        assert_eq!(whole, sparse);
        assert!(read == left, "{offset} {physical}");
    }
}

/// A place on a coarse grid, so that things meet.
fn place(most: u64) -> impl Strategy<Value = u64> {
    prop_oneof![8 => (0..=most / 16).prop_map(|n| n * 16 * KIB), 1 => 0..most * KIB, 1 => any::<u64>()]
}

fn a_load() -> impl Strategy<Value = Load> {
    (place(1200), place(1200), place(3000), place(600)).prop_map(|(offset, address, physical, size)| Load {
        offset: offset.saturating_add(BEGIN),
        address,
        physical: physical.saturating_add(1024 * KIB),
        size,
    })
}

fn a_part() -> impl Strategy<Value = Part> {
    let kind = prop_oneof![4 => Just(SHT_NOBITS), 4 => Just(SHT_PROGBITS), 1 => 0..12u32];
    (kind, place(1200), place(1200), place(600), any::<bool>()).prop_map(
        |(kind, address, offset, size, is_scratch)| Part {
            kind,
            address,
            offset: offset.saturating_add(BEGIN),
            size,
            is_scratch: is_scratch && kind == SHT_PROGBITS && size >= SHORTEST,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Memory is what it would be, whatever the headers say, as long as only contents are not zero.
    #[test]
    fn nothing_is_lost(
        loads in vec(a_load(), 1..4),
        parts in vec(a_part(), 0..10),
        length in 64..2000u64,
    ) {
        let [(whole, read), (sparse, left)] = both(&file(&loads, &parts, length.max(64) * KIB, 0));
        prop_assert_eq!(&whole, &sparse);
        prop_assert!(whole.is_err() || read == left);
    }

    #[test]
    fn headers_of_any_bytes_are_read(mut bytes in vec(any::<u8>(), 64..1000), counts in any::<[u8; 4]>()) {
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        // So that more than sizes of headers is looked at.
        for (at, value) in [(54, 56), (56, counts[0]), (58, 64), (60, counts[1]), (62, counts[2])] {
            bytes[at..at + 2].copy_from_slice(&u16::from(value).to_le_bytes());
        }
        for at in [32, 40] {
            bytes[at + 1..at + 8].fill(0);
        }
        let [(whole, _), (sparse, _)] = both(&bytes);
        prop_assert_eq!(whole, sparse);
    }
}
