//! Guest page tables: made for the micro-VM, and walked as the processor would.

use serde::Serialize;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::walk::{Depth, PageSize};

/// Entry flags: present, writable, for ring 3 too, accessed (SDM volume 3, 5.5).
pub const TABLE: u64 = 0x27;
/// As [`TABLE`], and dirty: nothing for the processor or a shadow pager to write back.
pub const LEAF: u64 = 0x67;
const PRESENT: u64 = 1;
/// Ring 3 may use it.
pub const USER: u64 = 4;
const HUGE: u64 = 0x80;
/// Kind of memory, of a large page: where small ones have it, large ones say that they are large.
const LARGE_PAT: u64 = 1 << 12;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const TABLE_SIZE: u64 = 4096;

/// Why tables could not be made or walked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The area set aside for them is too small.
    #[error("the guest's page tables need more than the {0} tables set aside for them")]
    Full(u64),
    /// A table lies outside guest memory.
    #[error("the guest's L{level} table at {address:#x} is not in its memory")]
    Outside {
        /// Level of the table.
        level: u32,
        /// Guest physical address of the entry.
        address: u64,
    },
    /// The address is not mapped.
    #[error("{address:#x} is not mapped: its L{level} entry is {entry:#x}, not present")]
    NotPresent {
        /// The virtual address.
        address: u64,
        /// Level of the entry.
        level: u32,
        /// The entry.
        entry: u64,
    },
    /// No processor takes the entry.
    #[error("{address:#x} is not mapped: its L{level} entry is {entry:#x}, which has reserved bits")]
    Reserved {
        /// The virtual address.
        address: u64,
        /// Level of the entry.
        level: u32,
        /// The entry.
        entry: u64,
    },
}

/// One entry on the way from a virtual to a physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Level of its table.
    pub level: u32,
    /// Its place in the table.
    pub index: u64,
    /// Guest physical address at which it was read.
    pub at: u64,
    /// What it holds.
    pub value: u64,
}

impl Entry {
    /// Its flags as the manuals abbreviate them (SDM volume 3, 5.5.4).
    pub fn flags(&self) -> String {
        let seventh = if self.level == 1 { "PAT" } else { "PS" };
        let names = ["P", "W", "U", "PWT", "PCD", "A", "D", seventh, "G"];
        let set = names.iter().enumerate().filter(|(bit, _)| self.value >> bit & 1 == 1);
        let mut set: Vec<_> = set.map(|(_, name)| *name).collect();
        if self.level > 1 && self.value & HUGE != 0 && self.value & LARGE_PAT != 0 {
            set.push("PAT");
        }
        if self.value & NO_EXECUTE != 0 {
            set.push("NX");
        }
        set.join(" ")
    }

    /// Bits that must be zero here: below the address of a large page, the size bit above those that may be
    /// large, and NX where it is not switched on (SDM volume 3, 5.5.4). Those above the processor's physical
    /// addresses depend on its CPUID and are not looked at.
    const fn reserved(&self, no_execute: bool) -> u64 {
        let size = match (self.level, self.value & HUGE != 0) {
            (2, true) => PageSize::Size2M.bytes() - 2 * LARGE_PAT,
            (3, true) => PageSize::Size1G.bytes() - 2 * LARGE_PAT,
            (4.., true) => HUGE,
            _ => 0,
        };
        let execute = if no_execute { 0 } else { NO_EXECUTE };
        self.value & (size | execute)
    }
}

/// A finished walk of the guest's tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Translation {
    /// Entries from the root down.
    pub entries: Vec<Entry>,
    /// Size of the page it ends in.
    pub page: PageSize,
    /// The guest physical address that came out.
    pub physical: u64,
}

fn index(address: u64, level: u32) -> u64 {
    address >> (12 + 9 * (level - 1)) & 0x1ff
}

/// Makes tables in an area of guest memory.
#[derive(Debug)]
pub struct Tables<'m> {
    memory: &'m GuestMemoryMmap,
    start: u64,
    next: u64,
    end: u64,
}

impl<'m> Tables<'m> {
    /// Tables go into `count` pages from `start` on; the memory there must be zero.
    pub fn new(memory: &'m GuestMemoryMmap, start: GuestAddress, count: u64) -> Self {
        Self { memory, start: start.0, next: start.0, end: start.0 + count * TABLE_SIZE }
    }

