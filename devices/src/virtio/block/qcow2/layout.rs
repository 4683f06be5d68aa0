//! Where an image keeps what names its other parts.

use std::collections::BTreeSet;
use std::ops::Range;

/// Bytes of an entry of the first table.
pub const ENTRY: usize = 8;

/// The bits of an entry of the first table that say where its second table lies.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;

/// Bytes of the head that say where the tables lie.
pub const HEAD: usize = 60;

/// What a write is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Data, or counts of references.
    Plain,
    /// A second table (L2), which names clusters.
    Table,
    /// A second table and what lies beside it: where clusters are smaller than what memory is aligned to, past the
    /// page cache several are written at a time.
    Mixed,
    /// The head, or the table of counts: they name what all the rest needs.
    Root,
}

/// Where the parts of an image lie.
#[derive(Debug)]
pub struct Layout {
    /// Bytes of a cluster, a power of two.
    cluster: u64,
    /// The first table (L1).
    table: Range<u64>,
    /// The table of the blocks of counts.
    counts: Range<u64>,
    /// Which entries of the first table name a second one.
    named: Vec<bool>,
    /// Where the second tables lie.
    tables: BTreeSet<u64>,
}

impl Layout {
    /// An image with its first table in `table`, which holds `entries`, and its table of counts in `counts`.
    pub fn new(cluster: u64, table: Range<u64>, counts: Range<u64>, entries: &[u8]) -> Self {
        let mut layout = Self { cluster, table, counts, named: Vec::new(), tables: BTreeSet::new() };
        let start = layout.table.start;
        let (entries, _) = entries.as_chunks::<ENTRY>();
        for (place, entry) in (start..).step_by(ENTRY).zip(entries) {
            layout.learn_entry(place, entry);
        }
        layout
    }

    /// A file that has no parts.
    pub fn plain() -> Self {
        Self { cluster: 1 << 16, table: 0..0, counts: 0..0, named: Vec::new(), tables: BTreeSet::new() }
    }

    /// The part of a piece of the file that is in the first table.
    pub fn in_table(&self, offset: u64, len: u64) -> Option<Range<u64>> {
        let part = self.table.start.max(offset)..self.table.end.min(offset.saturating_add(len));
        (part.start < part.end).then_some(part)
    }

    /// What a write of `len` bytes at `offset` is to.
    pub fn part(&self, offset: u64, len: u64) -> Part {
        let end = offset.saturating_add(len);
        if self.table.is_empty() {
            Part::Plain
        } else if offset < HEAD as u64 || (offset < self.counts.end && end > self.counts.start) {
            Part::Root
        } else {
            let tables = self.tables.range(offset.saturating_sub(self.cluster - 1)..end);
            match u64::try_from(tables.count()).unwrap_or(u64::MAX) {
                0 => Part::Plain,
                // Nothing but tables, whole ones or a piece of one.
                count if count == end.div_ceil(self.cluster).saturating_sub(offset / self.cluster) => {
                    Part::Table
                }
                _ => Part::Mixed,
            }
        }
    }

    /// The entry of the first table at `place` in the file is `entry` from now on.
    pub fn learn_entry(&mut self, place: u64, entry: &[u8; ENTRY]) {
        let there = u64::from_be_bytes(*entry) & PLACE;
        let index = place.checked_sub(self.table.start).map(|bytes| bytes / ENTRY as u64);
        let Some(index) = index.and_then(|index| usize::try_from(index).ok()) else { return };
        if there == 0 || place >= self.table.end {
            return;
        }
        self.tables.insert(there);
        if self.named.len() <= index {
            self.named.resize(index + 1, false);
        }
        if let Some(named) = self.named.get_mut(index) {
            *named = true;
        }
    }

