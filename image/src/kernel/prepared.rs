//! An unpacked kernel as a file: what of it is not zero, and its relocations.
//!
//! A third of a kernel's ELF is zeros (page tables to come, the room between its segments), and a guest's memory
//! is zero already. So what is left of it is what has to be written.
//!
//! All numbers have their low byte first: 16 bytes that name the format, the hash of the bzImage, the hash of all that
//! follows up to the contents; the hash of the contents, eight numbers of 64 bits ([`Shape`]), the extents (distance
//! from the kernel's first byte, length), the places of the relocations in 32 bits each; and the contents, which are
//! the bytes of the extents.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::PathBuf;

use vm_memory::{VolatileMemory, VolatileSlice, bitmap::BitmapSlice};

use super::elf::Kernel;
use super::header::{SMALLEST_ALIGNMENT, SetupHeader};
use super::relocations::{self, Relocations};
use super::{IMAGE_SPACE, LARGEST_UNPACKED, part};
use crate::Error;

/// What files begin with; the last byte is the version.
const MAGIC: [u8; 16] = *b"ballast kernel\0\x02";
/// Bytes of a hash.
const HASH: usize = blake3::OUT_LEN;
/// Numbers before the extents.
const NUMBERS: usize = 8;
/// Bytes before the extents.
const HEAD: usize = MAGIC.len() + 3 * HASH + NUMBERS * size_of::<u64>();
/// What is looked at for zeros: a page, as the host gives memory by pages.
const PAGE: usize = 4096;
/// Read at a time.
const CHUNK: usize = 256 << 10;

/// The hash of a bzImage's whole file.
pub type Key = blake3::Hash;

/// The key of a bzImage.
///
/// # Errors
/// It can't be read.
pub fn key(image: &mut (impl Read + Seek)) -> io::Result<Key> {
    image.rewind()?;
    hash(image)
}

fn hash(from: &mut impl Read) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(hasher.finalize()),
            Ok(given) => {
                hasher.update(chunk.get(..given).unwrap_or_default());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The numbers of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The physical address that it is linked for, a multiple of `alignment`.
    pub base: u64,
    /// What its address has to be a multiple of.
    pub alignment: u64,
    /// Memory that it takes from `base` on before it manages memory itself.
    pub size: u64,
    /// Where its first vCPU starts (`startup_64`), from `base` on.
    pub entry: u64,
}

/// Unpacks the kernel in the bzImage `image`, and writes it to `to` as a file of this kind.
///
/// # Errors
/// [`Error`] says what of it is not understood.
pub fn prepare(image: &[u8], to: &mut impl Write) -> Result<(), Error> {
    let header = SetupHeader::parse(image)?;
    let file = super::unpack(image, &header)?;
    let kernel = Kernel::parse(&file, header.base)?;
    let relocations = match Relocations::parse(&file, &kernel, header.base)? {
        Some(relocations) if header.is_relocatable => relocations,
        _ => Relocations::default(),
    };
    let mut extents: Vec<(u64, Range<u64>)> = Vec::new();
    for segment in &kernel.segments {
        for page in pages(segment.file.clone()) {
            if part(&file, page.clone()).is_none_or(|bytes| bytes.iter().all(|byte| *byte == 0)) {
                continue;
            }
            let place = segment.start - header.base + (page.start - segment.file.start);
            match extents.last_mut() {
                Some((start, last))
                    if last.end == page.start && *start + (last.end - last.start) == place =>
                {
                    last.end = page.end;
                }
                _ => extents.push((place, page)),
            }
        }
    }
    let shape = [
        header.base,
        header.alignment,
        kernel.end_in_memory() - header.base,
        kernel.entry - header.base,
        extents.len() as u64,
        relocations.add_32.len() as u64,
        relocations.subtract_32.len() as u64,
        relocations.add_64.len() as u64,
    ];
    let contents = || extents.iter().filter_map(|(_, extent)| part(&file, extent.clone()));
    let mut hasher = blake3::Hasher::new();
    for bytes in contents() {
        hasher.update(bytes);
    }
    let mut tables = hasher.finalize().as_bytes().to_vec();
    tables.extend(shape.iter().flat_map(|number| number.to_le_bytes()));
    for (place, extent) in &extents {
        tables.extend([*place, extent.end - extent.start].iter().flat_map(|number| number.to_le_bytes()));
    }
    for places in [&relocations.add_32, &relocations.subtract_32, &relocations.add_64] {
        tables.extend(places.iter().flat_map(|place| place.to_le_bytes()));
    }
    let head =
        [&MAGIC[..], blake3::hash(image).as_bytes(), blake3::hash(&tables).as_bytes(), &tables].concat();
    to.write_all(&head).map_err(Error::Write)?;
    contents().try_for_each(|bytes| to.write_all(bytes)).map_err(Error::Write)
}

