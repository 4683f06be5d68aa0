//! A kernel's ELF, read without its zeros.
//!
//! A tenth or more of a kernel's segments stands for memory that starts as zeros, and Linux's linker script
//! has it in the file all the same, as other sections follow. Fresh guest memory is zero already: to read zeros
//! into it would only cost host memory and time. Section headers say where they are (System V ABI, generic ELF,
//! "Sections"). They are believed only as far as no byte of any other section depends on it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use elf::ElfStream;
use elf::abi::{PT_LOAD, SHF_ALLOC, SHT_NOBITS, SHT_NULL, SHT_PROGBITS};
use elf::endian::LittleEndian;
use elf::file::Class;
use elf::section::SectionHeader;
use elf::segment::ProgramHeader;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

use crate::arch::x86_64::layout;

/// More headers than any kernel has (6.1: 5 of segments, 39 of sections).
const MOST_SEGMENTS: usize = 64;
/// The same for sections.
const MOST_SECTIONS: usize = 512;

/// What sections are aligned to at most, and so more than is filled up between two of them: a huge page.
const MOST_ALIGN: u64 = 2 << 20;

/// What is shorter is read: a system call to pass over it costs more.
const SHORTEST: u64 = 64 << 10;

/// Memory that Linux works in while it encrypts itself with SME (arch/x86/kernel/vmlinux.lds.S), which is hidden
/// from guests: 4 MiB that nothing else reads or writes.
const SCRATCH: &str = ".init.scratch";

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

/// A section, and whether it is [`SCRATCH`].
struct Section {
    header: SectionHeader,
    is_scratch: bool,
}

impl Section {
    fn is_zero(&self) -> bool {
        self.header.sh_type == SHT_NOBITS || self.is_scratch
    }

    /// Where it is in the file, if it is there.
    fn in_file(&self) -> Option<Range<u64>> {
        let SectionHeader { sh_type, sh_offset, sh_size, .. } = self.header;
        let is_there = !matches!(sh_type, SHT_NULL | SHT_NOBITS) && sh_size > 0;
        // What runs past the end of all numbers runs to it.
        is_there.then(|| sh_offset..sh_offset.saturating_add(sh_size))
    }
}

/// Where the file has zeros that need not be read. `None` is a file whose headers make no sense.
fn zeros(file: &File) -> Option<Vec<Range<u64>>> {
    let length = file.metadata().ok()?.len();
    // It holds no more than there is in the file.
    let mut elf = ElfStream::<LittleEndian, _>::open_stream(file).ok()?;
    if elf.ehdr.class != Class::ELF64 {
        return None;
    }
    let segments = segments(elf.segments())?;
    let sections = sections(&mut elf)?;
    let mut zeros: Vec<Range<u64>> = sections
        .iter()
        .filter(|section| section.header.sh_flags & u64::from(SHF_ALLOC) != 0 && section.is_zero())
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
fn segments(headers: &[ProgramHeader]) -> Option<Vec<Segment>> {
    if headers.len() > MOST_SEGMENTS {
        return None;
    }
    let mut segments = Vec::new();
    for header in headers.iter().filter(|header| header.p_type == PT_LOAD && header.p_filesz > 0) {
        let ProgramHeader { p_offset, p_vaddr, p_paddr, p_filesz, p_align, .. } = *header;
        if p_paddr < layout::HIGH_MEMORY.0 {
            return None;
        }
        segments.push(Segment {
            file: p_offset..p_offset.checked_add(p_filesz)?,
            address: p_vaddr,
            memory: p_paddr..p_paddr.checked_add(p_filesz)?,
            align: p_align,
        });
    }
    let apart = |range: fn(&Segment) -> &Range<u64>| {
        let mut ranges: Vec<_> = segments.iter().map(range).collect();
        ranges.sort_by_key(|range| range.start);
        ranges.windows(2).all(|pair| pair[0].end <= pair[1].start)
    };
    (apart(|segment| &segment.file) && apart(|segment| &segment.memory)).then_some(segments)
}

fn sections(elf: &mut ElfStream<LittleEndian, &File>) -> Option<Vec<Section>> {
    if elf.section_headers().len() > MOST_SECTIONS {
        return None;
    }
    let (headers, names) = elf.section_headers_with_strtab().ok()?;
    let section = |header: &SectionHeader| {
        let is_scratch = header.sh_type == SHT_PROGBITS
            && header.sh_size >= SHORTEST
            && names
                .as_ref()
                .is_some_and(|names| names.get(header.sh_name as usize).is_ok_and(|name| name == SCRATCH));
        Section { header: *header, is_scratch }
    };
    Some(headers.iter().map(section).collect())
}

/// Where the zeros of `section` are in the file: its addresses in the one segment that has them, and what the
/// linker filled up behind them. `None` where any other section has contents there.
fn place(section: &Section, segments: &[Segment], sections: &[Section]) -> Option<Range<u64>> {
    let (segment, start) = segments.iter().find_map(|segment| {
        let inside = section.header.sh_addr.checked_sub(segment.address)?;
        let start = segment.file.start.checked_add(inside)?;
        (start < segment.file.end).then_some((segment, start))
    })?;
    let end = start.checked_add(section.header.sh_size)?.min(segment.file.end);
    let mut contents = sections.iter().filter(|other| !other.is_zero()).filter_map(Section::in_file);
    if contents.any(|other| other.start < end && start < other.end) {
        return None;
    }
    let others = sections.iter().filter_map(Section::in_file).flat_map(|other| [other.start, other.end]);
    let next = others.filter(|other| *other >= end).min();
    let filled = next.unwrap_or(segment.file.end).min(segment.file.end);
    Some(start..if filled - end < segment.align.min(MOST_ALIGN) { filled } else { end })
}

#[cfg(test)]
mod tests;
