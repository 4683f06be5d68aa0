//! ext2, ext3 and ext4, by the library ext4-view. What lies in the journal is put in its place before it looks
//! (`journal`): the library takes back blocks that were revoked, and does not know all journals.

mod journal;

use ext4_view::{Ext4, Ext4Error, Ext4Read};
use uuid::Uuid;

use self::journal::Journal;
use super::SearchError;
use super::fields::Fields;
use super::files::{Files, MOST_NAMES};
use super::source::View;

/// Where the superblock lies, and its size.
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_SIZE: usize = 1024;

/// A file system with its UUID.
pub struct Ext4Files {
    fs: Ext4,
    place: String,
    /// As Linux writes it.
    pub uuid: String,
}

/// Why a file system is not read, in words that follow the name of its partition.
pub type Reason = String;

/// Incompatible features (Documentation/filesystems/ext4, "Super Block") that are not read, by their names in `mke2fs`.
const UNREAD: [(u32, &str); 8] = [
    (0x1, "compression"),
    (0x8, "journal_dev"),
    (0x10, "meta_bg"),
    (0x100, "mmp"),
    (0x400, "ea_inode"),
    (0x4000, "large_dir"),
    (0x8000, "inline_data"),
    (0x2_0000, "casefold"),
];
const RECOVER: u32 = 0x4;
const METADATA_CHECKSUMS: u32 = 0x400;

// Where the superblock has its features, and its checksum.
const INCOMPATIBLE: usize = 0x60;
const READ_ONLY_COMPATIBLE: usize = 0x64;
const CHECKSUM: usize = 0x3fc;
const INODE_SIZE: usize = 0x58;

/// Bytes of an inode that has room for its checksum.
const INODE_WITH_CHECKSUM: u16 = 0x84;

impl Ext4Files {
    /// Opens the file system in `view`, which errors call `place`.
    ///
    /// # Errors
    /// [`SearchError::Read`] where the disk can't be read. A [`Reason`] where it is this file system that can't.
    pub fn open(view: &View, place: &str) -> Result<Result<Self, Reason>, SearchError> {
        let bytes = view.bytes(SUPERBLOCK, SUPERBLOCK_SIZE).map_err(SearchError::Read)?;
        if let Some(reason) = hindrance(Fields(&bytes), view.size()) {
            return Ok(Err(reason));
        }
        let mut reader = Reader { view: view.clone(), journal: Journal::default(), superblock: bytes };
        if Fields(&reader.superblock).word(INCOMPATIBLE) & RECOVER != 0 {
            match Journal::read(view, Fields(&reader.superblock))? {
                Ok(journal) => reader.journal = journal,
                Err(reason) => return Ok(Err(reason)),
            }
            let read = reader.journal.read_at(view, SUPERBLOCK, &mut reader.superblock);
            read.map_err(SearchError::Read)?;
            if let Some(reason) = hindrance(Fields(&reader.superblock), view.size()) {
                return Ok(Err(reason));
            }
        }
        // A checksum that is wrong is for the library to find.
        let bytes = Fields(&reader.superblock);
        if bytes.word(INCOMPATIBLE) & RECOVER != 0 || bytes.half(INODE_SIZE) < INODE_WITH_CHECKSUM {
            reader.adapt();
        }
        let own: [u8; 16] = Fields(&reader.superblock).bytes(0x68, 16).try_into().unwrap_or_default();
        match Ext4::load(Box::new(reader)) {
            Ok(fs) => Ok(Ok(Self { fs, place: place.to_owned(), uuid: Uuid::from_bytes(own).to_string() })),
            Err(Ext4Error::Io(error)) => Err(SearchError::Read(std::io::Error::other(error.to_string()))),
            Err(error) => Ok(Err(format!("that can't be read ({error}): run `e2fsck` on it"))),
        }
    }

    fn damaged(&self, error: Ext4Error) -> SearchError {
        match error {
            Ext4Error::Io(error) => SearchError::Read(std::io::Error::other(error.to_string())),
            error => SearchError::Damaged { place: self.place.clone(), why: error.to_string() },
        }
    }
}

/// Why a file system with this superblock is not read.
fn hindrance(superblock: Fields<'_>, room: u64) -> Option<Reason> {
    let features = superblock.word(INCOMPATIBLE);
    let unread = UNREAD.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| *name);
    let unread: Vec<&str> = unread.collect();
    if !unread.is_empty() {
        return Some(format!("with {}, which is not read", unread.join(", ")));
    }
    // The library has room for all groups before it looks at one.
    let blocks = u64::from(superblock.word(0x150)) << 32 | u64::from(superblock.word(0x4));
    let per_group = u64::from(superblock.word(0x20));
    let block_bits = superblock.word(0x18).saturating_add(10);
    let size = 1u64.checked_shl(block_bits).and_then(|block| blocks.checked_mul(block));
    if block_bits > 16 || per_group < 256 || size.is_none_or(|size| size > room) {
        return Some("that is damaged: its size is not that of its partition".to_owned());
    }
    None
}

