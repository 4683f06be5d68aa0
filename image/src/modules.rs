//! Whether a guest's kernel can have a module: built in, or in its initramfs.
//!
//! An initramfs is one archive behind the other, each a cpio archive or a packed one, with zeros between them (kernel:
//! Documentation/driver-api/early-userspace/buffer-format.rst). It is read once from its start to the module's name, and
//! nothing of it is kept. What can't be read is told, and never taken for an answer.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};

use api::units::Bytes;

use crate::Error;
use crate::kernel::payload::{self, Format};

/// What is unpacked of an initramfs at most.
const LARGEST_UNPACKED: u64 = 2 << 30;
/// Files in it that are looked at.
const MOST_FILES: u32 = 1 << 20;
/// The longest name of a file (`PATH_MAX`).
const LONGEST_NAME: u64 = 4096;
/// What of a list of built-in modules is read. Distributions' have some 10 KiB.
const LONGEST_LIST: u64 = 1 << 20;
/// A header of `newc`: the magic, and 13 numbers in 8 hexadecimal digits.
const HEADER: usize = 6 + 13 * 8;
/// The name behind which an archive ends.
const TRAILER: &[u8] = b"TRAILER!!!";
/// The file in which a kernel's package lists what is built in.
const BUILT_IN: &[u8] = b"modules.builtin";
/// Endings of modules as they are installed.
const ENDINGS: [&[u8]; 4] = [b".ko", b".ko.xz", b".ko.zst", b".ko.gz"];
/// Read at a time.
const CHUNK: usize = 256 << 10;

/// Where a module is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Module {
    /// In the initramfs, by this name.
    InInitramfs(String),
    /// In the kernel.
    BuiltIn,
}

/// Looks for a module in an initramfs: for its file, or its name among those that are built in.
///
/// # Errors
/// [`Error`] says what of it is not understood; the module may be behind that.
pub fn in_initramfs(initramfs: &File, module: &str) -> Result<Option<Module>, Error> {
    let mut initramfs = initramfs;
    initramfs.rewind().map_err(Error::Read)?;
    let mut search = Search { module: module.as_bytes(), left: LARGEST_UNPACKED, files: 0 };
    search.archives(&mut BufReader::with_capacity(CHUNK, initramfs), true)
}

/// Whether an uncompressed kernel has a module built in: the names of its parameters begin with its own
/// (`MODULE_PARAM_PREFIX`), so that `parameter` is in there as text.
///
/// # Errors
/// It can't be read.
pub fn has_parameter(kernel: &mut impl Read, module: &str, parameter: &str) -> io::Result<bool> {
    let wanted = format!("{module}.{parameter}\0");
    let wanted = wanted.as_bytes();
    let mut window = Vec::new();
    loop {
        let had = window.len();
        kernel.by_ref().take(CHUNK as u64).read_to_end(&mut window)?;
        if window.windows(wanted.len()).any(|text| text == wanted) {
            return Ok(true);
        }
        if window.len() == had {
            return Ok(false);
        }
        // It may lie across two pieces.
        window.drain(..window.len().saturating_sub(wanted.len()));
    }
}

struct Search<'a> {
    module: &'a [u8],
    /// What may still be read.
    left: u64,
    files: u32,
}

