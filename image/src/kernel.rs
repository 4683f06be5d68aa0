//! The kernel in a bzImage.

pub mod elf;
pub mod header;
pub mod payload;
pub mod placement;
pub mod prepared;
pub mod relocations;

use std::ops::Range;

use crate::Error;
use header::SetupHeader;

/// Where the kernel's link addresses begin that stand for physical address 0 (`__START_KERNEL_map`).
pub const LINK_MAP: u64 = 0xffff_ffff_8000_0000;

/// The kernel and all places where it may be moved lie within so much from [`LINK_MAP`] on (`KERNEL_IMAGE_SIZE` with
/// CONFIG_RANDOMIZE_BASE).
pub const IMAGE_SPACE: u64 = 1 << 30;

/// The largest kernel file that is read.
pub const LARGEST_FILE: u64 = 256 << 20;

/// The largest kernel that is unpacked.
pub const LARGEST_UNPACKED: u64 = 512 << 20;

/// Unpacks what the bzImage `image` with this `header` holds: an ELF, and its relocations behind it.
///
/// # Errors
/// [`Error::CutOff`]; what [`payload::unpack`] says.
pub fn unpack(image: &[u8], header: &SetupHeader) -> Result<Vec<u8>, Error> {
    let packed = part(image, header.payload.clone()).ok_or(Error::CutOff("its payload runs past its end"))?;
    payload::unpack(packed, header.init_size)
}

/// The part of `bytes` at `range`, if it is there.
fn part(bytes: &[u8], range: Range<u64>) -> Option<&[u8]> {
    let start = usize::try_from(range.start).ok()?;
    bytes.get(start..usize::try_from(range.end).ok()?)
}

/// Whether a kernel's command line holds `word` alone, as Linux reads it before it has read anything else
/// (`cmdline_find_option_bool`).
pub fn has_word(cmdline: &str, word: &str) -> bool {
    cmdline.split(|character| character <= ' ').any(|other| other == word)
}

/// Whether a kernel's command line has a value for `name`.
pub fn has_value(cmdline: &str, name: &str) -> bool {
    let value_of = |word: &str| word.strip_prefix(name).is_some_and(|rest| rest.starts_with('='));
    cmdline.split(|character| character <= ' ').any(value_of)
}
