//! A kernel's ELF, read without its zeros.
//!
//! A tenth or more of a kernel's segments stands for memory that starts as zeros, and Linux's linker script
//! has it in the file all the same, as other sections follow. Fresh guest memory is zero already: to read zeros
//! into it would only cost host memory and time. Section headers say where they are (System V ABI, generic ELF,
//! "Sections"). They are believed only as far as no byte of any other section depends on it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

use crate::arch::x86_64::layout;

/// More headers than any kernel has (6.1: 5 of segments, 39 of sections).
const MOST_SEGMENTS: u16 = 64;
/// The same for sections.
const MOST_SECTIONS: u16 = 512;

/// What sections are aligned to at most, and so more than is filled up between two of them: a huge page.
const MOST_ALIGN: u64 = 2 << 20;

/// What is shorter is read: a system call to pass over it costs more.
const SHORTEST: u64 = 64 << 10;

// Sizes and values of the ELF header, its program headers and its section headers, for 64 bits.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: usize = 64;
const CLASS_64: u8 = 2;
const PT_LOAD: u32 = 1;
const SHT_NULL: u32 = 0;
const SHT_PROGBITS: u32 = 1;
const SHT_NOBITS: u32 = 8;
const SHF_ALLOC: u64 = 2;

/// Memory that Linux works in while it encrypts itself with SME (arch/x86/kernel/vmlinux.lds.S), which is hidden
/// from guests: 4 MiB that nothing else reads or writes.
const SCRATCH: &[u8] = b".init.scratch\0";

/// A kernel's file, from which a read into guest memory passes over zeros.
pub(super) struct SparseElf<'a> {
    file: &'a mut File,
    /// Places in the file, in order and apart.
    zeros: Vec<Range<u64>>,
}

impl<'a> SparseElf<'a> {
    /// A kernel whose headers are read here; all of it is read where they don't make sense.
    pub(super) fn new(file: &'a mut File) -> Self {
        let zeros = zeros(file).unwrap_or_default();
        Self { file, zeros }
    }
}

