//! The journal of a file system that was not closed (Documentation/filesystems/ext4/journal.rst): what was committed
//! and did not reach its place.
//!
//! It is replayed in memory, by the kernel's rules: a block that a later transaction revokes is not put back. Nothing
//! is written to the disk.

use std::collections::BTreeMap;
use std::io;

use crc::{CRC_32_ISCSI, Crc};

use super::Reason;
use crate::disk::SearchError;
use crate::disk::fields::Fields;
use crate::disk::source::View;

const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// The CRC32c of all `parts` together, as the kernel has it: not inverted in the end.
pub fn checksum(parts: &[&[u8]]) -> u32 {
    let mut digest = CRC32C.digest();
    for part in parts {
        digest.update(part);
    }
    !digest.finalize()
}

/// The inode that usual file systems have their journal in.
const JOURNAL_INODE: u32 = 8;
const EXTENTS: u32 = 0x8_0000;
/// Extents of a journal at most: one has 32,768 blocks.
const MOST_EXTENTS: usize = 4096;
/// Blocks of a journal at most: `mke2fs` makes none larger.
const MOST_BLOCKS: u32 = 10_240_000;
/// Blocks that one replay may put back, and that may be revoked: what is committed and waits is a small part.
const MOST_TAGS: usize = 1 << 20;

const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;
const SUPERBLOCKS: [u32; 2] = [3, 4];

const HAS_REVOKES: u32 = 0x1;
const IS_64BIT: u32 = 0x2;
const CHECKSUM_V2: u32 = 0x8;
const CHECKSUM_V3: u32 = 0x10;
const KNOWN: u32 = HAS_REVOKES | IS_64BIT | CHECKSUM_V2 | CHECKSUM_V3;

const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST: u32 = 8;

/// What a journal puts in place of blocks of its file system.
#[derive(Default)]
pub struct Journal {
    block_size: u64,
    seed: Vec<u8>,
    blocks: BTreeMap<u64, Tag>,
}

/// A block in the journal.
#[derive(Clone, Copy, Debug)]
struct Tag {
    /// Where it lies in the file system, in bytes.
    place: u64,
    sequence: u32,
    is_escaped: bool,
    checksum: Option<Checksum>,
}

#[derive(Clone, Copy, Debug)]
enum Checksum {
    Low(u16),
    Whole(u32),
}

/// Ends a reading: by the disk's error, or for a reason.
enum Stop {
    Error(SearchError),
    Reason(&'static str),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Error(SearchError::Read(error))
    }
}

impl Journal {
    /// Reads the journal of the file system in `view` with this superblock.
    ///
    /// # Errors
    /// [`SearchError::Read`] where the disk can't be read. A [`Reason`] where the journal can't be replayed.
    pub fn read(view: &View, superblock: Fields<'_>) -> Result<Result<Self, Reason>, SearchError> {
        match Log::open(view, superblock).and_then(|mut log| log.replay()) {
            Ok(journal) => Ok(Ok(journal)),
            Err(Stop::Error(error)) => Err(error),
            Err(Stop::Reason(why)) => Ok(Err(format!(
                "that was not closed rightly, and its journal can't be replayed here ({why}): start the guest once \
                 with --kernel, or run `e2fsck` on it"
            ))),
        }
    }

