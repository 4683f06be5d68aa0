//! The way of a real address of a running guest: guest virtual, guest
//! physical, the VM's process, the machine.
//!
//! The guest's tables are read from outside, out of the memory of the VM's
//! process; nothing runs in the VM for it. What the guest wrote there is not
//! trusted: an entry may point anywhere, and then the way ends with a sentence.

pub mod host;

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use vmm::inspect::{MemoryMap, Translation};

use crate::payload::tables::{self, Entry};
use crate::walk::{Depth, PageSize, Shape, Walk};
use host::{Process, Residence};

// SDM volume 3, 2.2.1 and 2.5.
const EFER_LONG_MODE: u64 = 1 << 10;
const EFER_NO_EXECUTE: u64 = 1 << 11;
const CR0_PAGING: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMAP: u64 = 1 << 21;

/// Why an address could not be followed at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process can't be looked at.
    #[error(transparent)]
    Process(#[from] host::Error),
    /// No 64-bit tables.
    #[error("vCPU {0} is not in long mode: only the tables of 64-bit guests can be followed")]
    NotLongMode(u8),
    /// No address at all.
    #[error("{0:#x} is not a canonical address: bits {1} to 63 must all be alike")]
    NotCanonical(u64, u32),
}

/// One guest physical address, and where it leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Guest physical.
    pub guest: u64,
    /// In the VM's process; `None` where it is not RAM.
    pub host: Option<u64>,
    /// In the machine; `None` as above.
    pub residence: Option<Residence>,
}

/// An entry of the guest's tables and where it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stage {
    /// The entry.
    pub entry: Entry,
    /// Its flags as the manuals abbreviate them.
    pub flags: String,
    /// Where it lies.
    pub place: Place,
}

/// Our walk held against KVM_TRANSLATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// Both find the same.
    Agrees,
    /// They don't: the guest has changed its tables in between, or an entry has address bits that its processor
    /// lacks.
    Differs,
    /// KVM translates as for a read by ring 0, which the guest forbids for this page (CR4.SMAP).
    Forbidden,
}

impl Check {
    fn of(seen: &Translation, entries: &[Entry], physical: Option<u64>) -> Self {
        let users = entries.iter().all(|entry| entry.value & tables::USER != 0);
        match (seen.physical, physical) {
            (theirs, ours) if theirs == ours => Self::Agrees,
            (None, Some(_)) if users && seen.cr4 & CR4_SMAP != 0 => Self::Forbidden,
            _ => Self::Differs,
        }
    }
}

/// The whole way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Way {
    /// How the vCPU sees it; nothing for a guest physical address.
    pub seen: Option<Translation>,
    /// The virtual address, where one was asked for.
    pub address: Option<u64>,
    /// Entries of the guest's tables, from the root down.
    pub stages: Vec<Stage>,
    /// Size of the guest's page.
    pub page: Option<PageSize>,
    /// The end of the way.
    pub end: Option<Place>,
    /// The eight bytes there (from the address rounded down to a multiple of eight), where the host has them.
    pub word: Option<u64>,
    /// Why the way ended early.
    pub why: Option<String>,
    /// What KVM_TRANSLATE says to it; nothing for a guest physical address.
    pub kvm: Option<Check>,
    /// Memory references on a miss of everything, with SLAT and tables of the host's page sizes; `None`
    /// where those are not known.
    pub references: Option<u32>,
}

/// Why tables were not followed to their end.
enum Stop {
    /// The guest's tables say so, or the host has nothing there: told with the way.
    Way(String),
    /// The process can't be looked at.
    Fault(Error),
}

impl From<tables::Error> for Stop {
    fn from(error: tables::Error) -> Self {
        Self::Way(error.to_string())
    }
}

impl From<host::Error> for Stop {
    fn from(error: host::Error) -> Self {
        Self::Fault(error.into())
    }
}

/// Follows addresses in one VM.
#[derive(Debug)]
pub struct Guide<'v> {
    process: Process,
    map: &'v MemoryMap,
}

impl<'v> Guide<'v> {
    /// For the VM of process `pid`, whose memory lies as `map` says.
    ///
    /// # Errors
    /// Where this user may not look at the process.
    pub fn new(pid: u32, map: &'v MemoryMap) -> Result<Self, Error> {
        Ok(Self { process: Process::open(pid)?, map })
    }

    fn place(&self, guest: u64) -> Result<Place, Error> {
        let host = self.map.host_address(guest);
        let residence = host.map(|host| self.process.residence(host)).transpose()?;
        Ok(Place { guest, host, residence })
    }