    /// An empty table.
    ///
    /// # Errors
    /// [`Error::Full`].
    pub fn table(&mut self) -> Result<GuestAddress, Error> {
        if self.next >= self.end {
            return Err(Error::Full((self.end - self.start) / TABLE_SIZE));
        }
        let table = GuestAddress(self.next);
        self.next += TABLE_SIZE;
        Ok(table)
    }

    fn read(&self, level: u32, at: u64) -> Result<u64, Error> {
        self.memory.read_obj(GuestAddress(at)).map_err(|_| Error::Outside { level, address: at })
    }

    fn write(&self, level: u32, at: u64, entry: u64) -> Result<(), Error> {
        self.memory.write_obj(entry, GuestAddress(at)).map_err(|_| Error::Outside { level, address: at })
    }

    /// Address of the entry for `address` at `level`, with the tables above it made where missing.
    ///
    /// # Errors
    /// [`Error::Full`], or [`Error::Outside`] for a root outside memory.
    pub fn entry(&mut self, root: GuestAddress, address: u64, level: u32) -> Result<GuestAddress, Error> {
        let mut table = root.0;
        for above in (level + 1..=Depth::Four.levels()).rev() {
            let at = table + index(address, above) * 8;
            let mut entry = self.read(above, at)?;
            if entry & PRESENT == 0 {
                entry = self.table()?.0 | TABLE;
                self.write(above, at, entry)?;
            }
            table = entry & ADDRESS;
        }
        Ok(GuestAddress(table + index(address, level) * 8))
    }

    /// Maps `size` bytes from `address` on to `physical` on, in pages of `page`.
    ///
    /// # Errors
    /// As [`Self::entry`].
    pub fn map(
        &mut self,
        root: GuestAddress,
        address: u64,
        physical: u64,
        size: u64,
        page: PageSize,
    ) -> Result<(), Error> {
        let level = page.leaf_level();
        let huge = if page == PageSize::Size4K { 0 } else { HUGE };
        for offset in (0..size).step_by(page.bytes() as usize) {
            let at = self.entry(root, address + offset, level)?;
            self.write(level, at.0, (physical + offset) | LEAF | huge)?;
        }
        Ok(())
    }
}

/// Walks a guest's tables as its processor would.
///
/// # Errors
/// Where an entry is not present, or a table is not in guest memory.
pub fn translate(
    memory: &GuestMemoryMmap,
    cr3: u64,
    depth: Depth,
    address: u64,
) -> Result<Translation, Error> {
    let read =
        |level, at| memory.read_obj(GuestAddress(at)).map_err(|_| Error::Outside { level, address: at });
    // The micro-VM's EFER leaves NX off.
    let (entries, end) = follow(read, cr3, depth, false, address);
    end.map(|(page, physical)| Translation { entries, page, physical })
}