    /// Fills `bytes` from `offset` of the file system on, as it is with what the journal holds.
    ///
    /// # Errors
    /// As [`View::read_at`]; `InvalidData` for a block whose checksum is wrong.
    pub fn read_at(&self, view: &View, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        view.read_at(offset, bytes)?;
        if self.blocks.is_empty() {
            return Ok(());
        }
        let end = offset.saturating_add(bytes.len() as u64);
        let blocks = offset / self.block_size..end.div_ceil(self.block_size);
        for (block, tag) in self.blocks.range(blocks) {
            let contents = self.contents(view, tag)?;
            let start = block.saturating_mul(self.block_size);
            let shared = start.max(offset)..start.saturating_add(self.block_size).min(end);
            let within = |from: u64| (shared.start - from) as usize..(shared.end - from) as usize;
            if let (Some(to), Some(from)) = (bytes.get_mut(within(offset)), contents.get(within(start))) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }

    fn contents(&self, view: &View, tag: &Tag) -> io::Result<Vec<u8>> {
        let mut contents = vec![0; self.block_size as usize];
        view.read_at(tag.place, &mut contents)?;
        let own = || checksum(&[&self.seed, &tag.sequence.to_be_bytes(), &contents]);
        let is_right = match tag.checksum {
            None => true,
            Some(Checksum::Low(low)) => own() as u16 == low,
            Some(Checksum::Whole(whole)) => own() == whole,
        };
        if !is_right {
            let why = "a block of its journal has another checksum than was written";
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        if tag.is_escaped
            && let Some(magic) = contents.get_mut(..4)
        {
            magic.copy_from_slice(&MAGIC.to_be_bytes());
        }
        Ok(contents)
    }
}

/// A journal that is being read.
struct Log<'a> {
    view: &'a View,
    block_size: u64,
    /// Its extents: the first block of each within the journal, how many, and where they lie.
    extents: Vec<(u32, u32, u64)>,
    /// Its blocks, of which those from the second on are used in turn.
    first: u32,
    len: u32,
    start: u32,
    sequence: u32,
    features: u32,
    seed: Vec<u8>,
}

impl<'a> Log<'a> {
    fn open(view: &'a View, superblock: Fields<'_>) -> Result<Self, Stop> {
        let block_size = 1024u64 << superblock.word(0x18).min(6);
        let extents = extents(view, superblock, block_size)?;
        let mut log = Self {
            view,
            block_size,
            extents,
            first: 0,
            len: 1,
            start: 0,
            sequence: 0,
            features: 0,
            seed: Vec::new(),
        };
        let bytes = log.block(0)?;
        let head = Fields(&bytes);
        if head.big_word(0) != MAGIC || !SUPERBLOCKS.contains(&head.big_word(4)) {
            return Err(Stop::Reason("it has no superblock"));
        }
        (log.first, log.len) = (head.big_word(0x14), head.big_word(0x10));
        (log.sequence, log.start) = (head.big_word(0x18), head.big_word(0x1c));
        let is_old = head.big_word(4) == 3;
        let compatible = if is_old { 0 } else { head.big_word(0x24) };
        log.features = if is_old { 0 } else { head.big_word(0x28) };
        if u64::from(head.big_word(0xc)) != block_size
            || !(2..=MOST_BLOCKS).contains(&log.len)
            || log.first == 0
            || log.first >= log.len
            || log.start >= log.len
        {
            return Err(Stop::Reason("its superblock contradicts itself"));
        }
        if log.features & !KNOWN != 0 || compatible != 0 {
            return Err(Stop::Reason("it uses fast commits, or another feature that is not known"));
        }
        if log.has(CHECKSUM_V2 | CHECKSUM_V3) {
            let (before, after) = (head.bytes(0, 0xfc), head.bytes(0x100, 1024 - 0x100));
            if head.byte(0x50) != 4 || checksum(&[before, &[0; 4], after]) != head.big_word(0xfc) {
                return Err(Stop::Reason("the checksum of its superblock is wrong"));
            }
        }
        log.seed = head.bytes(0x30, 16).to_vec();
        Ok(log)
    }

    fn has(&self, features: u32) -> bool {
        self.features & features != 0
    }

    /// Where a block of the journal lies, in bytes.
    fn place(&self, block: u32) -> Option<u64> {
        let behind = self.extents.partition_point(|(first, ..)| *first <= block);
        let (first, len, physical) = self.extents.get(behind.checked_sub(1)?)?;
        let within = block - first;
        (within < *len).then(|| physical.saturating_add(within.into()).saturating_mul(self.block_size))
    }

    fn block(&self, block: u32) -> Result<Vec<u8>, Stop> {
        let place = self.place(block).ok_or(Stop::Reason("it has fewer blocks than it says"))?;
        let mut bytes = vec![0; self.block_size as usize];
        self.view.read_at(place, &mut bytes)?;
        Ok(bytes)
    }