/// `range` in pieces of a page at most.
fn pages(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range.step_by(PAGE).map(move |start| start..end.min(start + PAGE as u64))
}

/// A file of this kind whose tables have been checked. Its contents are checked when they are [loaded](Self::load), so
/// that they are read once.
#[derive(Debug)]
pub struct PreparedKernel {
    file: File,
    /// The hash of its contents.
    expected: blake3::Hash,
    /// Where it is kept for the next start.
    kept: Option<PathBuf>,
    shape: Shape,
    /// Where in memory, from the kernel's first byte on, and how long.
    extents: Vec<(usize, usize)>,
    contents: u64,
    relocations: Relocations,
}

impl PreparedKernel {
    /// Checks a file that was made of the bzImage with this `key`.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Prepared`] where its tables are not as they were written, or say what no kernel has.
    pub fn open(mut file: File, key: &Key) -> Result<Self, Error> {
        let length = file.metadata().map_err(Error::Read)?.len();
        file.rewind().map_err(Error::Read)?;
        let mut head = [0; HEAD];
        file.read_exact(&mut head).map_err(|_| Error::Prepared("it is cut off"))?;
        let (magic, rest) = head.split_first_chunk().unwrap_or((&[0; 16], &[]));
        let (made_of, rest) = rest.split_first_chunk::<HASH>().unwrap_or((&[0; HASH], &[]));
        let (of_tables, rest) = rest.split_first_chunk::<HASH>().unwrap_or((&[0; HASH], &[]));
        let mut hasher = blake3::Hasher::new();
        hasher.update(rest);
        let (of_contents, numbers) = rest.split_first_chunk::<HASH>().unwrap_or((&[0; HASH], &[]));
        if *magic != MAGIC || made_of != key.as_bytes() {
            return Err(Error::Prepared("it was made of another kernel, or by another ballast"));
        }
        let mut numbers = numbers.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        let mut number = || numbers.next().unwrap_or_default();
        let shape = Shape { base: number(), alignment: number(), size: number(), entry: number() };
        shape.check()?;
        let [extents, places @ ..] = [number(), number(), number(), number()];
        let too_many = Error::Prepared("it has more parts than a kernel");
        let relocations: u64 = places.iter().fold(0, |sum, count| sum.saturating_add(*count));
        if extents > shape.size.div_ceil(PAGE as u64) || relocations > relocations::MOST as u64 {
            return Err(too_many);
        }
        let mut tables = vec![0; (extents * 16 + relocations * 4) as usize];
        file.read_exact(&mut tables).map_err(|_| Error::Prepared("it is cut off"))?;
        hasher.update(&tables);
        if hasher.finalize() != *of_tables {
            return Err(Error::Prepared("its tables have changed"));
        }
        let (spans, words) = tables.split_at_checked(extents as usize * 16).ok_or(too_many)?;
        let outside = || Error::Prepared("a part of it lies outside the kernel");
        let (mut extents, mut end, mut total) = (Vec::new(), 0, 0u64);
        for span in spans.as_chunks::<16>().0 {
            let (start, length) = span.split_at(8);
            let [start, length] =
                [start, length].map(|bytes| bytes.try_into().map_or(u64::MAX, u64::from_le_bytes));
            if start < end || length == 0 {
                return Err(Error::Prepared("two parts of it lie in one place"));
            }
            end = start.checked_add(length).filter(|end| *end <= shape.size).ok_or_else(outside)?;
            total += length;
            extents.push((start as usize, length as usize));
        }
        let contents = HEAD as u64 + tables.len() as u64;
        if length != contents + total {
            return Err(Error::Prepared("it is longer or shorter than it says"));
        }
        let mut words = words.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        let mut places = places.iter().zip([4, 4, 8]).map(|(count, width)| {
            let places: Vec<u32> = words.by_ref().take(*count as usize).collect();
            let inside = places.iter().all(|place| u64::from(*place) + width <= shape.size);
            if inside { Ok(places) } else { Err(outside()) }
        });
        let mut next = || places.next().unwrap_or_else(|| Err(outside()));
        let relocations = Relocations { add_32: next()?, subtract_32: next()?, add_64: next()? };
        let expected = blake3::Hash::from_bytes(*of_contents);
        Ok(Self { file, expected, kept: None, shape, extents, contents, relocations })
    }