/// The library's way to the disk. It sees a file system that was closed.
struct Reader {
    view: View,
    journal: Journal,
    superblock: Vec<u8>,
}

impl Reader {
    /// Takes off the mark that there is a journal to be replayed. And that there are checksums, where the library looks
    /// for more of them than inodes of the smallest size have.
    fn adapt(&mut self) {
        let superblock = Fields(&self.superblock);
        let features = superblock.word(INCOMPATIBLE) & !RECOVER;
        let mut read_only = superblock.word(READ_ONLY_COMPATIBLE);
        if superblock.half(INODE_SIZE) < INODE_WITH_CHECKSUM {
            read_only &= !METADATA_CHECKSUMS;
        }
        self.put(INCOMPATIBLE, features);
        self.put(READ_ONLY_COMPATIBLE, read_only);
        if read_only & METADATA_CHECKSUMS != 0 {
            self.put(CHECKSUM, journal::checksum(&[Fields(&self.superblock).bytes(0, CHECKSUM)]));
        }
    }

    fn put(&mut self, offset: usize, value: u32) {
        if let Some(place) = self.superblock.get_mut(offset..offset + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.journal.read_at(&self.view, offset, bytes)?;
        let end = offset.saturating_add(bytes.len() as u64);
        let shared = offset.max(SUPERBLOCK)..end.min(SUPERBLOCK + SUPERBLOCK_SIZE as u64);
        if !shared.is_empty() {
            let within = |from: u64| (shared.start - from) as usize..(shared.end - from) as usize;
            let (to, from) = (bytes.get_mut(within(offset)), self.superblock.get(within(SUPERBLOCK)));
            if let (Some(to), Some(from)) = (to, from) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }
}

impl Ext4Read for Reader {
    fn read(
        &mut self,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(Reader::read(self, offset, bytes)?)
    }
}

/// Whether it says that there is no such file.
fn is_missing(error: &Ext4Error) -> bool {
    matches!(
        error,
        Ext4Error::NotFound
            | Ext4Error::NotADirectory
            | Ext4Error::IsADirectory
            | Ext4Error::IsASpecialFile
            | Ext4Error::TooManySymlinks
            | Ext4Error::PathTooLong
            | Ext4Error::MalformedPath
            | Ext4Error::Encrypted
    )
}

impl Files for Ext4Files {
    fn names(&self, directory: &str) -> Result<Vec<String>, SearchError> {
        let entries = match self.fs.read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if is_missing(&error) => return Ok(Vec::new()),
            Err(error) => return Err(self.damaged(error)),
        };
        let mut names = Vec::new();
        for entry in entries.take(MOST_NAMES) {
            let entry = entry.map_err(|error| self.damaged(error))?;
            names.extend(entry.file_name().as_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    fn size(&self, path: &str) -> Result<Option<u64>, SearchError> {
        match self.fs.metadata(path) {
            Ok(metadata) => Ok(metadata.file_type().is_regular_file().then(|| metadata.len())),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(self.damaged(error)),
        }
    }

    fn resolve(&self, path: &str) -> Result<String, SearchError> {
        match self.fs.canonicalize(path) {
            Ok(end) => Ok(std::str::from_utf8(end.as_ref()).unwrap_or(path).to_owned()),
            Err(error) if is_missing(&error) => Ok(path.to_owned()),
            Err(error) => Err(self.damaged(error)),
        }
    }

    fn read(
        &self,
        path: &str,
        take: &mut dyn FnMut(&[u8]) -> Result<(), SearchError>,
    ) -> Result<(), SearchError> {
        let damaged = |error| self.damaged(error);
        let mut file = self.fs.open(path).map_err(damaged)?;
        let mut left = file.metadata().len();
        let mut piece = vec![0; 64 << 10];
        while left > 0 {
            let mut filled = 0;
            while let Some(room) = piece.get_mut(filled..).filter(|room| !room.is_empty()) {
                match file.read_bytes(room).map_err(damaged)? {
                    0 => break,
                    count => filled += count,
                }
            }
            if filled == 0 {
                return Err(SearchError::Damaged {
                    place: self.place.clone(),
                    why: format!("{path} ends early"),
                });
            }
            left = left.saturating_sub(filled as u64);
            take(piece.get(..filled).unwrap_or_default())?;
        }
        Ok(())
    }
}
