use std::io;

use api::units::Bytes;

/// What to do where a disk tells no kernel.
const INSTEAD: &str = "name the kernel yourself (--kernel FILE --initrd FILE --append root=DEVICE)";

/// Why a disk is not booted by its own kernel.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// The host can't read it.
    #[error("it can't be read: {0}")]
    Read(io::Error),
    /// A partition table that contradicts itself.
    #[error(
        "its partition table is damaged ({0}): mend it in the guest or with `sgdisk --verify`, or {INSTEAD}"
    )]
    Table(&'static str),
    /// Nothing is on it.
    #[error("it has neither a partition table nor a file system that is known: {INSTEAD}")]
    Blank,
    /// There is no file system that can be read.
    #[error("no file system on it can be read ({0}): {INSTEAD}")]
    Unreadable(String),
    /// There is a file system, and no kernel in it.
    #[error(
        "no kernel is on it, neither in loader/entries nor as vmlinuz or vmlinuz-* in / or /boot ({0}): install one \
         in the guest, or {INSTEAD}"
    )]
    NoKernel(String),
    /// A kernel, and nothing says what its root is.
    #[error(
        "its kernel {0} stands alone: no root file system was found. Say which it is (--append root=DEVICE)"
    )]
    NoRoot(String),
    /// A file system that is not as it should be.
    #[error("the file system of {place} is damaged ({why}): mend it with `e2fsck -f`, or {INSTEAD}")]
    Damaged {
        /// Where it lies.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// A file that is too large for what it is.
    #[error("its {path} has {size}, and {limit} is the most that is taken: {INSTEAD}")]
    TooLarge {
        /// The file.
        path: String,
        /// Its size.
        size: Bytes,
        /// The limit.
        limit: Bytes,
    },
    /// The process that reads the disk says why not.
    #[error("{0}")]
    Refused(String),
    /// That process could not be run.
    #[error("the process that looks for its kernel could not be run: {0}")]
    Helper(io::Error),
    /// That process came to another end, or says what makes no sense.
    #[error("the process that looks for its kernel came to a bad end ({0}): {INSTEAD}")]
    BadEnd(String),
    /// That process took too long.
    #[error("its kernel was not found within {0} seconds: {INSTEAD}")]
    TooSlow(u64),
    /// That process could not be confined.
    #[error("the process that looks for its kernel can't be confined: {0}")]
    Unconfined(String),
    /// What was found can't be kept in memory.
    #[error("the host has no memory for what was found on it: {0}")]
    Memory(io::Error),
}