    /// It is kept in this file.
    pub(crate) fn kept_in(self, path: PathBuf) -> Self {
        Self { kept: Some(path), ..self }
    }

    /// Removes it from where it is kept, as it can't be [loaded](Self::load): the next start unpacks anew.
    pub fn forget(&self) {
        if let Some(path) = &self.kept {
            // One that stays costs the next start as much as this one.
            let _ = fs::remove_file(path);
        }
    }

    /// Its numbers.
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// Its relocations. Without any it can't move.
    pub const fn relocations(&self) -> &Relocations {
        &self.relocations
    }

    /// What of it is not zero, one part behind the other. Nobody has checked it.
    ///
    /// # Errors
    /// It can't be read.
    pub fn contents(&self) -> io::Result<impl Read> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.contents))?;
        Ok(file)
    }

    /// Puts it into `memory`, which holds zeros and is as large as it ([`Shape::size`]), linked `distance` higher than
    /// for [`Shape::base`].
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Prepared`] where it is not as it was written. Then `memory` holds a part of it.
    pub fn load<B: BitmapSlice>(&self, memory: &VolatileSlice<'_, B>, distance: u64) -> Result<(), Error> {
        let read = |error: vm_memory::VolatileMemoryError| Error::Read(io::Error::other(error.to_string()));
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.contents)).map_err(Error::Read)?;
        let (mut hasher, mut chunk) = (blake3::Hasher::new(), vec![0; CHUNK]);
        for &(start, length) in &self.extents {
            for done in (0..length).step_by(CHUNK) {
                let piece = chunk.get_mut(..CHUNK.min(length - done)).unwrap_or_default();
                file.read_exact(piece).map_err(Error::Read)?;
                hasher.update(piece);
                memory.get_slice(start + done, piece.len()).map_err(read)?.copy_from(piece);
            }
        }
        if hasher.finalize() != self.expected {
            return Err(Error::Prepared("its contents have changed"));
        }
        self.relocations.apply(memory, distance).map_err(read)
    }
}

impl Shape {
    fn check(&self) -> Result<(), Error> {
        let Self { base, alignment, size, entry } = *self;
        let is_aligned = alignment.is_power_of_two() && alignment >= SMALLEST_ALIGNMENT;
        if is_aligned
            && base.is_multiple_of(alignment)
            && base.saturating_add(size) <= IMAGE_SPACE.min(base.saturating_add(LARGEST_UNPACKED))
            && entry < size
        {
            Ok(())
        } else {
            Err(Error::Prepared("its numbers are no kernel's"))
        }
    }
}
