//! Unpacks what a bzImage holds.

use std::fmt;
use std::io::{self, Read};

use api::units::Bytes;

use crate::Error;

/// How kernels are packed (CONFIG_KERNEL_*). LZO and bzip2 are not unpacked here: no distribution uses them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// RFC 1952.
    Gzip,
    /// Its legacy frame.
    Lz4,
    /// RFC 8878.
    Zstd,
    /// With the filter for x86 code.
    Xz,
    /// The format before xz.
    Lzma,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Lz4 => "LZ4",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Lzma => "LZMA",
        })
    }
}

/// First bytes (lib/decompress.c).
const FORMATS: [(&[u8], Format); 5] = [
    (&[0x1f, 0x8b], Format::Gzip),
    (&LZ4_MAGIC, Format::Lz4),
    (&[0x28, 0xb5, 0x2f, 0xfd], Format::Zstd),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], Format::Xz),
    (&[0x5d, 0, 0], Format::Lzma),
];
const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// What one block of LZ4's legacy frame unpacks to at most.
const LZ4_BLOCK: usize = 8 << 20;

/// Kernels are packed with up to 128 MiB of it (`zstd -22 --ultra`, `xz --lzma2=dict=128MiB`).
pub const LARGEST_WINDOW: u64 = 128 << 20;

/// How `payload` is packed.
///
/// # Errors
/// [`Error::UnknownFormat`].
pub fn format(payload: &[u8]) -> Result<Format, Error> {
    let known = FORMATS.iter().find(|(magic, _)| payload.starts_with(magic));
    known.map(|(_, format)| *format).ok_or_else(|| {
        let mut start = [0; 4];
        start.iter_mut().zip(payload).for_each(|(to, from)| *to = *from);
        Error::UnknownFormat(start)
    })
}

/// Unpacks `payload`, which gives no more than `limit` bytes: its last four say how many.
///
/// # Errors
/// [`Error::UnknownFormat`]; [`Error::TooLarge`]; [`Error::Damaged`] where it gives more or less than it says.
pub fn unpack(payload: &[u8], limit: u64) -> Result<Vec<u8>, Error> {
    let format = format(payload)?;
    let (packed, size) = payload.split_last_chunk().ok_or(Error::CutOff("its payload has no size"))?;
    let size = u32::from_le_bytes(*size);
    if u64::from(size) > limit {
        return Err(Error::TooLarge { what: "the unpacked kernel", limit: Bytes(limit) });
    }
    let damaged = |why: String| Error::Damaged { format, why };
    let mut unpacked = Vec::new();
    unpacked.try_reserve_exact(size as usize).map_err(|error| damaged(error.to_string()))?;
    unpacked.resize(size as usize, 0);
    let given = match format {
        // Its own trailer ends with the size.
        Format::Gzip => fill(flate2::read::GzDecoder::new(payload), &mut unpacked),
        Format::Lz4 => unpack_lz4(packed, &mut unpacked),
        Format::Zstd => unpack_zstd(packed, &mut unpacked),
        Format::Xz => fill(lzma_rust2::XzReader::new_mem_limit(packed, false, memory_limit()), &mut unpacked),
        Format::Lzma => lzma_rust2::LzmaReader::new_mem_limit(packed, memory_limit(), None)
            .map_err(|error| error.to_string())
            .and_then(|reader| fill(reader, &mut unpacked)),
    }
    .map_err(damaged)?;
    if given == size as usize {
        Ok(unpacked)
    } else {
        Err(damaged(format!("it gives {given} bytes, and says {size}")))
    }
}

/// In KiB, and with what a decoder needs beside.
pub(crate) fn memory_limit() -> u32 {
    u32::try_from(LARGEST_WINDOW >> 10).unwrap_or(u32::MAX) + 1024
}

/// Reads all of `from`, which is no more than there is room for.
fn fill(mut from: impl Read, room: &mut [u8]) -> Result<usize, String> {
    let mut given = 0;
    while let Some(rest) = room.get_mut(given..).filter(|rest| !rest.is_empty()) {
        match from.read(rest).map_err(|error| error.to_string())? {
            0 => return Ok(given),
            more => given += more,
        }
    }
    // Its end is where checksums are.
    match from.read(&mut [0]).map_err(|error| error.to_string())? {
        0 => Ok(given),
        _ => Err("it gives more than it says".to_owned()),
    }
}

/// LZ4's legacy frame: blocks with their packed sizes. Linux takes frames one behind the other (lib/decompress_unlz4.c).
fn unpack_lz4(packed: &[u8], room: &mut [u8]) -> Result<usize, String> {
    let (mut rest, mut given) = (packed, 0);
    while let Some((size, behind)) = rest.split_first_chunk() {
        if *size == LZ4_MAGIC {
            rest = behind;
            continue;
        }
        let size = u32::from_le_bytes(*size) as usize;
        let (block, behind) = behind.split_at_checked(size).ok_or("a block runs past the payload")?;
        let end = room.len().min(given + LZ4_BLOCK);
        let room = room.get_mut(given..end).unwrap_or_default();
        given += lz4_flex::block::decompress_into(block, room).map_err(|error| error.to_string())?;
        rest = behind;
    }
    if rest.is_empty() { Ok(given) } else { Err("its last block has no size".to_owned()) }
}

fn unpack_zstd(packed: &[u8], room: &mut [u8]) -> Result<usize, String> {
    let mut decoder = ruzstd::decoding::FrameDecoder::new();
    decoder.set_max_window_size(LARGEST_WINDOW);
    let given = decoder.decode_all(packed, room).map_err(|error| error.to_string())?;
    if decoder.get_checksum_from_data().is_some_and(|sum| Some(sum) != decoder.get_calculated_checksum()) {
        return Err("its checksum is wrong".to_owned());
    }
    Ok(given)
}

/// Reads LZ4's legacy frames block by block.
pub(crate) struct Lz4Reader<R> {
    from: R,
    block: Vec<u8>,
    given: usize,
}

impl<R: Read> Lz4Reader<R> {
    pub(crate) fn new(from: R) -> Self {
        Self { from, block: Vec::new(), given: 0 }
    }

    /// Unpacks the next block; false at the end. Zeros may follow it, as they do behind an archive.
    fn next(&mut self) -> io::Result<bool> {
        let damaged = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        let mut size = LZ4_MAGIC;
        while size == LZ4_MAGIC {
            match self.from.read_exact(&mut size) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                read => read?,
            }
        }
        let size = u32::from_le_bytes(size) as usize;
        if size == 0 {
            return Ok(false);
        }
        if size > lz4_flex::block::get_maximum_output_size(LZ4_BLOCK) {
            return Err(damaged("a block is larger than any".to_owned()));
        }
        let mut packed = vec![0; size];
        self.from.read_exact(&mut packed)?;
        self.block.resize(LZ4_BLOCK, 0);
        let length = lz4_flex::block::decompress_into(&packed, &mut self.block);
        self.block.truncate(length.map_err(|error| damaged(error.to_string()))?);
        self.given = 0;
        Ok(true)
    }
}

impl<R: Read> Read for Lz4Reader<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.given == self.block.len() {
            if !self.next()? {
                return Ok(0);
            }
        }
        let here = self.block.get(self.given..).unwrap_or_default();
        let count = here.len().min(to.len());
        to.iter_mut().zip(here).for_each(|(to, byte)| *to = *byte);
        self.given += count;
        Ok(count)
    }
}