    /// An entry of the guest's tables.
    fn entry(&self, level: u32, address: u64) -> Result<u64, Stop> {
        let host = self.map.host_address(address).ok_or(tables::Error::Outside { level, address })?;
        if self.process.residence(host)? == Residence::Absent {
            // Reading it would make a page there, of memory that the guest may not even have.
            let why = format!("the host has no page for the guest's L{level} table at {address:#x}");
            return Err(Stop::Way(why));
        }
        Ok(self.process.word(host)?)
    }

    fn word(&self, place: &Place) -> Option<u64> {
        // Reading a page that is not there would bring it in.
        matches!(place.residence, Some(Residence::Present { .. }))
            .then(|| self.process.word(place.host? & !7).ok())
            .flatten()
    }

    /// Follows a guest physical address.
    ///
    /// # Errors
    /// Where the process can't be read any more.
    pub fn physical(&self, guest: u64) -> Result<Way, Error> {
        self.arrive(Way {
            seen: None,
            address: None,
            stages: Vec::new(),
            page: None,
            end: Some(self.place(guest)?),
            word: None,
            why: None,
            kvm: None,
            references: None,
        })
    }

    /// Follows a guest virtual address that a vCPU sees as `seen`.
    ///
    /// # Errors
    /// [`Error`]; an address that is not mapped is a way that ends early.
    pub fn virtual_address(&self, seen: Translation, address: u64) -> Result<Way, Error> {
        let (entries, result) = match depth(&seen)? {
            None => (Vec::new(), Ok((None, address))),
            Some(depth) => {
                let bits = 12 + 9 * depth.levels();
                let above = (address as i64) >> (bits - 1);
                if above != 0 && above != -1 {
                    return Err(Error::NotCanonical(address, bits - 1));
                }
                let no_execute = seen.efer & EFER_NO_EXECUTE != 0;
                let read = |level, at| self.entry(level, at);
                let (entries, result) = tables::follow(read, seen.cr3, depth, no_execute, address);
                (entries, result.map(|(page, physical)| (Some(page), physical)))
            }
        };
        let (page, physical, why) = match result {
            Ok((page, physical)) => (page, Some(physical), None),
            Err(Stop::Way(why)) => (None, None, Some(why)),
            Err(Stop::Fault(error)) => return Err(error),
        };
        let kvm = Some(Check::of(&seen, &entries, physical));
        let stages = entries
            .into_iter()
            .map(|entry| Ok::<_, Error>(Stage { entry, flags: entry.flags(), place: self.place(entry.at)? }));
        self.arrive(Way {
            seen: Some(seen),
            address: Some(address),
            stages: stages.collect::<Result<_, _>>()?,
            page,
            end: physical.map(|at| self.place(at)).transpose()?,
            word: None,
            why,
            kvm,
            references: None,
        })
    }

    fn arrive(&self, mut way: Way) -> Result<Way, Error> {
        if let Some(end) = &way.end {
            way.word = self.word(end);
            way.why = match (end.host, end.residence) {
                (None, _) => Some(format!("{:#x} is not guest RAM", end.guest)),
                (_, Some(Residence::Absent)) => Some("the host has no page there yet".into()),
                (_, Some(Residence::Swapped)) => Some("the host has swapped the page out".into()),
                _ => None,
            };
        }
        way.references = way.references();
        Ok(way)
    }
}

/// How deep the vCPU's tables are; `None` without paging.
fn depth(seen: &Translation) -> Result<Option<Depth>, Error> {
    if seen.cr0 & CR0_PAGING == 0 {
        return Ok(None);
    }
    if seen.efer & EFER_LONG_MODE == 0 {
        return Err(Error::NotLongMode(seen.cpu));
    }
    Ok(Some(if seen.cr4 & CR4_LA57 == 0 { Depth::Four } else { Depth::Five }))
}

impl Place {
    fn page(&self) -> Option<PageSize> {
        match self.residence? {
            Residence::Present { page, .. } => page,
            _ => None,
        }
    }

    /// Guest physical, host virtual, system physical, the host's page.
    fn cells(&self) -> [String; 4] {
        let hex = |value: u64| format!("{value:#x}");
        let (system, page) = match self.residence {
            None => ("-".into(), "-".into()),
            Some(Residence::Absent) => ("not there yet".into(), "-".into()),
            Some(Residence::Swapped) => ("in swap".into(), "-".into()),
            Some(Residence::Present { system, page, .. }) => (
                system.map_or_else(|| "only root knows".into(), hex),
                page.map_or_else(|| "?".into(), |p| p.to_string()),
            ),
        };
        [hex(self.guest), self.host.map_or_else(|| "not RAM".into(), hex), system, page]
    }
}