    /// The head says `bytes` from now on. Returns whether the first table is elsewhere; what it names stays the
    /// same.
    pub fn learn_head(&mut self, bytes: &[u8; HEAD]) -> bool {
        let word = |at: usize| {
            let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
            u64::from(bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes)))
        };
        let long = |at: usize| word(at) << 32 | word(at + 4);
        let range = |start: u64, len: u64| start..start.saturating_add(len);
        let table = range(long(40), word(36).saturating_mul(ENTRY as u64));
        self.counts = range(long(48), word(56).saturating_mul(self.cluster));
        let moved = table.start != self.table.start;
        self.table = table;
        moved
    }

    /// Whether all second tables are there for these bytes of the disk.
    pub fn has_tables(&self, disk: &Range<u64>) -> bool {
        let covered = self.covered();
        let first = usize::try_from(disk.start / covered).unwrap_or(usize::MAX);
        let end = usize::try_from(disk.end.div_ceil(covered)).unwrap_or(usize::MAX);
        self.named.get(first..end).is_some_and(|named| named.iter().all(|named| *named))
    }

    /// These bytes of the disk, in pieces that one second table each is for.
    pub fn pieces(&self, disk: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let covered = self.covered();
        let mut left = disk;
        std::iter::from_fn(move || {
            let start = left.start;
            let end = (start / covered).saturating_add(1).saturating_mul(covered).min(left.end);
            left.start = end;
            (start < end).then_some(start..end)
        })
    }

    /// Bytes of the disk that one second table is for: it has one cluster, and names as many as it has entries.
    fn covered(&self) -> u64 {
        self.cluster.saturating_mul(self.cluster / ENTRY as u64).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_write_is_to_what_lies_there() {
        let entry = |place: u64| (place | 1 << 63).to_be_bytes();
        let entries = [entry(0x5_0000), [0; 8], entry(0x9_0000)].concat();
        let mut layout = Layout::new(0x1_0000, 0x3_0000..0x3_0018, 0x1_0000..0x2_0000, &entries);
        for (offset, len, part) in [
            (0, 72, Part::Root),
            (0x1_0008, 8, Part::Root),
            (0x2_0000, 0x1_0000, Part::Plain),
            (0x5_0000, 0x1_0000, Part::Table),
            (0x5_fff0, 8, Part::Table),
            (0x4_0000, 0x1_0000, Part::Plain),
            (0x6_0000, 0x1_0000, Part::Plain),
            (0x8_0000, 0x1_0001, Part::Mixed),
            (0x4_f000, 0x2000, Part::Mixed),
            (0x5_f000, 0x1001, Part::Mixed),
        ] {
            assert_eq!(layout.part(offset, len), part, "{offset:#x}");
        }
        assert_eq!(layout.in_table(0, 0x3_0010), Some(0x3_0000..0x3_0010));
        assert_eq!(layout.in_table(0x3_0018, 8), None);
        // 512 MiB each.
        let table = 512 << 20;
        assert!(layout.has_tables(&(0..table)) && layout.has_tables(&(2 * table..3 * table)));
        assert!(!layout.has_tables(&(0..table + 1)) && !layout.has_tables(&(3 * table..3 * table + 1)));
        let pieces: Vec<_> = layout.pieces(table - 1..2 * table + 1).collect();
        assert_eq!(pieces, [table - 1..table, table..2 * table, 2 * table..2 * table + 1]);
        layout.learn_entry(0x3_0008, &entry(0x4_0000));
        assert!(layout.has_tables(&(0..3 * table)));
        assert_eq!(layout.part(0x4_0000, 0x1_0000), Part::Table);
    }

    #[test]
    fn a_head_says_where_tables_have_gone() {
        let mut layout = Layout::new(512, 0x400..0x408, 0x200..0x400, &[]);
        let mut head = [0; HEAD];
        head[39] = 2;
        head[46..48].copy_from_slice(&0x800u16.to_be_bytes());
        head[54..56].copy_from_slice(&0x600u16.to_be_bytes());
        head[59] = 1;
        assert!(layout.learn_head(&head));
        assert_eq!(layout.in_table(0, 0x1000), Some(0x800..0x810));
        assert_eq!((layout.part(0x600, 8), layout.part(0x200, 8)), (Part::Root, Part::Plain));
        assert!(!layout.learn_head(&head));
    }
}