impl Read for SparseElf<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Seek for SparseElf<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl ReadVolatile for SparseElf<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let begin = self.file.stream_position().map_err(VolatileMemoryError::IOError)?;
        let mut done = 0;
        while done < buffer.len() {
            let (position, left) = (begin.saturating_add(done as u64), (buffer.len() - done) as u64);
            let next = self.zeros.iter().find(|zeros| position < zeros.end);
            if let Some(zeros) = next.filter(|zeros| zeros.start <= position) {
                let passed = left.min(zeros.end - position);
                let to = SeekFrom::Start(position.saturating_add(passed));
                self.file.seek(to).map_err(VolatileMemoryError::IOError)?;
                done += passed as usize;
                continue;
            }
            let count = next.map_or(left, |zeros| left.min(zeros.start - position));
            match self.file.read_volatile(&mut buffer.subslice(done, count as usize)?) {
                Ok(0) => break,
                Ok(count) => done += count,
                // The caller would begin anew, and the file is further on.
                Err(VolatileMemoryError::IOError(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

/// A segment that is loaded.
struct Segment {
    file: Range<u64>,
    address: u64,
    memory: Range<u64>,
    align: u64,
}

struct Section {
    kind: u32,
    flags: u64,
    address: u64,
    offset: u64,
    size: u64,
    is_scratch: bool,
}

impl Section {
    fn is_zero(&self) -> bool {
        self.kind == SHT_NOBITS || self.is_scratch
    }

    /// Where it is in the file, if it is there.
    fn in_file(&self) -> Option<Range<u64>> {
        let is_there = !matches!(self.kind, SHT_NULL | SHT_NOBITS) && self.size > 0;
        // What runs past the end of all numbers runs to it.
        is_there.then(|| self.offset..self.offset.saturating_add(self.size))
    }
}

/// Where the file has zeros that need not be read. `None` is a file whose headers make no sense.
fn zeros(file: &File) -> Option<Vec<Range<u64>>> {
    let length = file.metadata().ok()?.len();
    let header: [u8; HEADER] = at(file, 0)?;
    if header[4] != CLASS_64 {
        return None;
    }
    let segments = segments(file, &header)?;
    let sections = sections(file, &header)?;
    let mut zeros: Vec<Range<u64>> = sections
        .iter()
        .filter(|section| section.flags & SHF_ALLOC != 0 && section.is_zero())
        .filter_map(|section| place(section, &segments, &sections))
        .filter(|zeros| zeros.end - zeros.start >= SHORTEST && zeros.end <= length)
        .collect();
    zeros.sort_by_key(|zeros| zeros.start);
    // What several sections call zero is zero once.
    zeros.dedup_by(|next, before| {
        let meets = next.start <= before.end;
        if meets {
            before.end = before.end.max(next.end);
        }
        meets
    });
    Some(zeros)
}

/// The segments that are loaded; `None` where one could have to do with another's memory, or the boot data's.
fn segments(file: &File, header: &[u8; HEADER]) -> Option<Vec<Segment>> {
    let (start, count) = (u64_in(header, 32)?, u16_in(header, 56)?);
    if usize::from(u16_in(header, 54)?) != PROGRAM_HEADER || count > MOST_SEGMENTS {
        return None;
    }
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let header: [u8; PROGRAM_HEADER] = at(file, start.checked_add(index * PROGRAM_HEADER as u64)?)?;
        let (offset, size) = (u64_in(&header, 8)?, u64_in(&header, 32)?);
        if u32_in(&header, 0)? != PT_LOAD || size == 0 {
            continue;
        }
        let physical = u64_in(&header, 24)?;
        if physical < layout::HIGH_MEMORY.0 {
            return None;
        }
        segments.push(Segment {
            file: offset..offset.checked_add(size)?,
            address: u64_in(&header, 16)?,
            memory: physical..physical.checked_add(size)?,
            align: u64_in(&header, 48)?,
        });
    }
    let apart = |range: fn(&Segment) -> &Range<u64>| {
        let mut ranges: Vec<_> = segments.iter().map(range).collect();
        ranges.sort_by_key(|range| range.start);
        ranges.windows(2).all(|pair| pair[0].end <= pair[1].start)
    };
    (apart(|segment| &segment.file) && apart(|segment| &segment.memory)).then_some(segments)
}

fn sections(file: &File, header: &[u8; HEADER]) -> Option<Vec<Section>> {
    let (start, count, names) = (u64_in(header, 40)?, u16_in(header, 60)?, u16_in(header, 62)?);
    if usize::from(u16_in(header, 58)?) != SECTION_HEADER || count > MOST_SECTIONS || names >= count {
        return None;
    }
    let header_at = |index: u16| -> Option<[u8; SECTION_HEADER]> {
        at(file, start.checked_add(u64::from(index) * SECTION_HEADER as u64)?)
    };
    let names = u64_in(&header_at(names)?, 24)?;
    let read = |index: u16| {
        let header = header_at(index)?;
        let (kind, size) = (u32_in(&header, 4)?, u64_in(&header, 32)?);
        let name = || at(file, names.checked_add(u64::from(u32_in(&header, 0)?))?);
        Some(Section {
            kind,
            flags: u64_in(&header, 8)?,
            address: u64_in(&header, 16)?,
            offset: u64_in(&header, 24)?,
            size,
            is_scratch: kind == SHT_PROGBITS
                && size >= SHORTEST
                && name().is_some_and(|name: [u8; SCRATCH.len()]| name == SCRATCH),
        })
    };
    (0..count).map(read).collect()
}

/// Where the zeros of `section` are in the file: its addresses in the one segment that has them, and what the
/// linker filled up behind them. `None` where any other section has contents there.
fn place(section: &Section, segments: &[Segment], sections: &[Section]) -> Option<Range<u64>> {
    let (segment, start) = segments.iter().find_map(|segment| {
        let inside = section.address.checked_sub(segment.address)?;
        let start = segment.file.start.checked_add(inside)?;
        (start < segment.file.end).then_some((segment, start))
    })?;
    let end = start.checked_add(section.size)?.min(segment.file.end);
    let mut contents = sections.iter().filter(|other| !other.is_zero()).filter_map(Section::in_file);
    if contents.any(|other| other.start < end && start < other.end) {
        return None;
    }
    let others = sections.iter().filter_map(Section::in_file).flat_map(|other| [other.start, other.end]);
    let next = others.filter(|other| *other >= end).min();
    let filled = next.unwrap_or(segment.file.end).min(segment.file.end);
    Some(start..if filled - end < segment.align.min(MOST_ALIGN) { filled } else { end })
}

fn at<const N: usize>(file: &File, offset: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, offset).ok()?;
    Some(bytes)
}

fn u16_in(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

fn u32_in(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn u64_in(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests;