impl Search<'_> {
    /// All archives that lie one behind the other. Packed ones are looked into only where they are not `packed` again.
    fn archives(&mut self, from: &mut dyn BufRead, may_be_packed: bool) -> Result<Option<Module>, Error> {
        loop {
            skip_zeros(from, &mut self.left)?;
            let start = from.fill_buf().map_err(Error::Read)?;
            if start.is_empty() {
                return Ok(None);
            }
            if start.starts_with(b"07070") {
                if let Some(found) = self.archive(from)? {
                    return Ok(Some(found));
                }
                continue;
            }
            let format = payload::format(start)?;
            if !may_be_packed {
                return Err(Error::Initramfs("something packed is packed in it"));
            }
            let damaged = |why: String| Error::Damaged { format, why };
            let memory = payload::memory_limit();
            let unpacked: Box<dyn Read + '_> = match format {
                Format::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(from)),
                Format::Zstd => {
                    let window = payload::LARGEST_WINDOW;
                    let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(from, window);
                    Box::new(decoder.map_err(|error| damaged(error.to_string()))?)
                }
                Format::Lz4 => Box::new(payload::Lz4Reader::new(from)),
                Format::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(from, true, memory)),
                Format::Lzma => Box::new(
                    lzma_rust2::LzmaReader::new_mem_limit(from, memory, None)
                        .map_err(|error| damaged(error.to_string()))?,
                ),
            };
            // Decoders read ahead: where they end is where this one gives up.
            let found = self.archives(&mut BufReader::with_capacity(CHUNK, unpacked), false);
            return found.map_err(|error| match error {
                Error::Read(error) => damaged(error.to_string()),
                error => error,
            });
        }
    }

    /// One archive, to its end.
    fn archive(&mut self, from: &mut dyn BufRead) -> Result<Option<Module>, Error> {
        loop {
            self.files += 1;
            if self.files > MOST_FILES {
                return Err(Error::Initramfs("it has more files than are looked at"));
            }
            let mut header = [0; HEADER];
            self.read(from, &mut header)?;
            let (size, name_size) = (number(&header, 6), number(&header, 11));
            let (Some(size), Some(name_size)) = (size, name_size) else {
                return Err(Error::Initramfs("a header of a file makes no sense"));
            };
            if name_size == 0 || name_size > LONGEST_NAME {
                return Err(Error::Initramfs("a file's name is longer than any"));
            }
            let mut name = vec![0; name_size as usize];
            self.read(from, &mut name)?;
            self.skip(from, padding(HEADER as u64 + name_size))?;
            let name = name.strip_suffix(b"\0").unwrap_or(&name);
            if name == TRAILER {
                return Ok(None);
            }
            if size > 0 && self.is_module(name) {
                return Ok(Some(Module::InInitramfs(String::from_utf8_lossy(name).into_owned())));
            }
            let mut rest = size;
            if is_named(name, BUILT_IN) && in_modules(name) {
                let mut list = vec![0; size.min(LONGEST_LIST) as usize];
                self.read(from, &mut list)?;
                rest = size - list.len() as u64;
                if list.split(|byte| *byte == b'\n').any(|line| self.is_module(line)) {
                    return Ok(Some(Module::BuiltIn));
                }
            }
            self.skip(from, rest + padding(size))?;
        }
    }

    /// Whether this is a file of the module, as modprobe reads names: `-` and `_` are one.
    fn is_module(&self, name: &[u8]) -> bool {
        let file = name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let same = |(a, b): (&u8, &u8)| a == b || *a == b'-' && *b == b'_';
        let is_name = |stem: &[u8]| stem.len() == self.module.len() && stem.iter().zip(self.module).all(same);
        ENDINGS.iter().any(|ending| file.strip_suffix(*ending).is_some_and(is_name))
    }

    fn read(&mut self, from: &mut dyn BufRead, to: &mut [u8]) -> Result<(), Error> {
        self.take(to.len() as u64)?;
        from.read_exact(to).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::CutOff("an archive in it ends too early"),
            _ => Error::Read(error),
        })
    }

    fn skip(&mut self, from: &mut dyn BufRead, length: u64) -> Result<(), Error> {
        self.take(length)?;
        let skipped = io::copy(&mut from.take(length), &mut io::sink()).map_err(Error::Read)?;
        if skipped == length { Ok(()) } else { Err(Error::CutOff("an archive in it ends too early")) }
    }

    fn take(&mut self, length: u64) -> Result<(), Error> {
        self.left = self.left.checked_sub(length).ok_or_else(too_large)?;
        Ok(())
    }
}

fn too_large() -> Error {
    Error::TooLarge { what: "the unpacked initramfs", limit: Bytes(LARGEST_UNPACKED) }
}

fn skip_zeros(from: &mut dyn BufRead, left: &mut u64) -> Result<(), Error> {
    loop {
        let here = from.fill_buf().map_err(Error::Read)?;
        let zeros = here.iter().take_while(|byte| **byte == 0).count();
        let all = zeros == here.len();
        from.consume(zeros);
        *left = left.checked_sub(zeros as u64).ok_or_else(too_large)?;
        if !all || zeros == 0 {
            return Ok(());
        }
    }
}

/// The number at this place of a header.
fn number(header: &[u8; HEADER], place: usize) -> Option<u64> {
    let digits = header.get(6 + place * 8..6 + (place + 1) * 8)?;
    u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}

/// What follows something of this length up to the next multiple of four.
fn padding(length: u64) -> u64 {
    length.wrapping_neg() % 4
}

fn is_named(path: &[u8], file: &[u8]) -> bool {
    path.rsplit(|byte| *byte == b'/').next() == Some(file)
}

fn in_modules(path: &[u8]) -> bool {
    path.windows(12).any(|part| part == b"lib/modules/")
}