    fn after(&self, block: u32) -> u32 {
        if block.saturating_add(1) >= self.len { self.first } else { block + 1 }
    }

    /// Whether the checksum at `at` of a block is that of the block.
    fn is_whole(&self, bytes: &[u8], at: usize) -> bool {
        let (before, after) = (bytes.get(..at).unwrap_or_default(), bytes.get(at + 4..).unwrap_or_default());
        !self.has(CHECKSUM_V2 | CHECKSUM_V3)
            || checksum(&[&self.seed, before, &[0; 4], after]) == Fields(bytes).big_word(at)
    }

    /// The bytes of a block before its checksum.
    fn body<'b>(&self, bytes: &'b [u8]) -> &'b [u8] {
        let tail = if self.has(CHECKSUM_V2 | CHECKSUM_V3) { 4 } else { 0 };
        bytes.get(..bytes.len().saturating_sub(tail)).unwrap_or_default()
    }

    fn replay(&mut self) -> Result<Journal, Stop> {
        let (mut tags, mut revoked) = (Vec::new(), BTreeMap::new());
        // How far both are committed.
        let (mut committed, mut pending) = (0, Vec::new());
        let (mut block, mut sequence) = (self.start, self.sequence);
        let mut visited: u32 = 0;
        // Zero is an empty journal. It ends where a block is none of the transaction that would come next.
        while block != 0 && visited < self.len {
            let bytes = self.block(block)?;
            let head = Fields(&bytes);
            if head.big_word(0) != MAGIC || head.big_word(8) != sequence {
                break;
            }
            block = self.after(block);
            visited = visited.saturating_add(1);
            let tail = bytes.len().saturating_sub(4);
            match head.big_word(4) {
                DESCRIPTOR if self.is_whole(&bytes, tail) => {
                    for (target, tag) in self.tags(&bytes) {
                        let place =
                            self.place(block).ok_or(Stop::Reason("it has fewer blocks than it says"))?;
                        tags.push((target, Tag { place, sequence, ..tag }));
                        block = self.after(block);
                        visited = visited.saturating_add(1);
                    }
                }
                REVOKE if self.is_whole(&bytes, tail) => pending.extend(self.revoked(&bytes)),
                COMMIT if self.is_whole(&bytes, 16) => {
                    committed = tags.len();
                    revoked.extend(pending.drain(..).map(|target| (target, sequence)));
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
            if tags.len() > MOST_TAGS || pending.len().saturating_add(revoked.len()) > MOST_TAGS {
                return Err(Stop::Reason("it is too large"));
            }
        }
        tags.truncate(committed);
        // What a transaction revokes is not put back from it, nor from those before.
        let is_revoked = |target: &u64, tag: &Tag| {
            revoked.get(target).is_some_and(|by: &u32| by.wrapping_sub(tag.sequence).cast_signed() >= 0)
        };
        tags.retain(|(target, tag)| !is_revoked(target, tag));
        Ok(Journal {
            block_size: self.block_size,
            seed: std::mem::take(&mut self.seed),
            blocks: tags.into_iter().collect(),
        })
    }

    /// The blocks that a descriptor names, without their places in the journal.
    fn tags(&self, bytes: &[u8]) -> Vec<(u64, Tag)> {
        let body = self.body(bytes);
        let is_wide = self.has(CHECKSUM_V3);
        let size = match (is_wide, self.has(IS_64BIT)) {
            (true, _) => 16,
            (false, is_64bit) => 8 + if is_64bit { 4 } else { 0 } + if self.has(CHECKSUM_V2) { 2 } else { 0 },
        };
        let (mut tags, mut rest) = (Vec::new(), body.get(12..).unwrap_or_default());
        while let Some((tag, more)) = rest.split_at_checked(size) {
            let tag = Fields(tag);
            let flags = if is_wide { tag.big_word(4) } else { tag.big_half(6).into() };
            let high = if self.has(IS_64BIT) { u64::from(tag.big_word(8)) << 32 } else { 0 };
            let checksum = match (is_wide, self.has(CHECKSUM_V2)) {
                (true, _) => Some(Checksum::Whole(tag.big_word(12))),
                (false, true) => Some(Checksum::Low(tag.big_half(4))),
                (false, false) => None,
            };
            let target = high | u64::from(tag.big_word(0));
            let is_escaped = flags & ESCAPED != 0;
            tags.push((target, Tag { place: 0, sequence: 0, is_escaped, checksum }));
            // The UUID of the file system follows the first.
            let uuid = if flags & SAME_UUID != 0 { 0 } else { 16 };
            rest = more.get(uuid..).unwrap_or_default();
            if flags & LAST != 0 {
                break;
            }
        }
        tags
    }

    /// The blocks that a revoke block names.
    fn revoked(&self, bytes: &[u8]) -> Vec<u64> {
        let used = Fields(bytes).big_word(12) as usize;
        let body = self.body(bytes);
        let entries = body.get(16..used.min(body.len())).unwrap_or_default();
        let entry = |bytes: &[u8]| {
            let fields = Fields(bytes);
            if self.has(IS_64BIT) {
                u64::from(fields.big_word(0)) << 32 | u64::from(fields.big_word(4))
            } else {
                fields.big_word(0).into()
            }
        };
        entries.chunks_exact(if self.has(IS_64BIT) { 8 } else { 4 }).map(entry).collect()
    }
}

/// Where the journal's blocks lie. No transaction moves them: the inode is read from its place.
fn extents(view: &View, superblock: Fields<'_>, block_size: u64) -> Result<Vec<(u32, u32, u64)>, Stop> {
    let inode_size = if superblock.word(0x4c) == 0 { 128 } else { u64::from(superblock.half(0x58)) };
    if superblock.word(0xe0) != JOURNAL_INODE || superblock.word(0x28) < JOURNAL_INODE || inode_size < 128 {
        return Err(Stop::Reason("it lies in an unusual place"));
    }
    let group = u64::from(superblock.word(0x14)).saturating_add(1).saturating_mul(block_size);
    let group = view.bytes(group, 64)?;
    let group = Fields(&group);
    let has_high = superblock.word(0x60) & 0x80 != 0 && superblock.half(0xfe) >= 64;
    let high = if has_high { u64::from(group.word(0x28)) << 32 } else { 0 };
    let table = (high | u64::from(group.word(0x8))).saturating_mul(block_size);
    let inode = table.saturating_add(u64::from(JOURNAL_INODE - 1).saturating_mul(inode_size));
    let inode = view.bytes(inode, 128)?;
    let inode = Fields(&inode);
    if inode.word(0x20) & EXTENTS == 0 {
        return Err(Stop::Reason("it is one of ext3"));
    }
    let mut extents = Vec::new();
    let mut nodes = vec![(inode.bytes(0x28, 60).to_vec(), None)];
    while let Some((node, expected)) = nodes.pop() {
        let head = Fields(&node);
        let (count, depth) = (usize::from(head.half(2)), head.half(6));
        if head.half(0) != 0xf30a || depth > 5 || expected.is_some_and(|expected| expected != depth) {
            return Err(Stop::Reason("its extents make no sense"));
        }
        for entry in node.get(12..).unwrap_or_default().chunks_exact(12).take(count) {
            let entry = Fields(entry);
            if let Some(below) = depth.checked_sub(1) {
                let block = u64::from(entry.half(8)) << 32 | u64::from(entry.word(4));
                let bytes = view.bytes(block.saturating_mul(block_size), block_size as usize)?;
                nodes.push((bytes, Some(below)));
            } else {
                let physical = u64::from(entry.half(6)) << 32 | u64::from(entry.word(8));
                extents.push((entry.word(0), u32::from(entry.half(4)), physical));
            }
            if extents.len().saturating_add(nodes.len()) > MOST_EXTENTS {
                return Err(Stop::Reason("it lies in too many pieces"));
            }
        }
    }
    extents.sort_unstable();
    Ok(extents)
}