/// Walks tables of which `read` tells the entry of a level at a guest physical address: those that it met, from
/// the root down, and the page's size and the guest physical address that came out, or why none did.
/// `no_execute` says whether the vCPU has that bit (EFER.NXE).
pub fn follow<E: From<Error>>(
    read: impl Fn(u32, u64) -> Result<u64, E>,
    cr3: u64,
    depth: Depth,
    no_execute: bool,
    address: u64,
) -> (Vec<Entry>, Result<(PageSize, u64), E>) {
    let mut entries = Vec::new();
    let mut table = cr3 & ADDRESS;
    let mut level = depth.levels();
    loop {
        let at = table + index(address, level) * 8;
        let value = match read(level, at) {
            Ok(value) => value,
            Err(error) => return (entries, Err(error)),
        };
        let entry = Entry { level, index: index(address, level), at, value };
        entries.push(entry);
        if value & PRESENT == 0 {
            return (entries, Err(Error::NotPresent { address, level, entry: value }.into()));
        }
        if entry.reserved(no_execute) != 0 {
            return (entries, Err(Error::Reserved { address, level, entry: value }.into()));
        }
        let page = match level {
            1 => Some(PageSize::Size4K),
            2 if value & HUGE != 0 => Some(PageSize::Size2M),
            3 if value & HUGE != 0 => Some(PageSize::Size1G),
            _ => None,
        };
        if let Some(page) = page {
            let offset = page.bytes() - 1;
            let physical = (value & ADDRESS & !offset) | (address & offset);
            return (entries, Ok((page, physical)));
        }
        table = value & ADDRESS;
        level -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MEMORY: usize = 4 << 20;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("guest memory")
    }

    #[test]
    fn an_unmapped_address_and_a_wild_root_are_errors() {
        let memory = memory();
        let mut tables = Tables::new(&memory, GuestAddress(0x10_0000), 16);
        let root = tables.table().expect("room");
        let walk = |cr3, address| translate(&memory, cr3, Depth::Four, address);
        assert!(matches!(walk(root.0, 0x1000), Err(Error::NotPresent { level: 4, .. })));
        assert!(matches!(walk(0x7fff_ffff_f000, 0), Err(Error::Outside { level: 4, .. })));
    }

    #[test]
    fn entries_that_no_processor_takes_lead_nowhere() {
        let entry = |level, value| Entry { level, index: 0, at: 0, value };
        let execute = |entry: Entry| entry.reserved(true);
        for (level, value) in
            [(4, HUGE), (5, HUGE), (2, HUGE | 1 << 13), (2, HUGE | 1 << 20), (3, HUGE | 1 << 29)]
        {
            assert_ne!(execute(entry(level, value | LEAF)), 0, "L{level} {value:#x}");
        }
        for (level, value) in
            [(4, 0), (3, HUGE | LARGE_PAT | 1 << 30), (2, HUGE | LARGE_PAT | 1 << 21), (1, HUGE)]
        {
            assert_eq!(execute(entry(level, value | LEAF | NO_EXECUTE)), 0, "L{level} {value:#x}");
        }
        assert_ne!(entry(1, LEAF | NO_EXECUTE).reserved(false), 0, "NX is not switched on");

        let memory = memory();
        let mut tables = Tables::new(&memory, GuestAddress(0x10_0000), 16);
        let root = tables.table().expect("room");
        tables.map(root, 0, 0, PageSize::Size2M.bytes(), PageSize::Size2M).expect("room");
        let at = tables.entry(root, 0, 2).expect("room");
        tables.write(2, at.0, LEAF | HUGE | 1 << 13).expect("in memory");
        let found = translate(&memory, root.0, Depth::Four, 0);
        assert!(matches!(found, Err(Error::Reserved { level: 2, .. })), "{found:?}");
    }

    #[test]
    fn flags_are_those_of_the_level() {
        let flags = |level, value| Entry { level, index: 0, at: 0, value }.flags();
        assert_eq!(flags(1, PRESENT | HUGE), "P PAT");
        assert_eq!(flags(1, PRESENT | LARGE_PAT), "P", "part of the address");
        assert_eq!(flags(2, PRESENT | HUGE), "P PS");
        assert_eq!(flags(2, PRESENT | HUGE | LARGE_PAT | NO_EXECUTE), "P PS PAT NX");
        assert_eq!(flags(2, PRESENT | LARGE_PAT), "P", "part of a table's address");
    }

    #[test]
    fn a_full_area_is_an_error() {
        let memory = memory();
        let mut tables = Tables::new(&memory, GuestAddress(0x10_0000), 2);
        let root = tables.table().expect("room for one");
        assert!(matches!(tables.map(root, 0, 0, 4096, PageSize::Size4K), Err(Error::Full(2))));
    }

    proptest! {
        #[test]
        fn what_is_mapped_is_found(
            page in proptest::sample::select(&PageSize::ALL[..]),
            number in 0u64..1 << 17,
            target in 0u64..1 << 17,
            offset in any::<u64>(),
        ) {
            let memory = memory();
            let mut tables = Tables::new(&memory, GuestAddress(0x10_0000), 16);
            let root = tables.table().expect("room");
            let (address, physical) = (number * page.bytes(), target * page.bytes());
            tables.map(root, address, physical, page.bytes(), page).expect("room");
            let offset = offset % page.bytes();
            let found = translate(&memory, root.0, Depth::Four, address + offset).expect("mapped");
            prop_assert_eq!(found.physical, physical + offset);
            prop_assert_eq!(found.page, page);
            prop_assert_eq!(found.entries.len() as u32, 5 - page.leaf_level());
        }

        #[test]
        fn hostile_tables_never_panic(words in proptest::collection::vec(any::<u64>(), 512), cr3: u64, address: u64) {
            let memory = memory();
            for (i, word) in words.iter().enumerate() {
                memory.write_obj(word & 0x3f_ffff, GuestAddress(i as u64 * 8)).expect("in memory");
            }
            let _ = translate(&memory, cr3 % 8192, Depth::Five, address);
        }
    }
}