impl Way {
    /// Columns of [`Way::rows`].
    pub const HEAD: [&'static str; 8] =
        ["READ", "GPA", "HVA", "SPA", "HOST PAGE", "ENTRY", "FLAGS", "LEADS TO"];

    fn references(&self) -> Option<u32> {
        let host = |place: &Place| {
            let host = Some(Shape { depth: Depth::Four, page: place.page()? });
            Some(Walk { guest: None, host }.references())
        };
        let tables: Option<u32> = self.stages.iter().map(|stage| Some(host(&stage.place)? + 1)).sum();
        Some(tables? + host(self.end.as_ref()?)?)
    }

    /// A row for each reference to a guest physical address.
    pub fn rows(&self) -> Vec<[String; 8]> {
        let last = self.stages.last().map(|s| s.entry.level);
        let stages = self.stages.iter().map(|stage| {
            let entry = &stage.entry;
            let [guest, host, system, page] = stage.place.cells();
            let leads = match (&self.page, Some(entry.level) == last) {
                (Some(page), true) => format!("a page of {page}"),
                (None, true) => "nothing".into(),
                _ => format!("an L{} table", entry.level - 1),
            };
            let name = format!("L{}[{}]", entry.level, entry.index);
            [name, guest, host, system, page, format!("{:#x}", entry.value), stage.flags.clone(), leads]
        });
        let end = self.end.iter().map(|place| {
            let [guest, host, system, page] = place.cells();
            let word = self.word.map_or_else(|| "-".into(), |word| format!("{word:#x}"));
            ["the byte".into(), guest, host, system, page, word, String::new(), String::new()]
        });
        stages.chain(end).collect()
    }

    /// What goes above the table.
    pub fn heading(&self, vm: &str) -> String {
        match (&self.seen, self.address) {
            (Some(seen), Some(address)) => {
                let levels = match depth(seen) {
                    Ok(Some(depth)) => format!("{} levels", depth.levels()),
                    _ => "no paging".into(),
                };
                format!(
                    "{vm}, vCPU {}: guest virtual address {address:#x}; CR3 {:#x}, {levels}",
                    seen.cpu, seen.cr3
                )
            }
            _ => format!("{vm}: a guest physical address"),
        }
    }

    /// What goes below it.
    pub fn remarks(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        if let Some(why) = &self.why {
            let _ = writeln!(text, "The way ends: {why}.");
        }
        match (self.kvm, self.seen.and_then(|s| s.physical)) {
            (Some(Check::Agrees), Some(physical)) => {
                let _ = writeln!(text, "KVM_TRANSLATE finds {physical:#x} too.");
            }
            (Some(Check::Agrees), None) => text += "KVM_TRANSLATE finds nothing either.\n",
            (Some(Check::Differs), found) => {
                let found = found.map_or_else(|| "nothing".into(), |p| format!("{p:#x}"));
                let _ = writeln!(
                    text,
                    "KVM_TRANSLATE found {found}: the guest changed its tables meanwhile (try again, or pause it \
                     first), or an entry has address bits that its processor lacks."
                );
            }
            (Some(Check::Forbidden), _) => {
                text += "KVM_TRANSLATE can't be asked: it reads as ring 0, which the guest forbids for pages of \
                         ring 3 (SMAP).\n";
            }
            (None, _) => {}
        }
        match self.references {
            Some(count) if !self.stages.is_empty() => {
                let _ = writeln!(
                    text,
                    "With SLAT a miss of everything reads {count} entries here, if KVM maps the host's pages as large \
                     as they are."
                );
            }
            _ => {}
        }
        let present = |p: &Place| matches!(p.residence, Some(Residence::Present { system: None, .. }));
        if self.end.iter().chain(self.stages.iter().map(|s| &s.place)).any(present) {
            text += "System physical addresses and the size of the host's pages are told to root only.\n";
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::units::Bytes;
    use vmm::inspect::MappedRegion;

    /// Guest memory in this very process: page tables in three pages, data in the fourth.
    struct Guest {
        memory: Box<[[u64; 512]; 8]>,
        map: MemoryMap,
    }

    fn guest() -> Guest {
        let mut memory = Box::new([[0; 512]; 8]);
        for table in 0..3 {
            memory[table][0] = ((table as u64 + 1) << 12) | tables::TABLE;
        }
        memory[3][7] = (5 << 12) | tables::LEAF | (1 << 63);
        memory[3][8] = (1 << 40) | tables::LEAF;
        memory[5][1] = 0xfeed;
        let region = MappedRegion {
            guest: 0,
            host: (&raw const *memory) as u64,
            size: Bytes(size_of_val(&*memory) as u64),
        };
        Guest { memory, map: MemoryMap { regions: vec![region] } }
    }

    fn seen(physical: Option<u64>) -> Translation {
        let efer = EFER_LONG_MODE | EFER_NO_EXECUTE;
        Translation { cpu: 0, cr0: CR0_PAGING, cr3: 0, cr4: 0, efer, physical }
    }

    #[test]
    fn a_mapped_address_is_followed_to_its_word() {
        let guest = guest();
        let guide = Guide::new(std::process::id(), &guest.map).expect("one's own process");
        let way = guide.virtual_address(seen(Some(0x5008)), 0x7008).expect("followed");
        assert_eq!((way.end.as_ref().map(|e| e.guest), way.word), (Some(0x5008), Some(0xfeed)));
        assert_eq!((way.kvm, way.page, way.stages.len()), (Some(Check::Agrees), Some(PageSize::Size4K), 4));
        let smap = Translation { cr4: CR4_SMAP, ..seen(None) };
        let forbidden = guide.virtual_address(smap, 0x7008).expect("followed");
        assert_eq!((forbidden.kvm, forbidden.end), (Some(Check::Forbidden), way.end.clone()));
        let differs = guide.virtual_address(seen(None), 0x7008).expect("followed");
        assert_eq!(differs.kvm, Some(Check::Differs));
        assert_eq!(way.stages[3].flags, "P W U A D NX");
        let host = way.end.as_ref().and_then(|e| e.host);
        assert_eq!(host, Some(&raw const guest.memory[5][1] as u64));
        assert_eq!(way.rows().len(), 5);
        let physical = guide.physical(0x5008).expect("followed");
        assert_eq!((physical.end, physical.word), (way.end, Some(0xfeed)));
    }

    #[test]
    fn ways_that_end_early_say_where() {
        let guest = guest();
        let guide = Guide::new(std::process::id(), &guest.map).expect("one's own process");
        let follow = |address| guide.virtual_address(seen(None), address);
        let way = follow(0x6000).expect("followed");
        assert!(way.why.as_ref().is_some_and(|w| w.contains("not present")), "{way:?}");
        assert_eq!((way.kvm, way.end.is_none(), way.stages.len()), (Some(Check::Agrees), true, 4));
        let way = follow(0x8000).expect("followed");
        assert!(way.why.as_ref().is_some_and(|w| w.contains("not guest RAM")), "{way:?}");
        assert_eq!(way.kvm, Some(Check::Differs));
        assert!(matches!(follow(1 << 50), Err(Error::NotCanonical(..))));
        let real_mode = Translation { efer: 0, ..seen(None) };
        assert!(matches!(guide.virtual_address(real_mode, 0), Err(Error::NotLongMode(0))));
        let wild = Translation { cr3: 0x7fff_ffff_f000, ..seen(None) };
        let way = guide.virtual_address(wild, 0).expect("followed");
        assert!(way.why.is_some_and(|w| w.contains("not in its memory")));
    }

    #[test]
    fn what_the_processor_refuses_is_refused_here_too() {
        let guest = guest();
        let guide = Guide::new(std::process::id(), &guest.map).expect("one's own process");
        // The entry has NX, which this vCPU has not switched on: KVM finds nothing.
        let no_nx = Translation { efer: EFER_LONG_MODE, ..seen(None) };
        let way = guide.virtual_address(no_nx, 0x7008).expect("followed");
        assert_eq!(way.kvm, Some(Check::Agrees));
        assert!(way.why.is_some_and(|w| w.contains("reserved bits")));
    }

    #[test]
    fn tables_where_the_host_has_no_page_are_not_read_into_being() {
        let size = Bytes::mib(2);
        let memory = crate::payload::memory::Mapping::new(size, crate::payload::memory::Backing::Small);
        let memory = memory.expect("memory");
        let host = memory.start() as u64;
        let map = MemoryMap { regions: vec![MappedRegion { guest: 0, host, size }] };
        let guide = Guide::new(std::process::id(), &map).expect("one's own process");
        let way = guide.virtual_address(seen(None), 0x7008).expect("followed");
        assert!(way.why.is_some_and(|w| w.contains("no page for the guest's L4 table at 0x0")));
        assert_eq!(guide.process.residence(host).expect("its page map"), Residence::Absent);
    }

    #[test]
    fn a_process_that_has_ended_is_an_error_and_no_way() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("sleep");
        let guest = guest();
        let guide = Guide::new(child.id(), &guest.map).expect("one's own child");
        child.kill().expect("it lives");
        child.wait().expect("it ends");
        let way = guide.virtual_address(seen(None), 0x7008);
        assert!(matches!(way, Err(Error::Process(_))), "{way:?}");
    }
}
