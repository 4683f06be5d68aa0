//! The ELF of a kernel: what of it is loaded, and where it ends.

use std::ops::Range;

use elf::ElfBytes;
use elf::abi::{EM_X86_64, PT_LOAD, SHT_NOBITS};
use elf::endian::LittleEndian;
use elf::file::Class;

use super::IMAGE_SPACE;
use crate::Error;

/// A part of the kernel in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The physical address that it is linked for.
    pub start: u64,
    /// Bytes that it has in memory; what is not in the file is zero.
    pub size: u64,
    /// Where its bytes are in the file.
    pub file: Range<u64>,
}

impl Segment {
    /// The first address behind it.
    pub const fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }

    /// Where in the file the bytes at these addresses are, if they are all there.
    pub fn in_file(&self, addresses: Range<u64>) -> Option<Range<u64>> {
        let offset = addresses.start.checked_sub(self.start)?;
        let start = self.file.start.checked_add(offset)?;
        let end = start.checked_add(addresses.end.checked_sub(addresses.start)?)?;
        (end <= self.file.end).then_some(start..end)
    }
}

/// A kernel's segments in the order of their addresses, which keep apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its segments; there is one at least.
    pub segments: Vec<Segment>,
    /// The physical address that `startup_64` is linked for.
    pub entry: u64,
    /// Where the ELF ends in the file.
    pub end: u64,
}

impl Kernel {
    /// Reads the ELF that `file` begins with.
    ///
    /// # Errors
    /// [`Error::Elf`] where it is none, its segments lie outside it, over each other, below `base`, or further from
    /// it than a kernel can be large.
    pub fn parse(file: &[u8], base: u64) -> Result<Self, Error> {
        let bad = |why: &str| Error::Elf(why.to_owned());
        let parsed =
            ElfBytes::<LittleEndian>::minimal_parse(file).map_err(|error| Error::Elf(error.to_string()))?;
        let head = &parsed.ehdr;
        if head.class != Class::ELF64 || head.e_machine != EM_X86_64 {
            return Err(bad("it is not for x86-64"));
        }
        let length = file.len() as u64;
        // What the file holds has an end within it.
        let end_in_file = |start: u64, size: u64| start.checked_add(size).filter(|end| *end <= length);
        let sections = u64::from(head.e_shnum) * u64::from(head.e_shentsize);
        let mut end = end_in_file(head.e_shoff, sections).ok_or(bad("its sections lie outside it"))?;
        for section in parsed.section_headers().iter().flat_map(|sections| sections.iter()) {
            if section.sh_type != SHT_NOBITS {
                let section = end_in_file(section.sh_offset, section.sh_size);
                end = end.max(section.ok_or(bad("a section lies outside it"))?);
            }
        }
        let mut segments = Vec::new();
        for header in parsed.segments().iter().flat_map(|segments| segments.iter()) {
            let file_end =
                end_in_file(header.p_offset, header.p_filesz).ok_or(bad("a segment lies outside it"))?;
            end = end.max(file_end);
            if header.p_type != PT_LOAD || header.p_memsz == 0 {
                continue;
            }
            let segment =
                Segment { start: header.p_paddr, size: header.p_memsz, file: header.p_offset..file_end };
            if header.p_filesz > header.p_memsz {
                return Err(bad("a segment is larger in it than in memory"));
            }
            if segment.start < base || segment.end() > base.saturating_add(IMAGE_SPACE) {
                return Err(bad("a segment lies where no kernel can be"));
            }
            segments.push(segment);
        }
        segments.sort_by_key(|segment| segment.start);
        if segments.windows(2).any(|pair| matches!(pair, [low, high] if low.end() > high.start)) {
            return Err(bad("two of its segments overlap"));
        }
        let kernel = Self { segments, entry: head.e_entry, end };
        match kernel.in_file(head.e_entry..head.e_entry.saturating_add(1)) {
            Some(_) => Ok(kernel),
            None => Err(bad("its entry lies in no segment")),
        }
    }

    /// Where in the file the bytes at these addresses are, if one segment has them all.
    pub fn in_file(&self, addresses: Range<u64>) -> Option<Range<u64>> {
        self.segments.iter().find_map(|segment| segment.in_file(addresses.clone()))
    }

    /// The first address behind all of it.
    pub fn end_in_memory(&self) -> u64 {
        self.segments.last().map_or(0, Segment::end)
    }
}
