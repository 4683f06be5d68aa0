//! Partition tables: GPT (UEFI 2.10, section 5.3), MBR with its extended partitions, and disks that have none.

use std::rc::Rc;

use crc::{CRC_32_ISO_HDLC, Crc};
use uuid::Uuid;

use super::SearchError;
use super::fields::Fields;
use super::source::{Source, View};

const CRC32: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// Partitions that are looked at, at most: as many as a usual GPT has.
const MOST: usize = 128;
/// Bytes of the entries of a GPT at most; usual ones have 16 KiB.
const MOST_ENTRIES: u64 = 1 << 20;
/// Bytes of an MBR, and the unit of its numbers.
const SECTOR: u64 = 512;
/// Bytes of a block that a GPT may count in.
const BLOCKS: [u64; 2] = [512, 4096];

/// A root file system for x86-64 (Discoverable Partitions Specification).
const ROOT_X86_64: Uuid = Uuid::from_u128(0x4f68bce3_e8cd_4db1_96e7_fbcaf984b709);

/// A part of a disk that may hold a file system.
#[derive(Clone)]
pub struct Volume {
    /// Its bytes.
    pub view: View,
    /// Its number in the partition table, from 1 on; `None` for a disk without one.
    pub number: Option<u32>,
    /// What Linux calls its PARTUUID.
    pub partuuid: Option<String>,
    /// Whether the table says that it is a root file system.
    pub is_root: bool,
}

/// The partitions of a disk, in the order of their numbers, or the disk itself where it has no table.
///
/// # Errors
/// [`SearchError::Table`] for a GPT of which no copy is whole; what the disk says.
pub fn read(source: Rc<dyn Source>) -> Result<Vec<Volume>, SearchError> {
    let disk = View::whole(source);
    let first = disk.bytes(0, SECTOR as usize).map_err(SearchError::Read)?;
    let first = Fields(&first);
    let whole = Volume { view: disk.clone(), number: None, partuuid: None, is_root: false };
    // The first sector of a FAT ends like an MBR.
    let is_fat = first.bytes(0x36, 3) == b"FAT" || first.bytes(0x52, 5) == b"FAT32";
    if first.half(510) != 0xaa55 || is_fat {
        return Ok(vec![whole]);
    }
    let entries: Vec<Entry> = (0..4).map(|index| Entry::read(first, index)).collect();
    if entries.iter().any(|entry| entry.kind == 0xee) {
        return gpt(&disk);
    }
    let is_table = |entry: &Entry| matches!(entry.state, 0 | 0x80);
    if !entries.iter().all(is_table) || entries.iter().all(|entry| entry.kind == 0) {
        return Ok(vec![whole]);
    }
    mbr(&disk, first.word(440), &entries)
}

/// An entry of an MBR. Its numbers are sectors.
struct Entry {
    state: u8,
    kind: u8,
    start: u64,
    len: u64,
}

impl Entry {
    fn read(sector: Fields<'_>, index: usize) -> Self {
        let at = 446 + index * 16;
        Self {
            state: sector.byte(at),
            kind: sector.byte(at + 4),
            start: sector.word(at + 8).into(),
            len: sector.word(at + 12).into(),
        }
    }

    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

fn mbr(disk: &View, signature: u32, entries: &[Entry]) -> Result<Vec<Volume>, SearchError> {
    let mut volumes = Vec::new();
    let mut add = |number: u32, start: u64, len: u64| {
        let view = disk.part(start.saturating_mul(SECTOR), len.saturating_mul(SECTOR));
        if view.size() > 0 {
            let partuuid = (signature != 0).then(|| format!("{signature:08x}-{number:02x}"));
            volumes.push(Volume { view, number: Some(number), partuuid, is_root: false });
        }
    };
    for (number, entry) in (1..).zip(entries) {
        if entry.kind != 0 && !entry.is_extended() {
            add(number, entry.start, entry.len);
        }
    }
    let Some(extended) = entries.iter().find(|entry| entry.is_extended()) else { return Ok(volumes) };
    // Each link names one partition, relative to itself, and the next link, relative to the first. They may form a loop.
    let mut link = extended.start;
    for number in 5..=MOST as u32 {
        let sector = disk.bytes(link.saturating_mul(SECTOR), SECTOR as usize).map_err(SearchError::Read)?;
        let sector = Fields(&sector);
        if sector.half(510) != 0xaa55 {
            break;
        }
        let (own, next) = (Entry::read(sector, 0), Entry::read(sector, 1));
        if own.kind != 0 {
            add(number, link.saturating_add(own.start), own.len);
        }
        if !next.is_extended() || next.start == 0 {
            break;
        }
        link = extended.start.saturating_add(next.start);
    }
    Ok(volumes)
}

fn gpt(disk: &View) -> Result<Vec<Volume>, SearchError> {
    let mut why = "there is no GPT behind its protective MBR";
    for block in BLOCKS {
        let last = (disk.size() / block).saturating_sub(1);
        for number in [1, last] {
            match gpt_at(disk, block, number)? {
                Ok(volumes) => return Ok(volumes),
                Err(Some(wrong)) => why = wrong,
                Err(None) => {}
            }
        }
    }
    Err(SearchError::Table(why))
}

/// What is wrong with one copy of a GPT; `None` where nothing looks like one.
type Wrong = Option<&'static str>;

fn gpt_at(disk: &View, block: u64, number: u64) -> Result<Result<Vec<Volume>, Wrong>, SearchError> {
    let read = |offset: u64, len: u64| disk.bytes(offset, len as usize).map_err(SearchError::Read);
    let header = read(number.saturating_mul(block), block)?;
    let fields = Fields(&header);
    if fields.bytes(0, 8) != b"EFI PART" {
        return Ok(Err(None));
    }
    let header_size = fields.word(12) as usize;
    if header_size < 92 || header_size > header.len() {
        return Ok(Err(Some("its header has no possible size")));
    }
    let mut checked = fields.bytes(0, header_size).to_vec();
    if let Some(own) = checked.get_mut(16..20) {
        own.fill(0);
    }
    if CRC32.checksum(&checked) != fields.word(16) || fields.long(24) != number {
        return Ok(Err(Some("the checksum of its header is wrong")));
    }
    let (count, size) = (u64::from(fields.word(80)), u64::from(fields.word(84)));
    let bytes = count.saturating_mul(size);
    if size < 128 || bytes > MOST_ENTRIES {
        return Ok(Err(Some("its entries have no possible size")));
    }
    let entries = read(fields.long(72).saturating_mul(block), bytes)?;
    if entries.len() as u64 != bytes || CRC32.checksum(&entries) != fields.word(88) {
        return Ok(Err(Some("the checksum of its entries is wrong")));
    }
    let volumes = (1..).zip(entries.chunks_exact(size as usize)).filter_map(|(number, entry)| {
        let entry = Fields(entry);
        let kind: [u8; 16] = entry.bytes(0, 16).try_into().unwrap_or_default();
        let own: [u8; 16] = entry.bytes(16, 16).try_into().unwrap_or_default();
        let (first, last) = (entry.long(32), entry.long(40));
        if kind == [0; 16] || last < first {
            return None;
        }
        let blocks = last.saturating_sub(first).saturating_add(1);
        let view = disk.part(first.saturating_mul(block), blocks.saturating_mul(block));
        let is_root = kind == ROOT_X86_64.to_bytes_le();
        (view.size() > 0).then(|| Volume {
            view,
            number: Some(number),
            partuuid: Some(Uuid::from_bytes_le(own).to_string()),
            is_root,
        })
    });
    Ok(Ok(volumes.take(MOST).collect()))
}
