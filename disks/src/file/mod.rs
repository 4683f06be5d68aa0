//! Files of disks: made, looked at, made larger.
//!
//! What a file is, its name says, or the user: never its contents, which a guest may have written. A disk that is in
//! use is left alone, by the locks that VMs and QEMU's tools take.

mod check;
mod create;
mod info;
mod resize;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use api::units::Bytes;
use devices::virtio::block::disk::DiskError;
use devices::virtio::block::qcow2::HeadError;
use serde::Serialize;

pub use self::check::{Check, check};
pub use self::create::Create;
pub use self::info::{Backing, Info};
pub use self::resize::{NewSize, resize};
use crate::tool::ToolError;

/// Bytes of a sector: sizes are whole ones.
const SECTOR: u64 = 512;
/// The largest disk: half of what a qcow2 image may have of which the device takes the first table.
pub const MOST_SIZE: Bytes = Bytes::gib(1 << 20);

/// What a disk's file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The bytes of the disk.
    Raw,
    /// QEMU's image format.
    Qcow2,
}

impl Format {
    /// By the name: qcow2 where it ends in `.qcow2`, raw otherwise.
    pub fn of_name(path: &Path) -> Self {
        let is_qcow2 = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("qcow2"));
        if is_qcow2 { Self::Qcow2 } else { Self::Raw }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = FileError;

    fn from_str(text: &str) -> Result<Self, FileError> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(FileError::Format(text.to_owned())),
        }
    }
}

/// Why a file was not made, looked at or changed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The disk can't be opened, or is in use.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// What an image says of itself makes no sense.
    #[error("{}: {source}", .path.display())]
    Head {
        /// The image.
        path: PathBuf,
        /// Why.
        source: HeadError,
    },
    /// A program.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// No format.
    #[error("`{0}` is no format of disks: use raw or qcow2")]
    Format(String),
    /// No size.
    #[error("`{0}` is no size of a disk: use whole sectors of 512 bytes, such as 4G, up to {MOST_SIZE}")]
    Size(String),
    /// The name is taken.
    #[error("{} is there already: choose another name, or say --force to replace it", .0.display())]
    Exists(PathBuf),
    /// Something that is no file, such as a device.
    #[error("{} is no file", .0.display())]
    NoFile(PathBuf),
    /// Nothing says how large it is to be.
    #[error("say how large the disk is to be: --size 4G")]
    NoSize,
    /// Raw disks have nothing behind them.
    #[error("only a qcow2 image can have a backing file: choose a name that ends in .qcow2")]
    RawBacking,
    /// It would hide the end of what lies behind it.
    #[error("the disk would have {size}, and the one behind it has {behind}: give it that, or more")]
    SmallerThanBacking {
        /// Asked for.
        size: Bytes,
        /// What there is.
        behind: Bytes,
    },
    /// A name that an image can't hold.
    #[error(
        "the backing file's name can't be written into an image: it is no text, is longer than 1023 bytes, or looks \
         like a protocol's (`word:`)"
    )]
    BackingName,
    /// It would lose its end.
    #[error(
        "the disk has {is}, and would have {asked}: disks are only made larger, as the end of a smaller one would be \
         lost"
    )]
    Smaller {
        /// What it has.
        is: Bytes,
        /// Asked for.
        asked: Bytes,
    },
    /// A version 2 image can't say that something is zero.
    #[error(
        "{} is a qcow2 image of version 2 with a backing file, which can't be made larger: `qemu-img amend -o \
         compat=1.1` makes it version 3", .0.display()
    )]
    OldOverlay(PathBuf),
    /// The host's files.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What a program said can't be read.
    #[error("what qemu-img says of {} can't be read", .0.display())]
    Answer(PathBuf),
}

/// `map_err` with the file.
fn io_of(path: &Path) -> impl Fn(io::Error) -> FileError {
    move |source| FileError::Io { path: path.to_owned(), source }
}

/// The size that a disk may have which is next below: people write 1.1G.
///
/// # Errors
/// [`FileError::Size`] where no disk may have that, or less than a sector is left.
pub fn whole(size: Bytes) -> Result<Bytes, FileError> {
    let whole = Bytes(size.0 - size.0 % SECTOR);
    let fits = whole > Bytes::ZERO && whole <= MOST_SIZE;
    if fits { Ok(whole) } else { Err(FileError::Size(size.0.to_string())) }
}
