use std::io;
use std::path::PathBuf;

use api::units::Bytes;

/// Why a kernel was not unpacked. It can still unpack itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No setup header.
    #[error("it has no header of a bzImage")]
    NotABzImage,
    /// A header that lacks fields.
    #[error(
        "its boot protocol is {}.{:02}, and the fields that this takes came with 2.12 (Linux 3.8)",
        .0 >> 8,
        .0 & 0xff
    )]
    OldProtocol(u16),
    /// A field of the header that contradicts others.
    #[error("its header makes no sense: {0}")]
    Header(&'static str),
    /// The file ends too early.
    #[error("it is cut off: {0}")]
    CutOff(&'static str),
    /// Something is larger than any kernel.
    #[error("{what} is larger than the {limit} that it may have")]
    TooLarge {
        /// What.
        what: &'static str,
        /// The most that it may have.
        limit: Bytes,
    },
    /// Packed by something else.
    #[error("it is packed in a way that is not known here (its first bytes are {0:02x?})")]
    UnknownFormat([u8; 4]),
    /// Packed in a known format, and can't be unpacked.
    #[error("its {format} is damaged: {why}")]
    Damaged {
        /// The format.
        format: crate::kernel::payload::Format,
        /// Why.
        why: String,
    },
    /// What was packed is no kernel.
    #[error("what is packed in it is not the ELF of a kernel: {0}")]
    Elf(String),
    /// A table of relocations that does not go with the kernel.
    #[error("its relocations make no sense: {0}")]
    Relocations(&'static str),
    /// What the helper or the cache gave.
    #[error("the unpacked kernel can't be used: {0}")]
    Prepared(&'static str),
    /// An initramfs that is not understood.
    #[error("the initramfs is not understood: {0}")]
    Initramfs(&'static str),
    /// A file that can't be read.
    #[error("it can't be read: {0}")]
    Read(io::Error),
    /// A file that can't be written.
    #[error("the unpacked kernel can't be written: {0}")]
    Write(io::Error),
    /// The helper says why not.
    #[error("{0}")]
    Refused(String),
    /// The helper could not be run.
    #[error("the process that unpacks could not be run: {0}")]
    Helper(io::Error),
    /// The helper came to another end.
    #[error("the process that unpacks came to a bad end: {0}")]
    BadEnd(String),
    /// The helper took too long.
    #[error("it was not unpacked within {0} seconds")]
    TooSlow(u64),
    /// The helper could not be confined.
    #[error("the process that unpacks can't be confined: {0}")]
    Unconfined(String),
    /// A cache that can't be used.
    #[error("the cache {} can't be used: {why}", path.display())]
    Cache {
        /// Its directory.
        path: PathBuf,
        /// Why.
        why: String,
    },
}
