//! What the processor of an emulated Intel host reads in a load that misses the TLB, by its emulator's own record.
//!
//! Bochs has a TLB and no cache of paging structures: each miss is a walk from both roots, as the model counts it.

use serde::{Deserialize, Serialize};

use crate::payload::Payload;
use crate::payload::memory::Backing;
use crate::run::Run;
use crate::walk::{Depth, PageSize, Shape, Step, Walk};

/// Whose tables an entry is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Root {
    /// Those that CR3 leads to: the guest's own with SLAT, the hypervisor's shadow without.
    Cr3,
    /// Those of SLAT.
    Slat,
}

/// One entry of a page table that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Whose.
    pub root: Root,
    /// Level of its table; 1 is the last.
    pub level: u32,
}

/// All that a load read that missed the TLB, but for what it loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Miss {
    /// Page size of the guest's own tables.
    pub guest_page: PageSize,
    /// Page size of the host's memory behind the guest's.
    pub host_page: PageSize,
    /// The entries, in order.
    pub entries: Vec<Entry>,
}

impl Miss {
    /// The walk as the model has it, with SLAT.
    pub fn model(&self) -> Walk {
        let shape = |page| Some(Shape { depth: Depth::Four, page });
        Walk { guest: shape(self.guest_page), host: shape(self.host_page) }
    }

    /// Whether the model has the same references in the same order.
    pub fn is_as_modelled(&self) -> bool {
        let entry = |step: Step| match step {
            Step::Guest { level } => Entry { root: Root::Cr3, level },
            Step::Host { level, .. } => Entry { root: Root::Slat, level },
        };
        self.model().steps().into_iter().map(entry).eq(self.entries.iter().copied())
    }

    /// How many.
    pub fn references(&self) -> usize {
        self.entries.len()
    }
}

/// The misses of a run, by the record of the host's emulator.
///
/// # Errors
/// Where the record holds another number of them, or anything else than walks.
pub fn misses(run: &Run, record: &str) -> Result<Vec<Miss>, String> {
    // A setup that failed came to no mark.
    let setups = run.measurements.iter().filter(|m| m.failure.is_none()).map(|m| &m.setup);
    let setups: Vec<_> = setups.filter(|setup| setup.payload == Payload::Miss).collect();
    let walks = record.split(BEGIN).skip(1).map(|after| after.split(END).next().unwrap_or_default());
    let walks = walks.map(entries).collect::<Result<Vec<_>, _>>()?;
    if walks.len() != setups.len() {
        return Err(format!("it has {} walks, and {} payloads asked for one", walks.len(), setups.len()));
    }
    let miss = |(setup, entries): (&&crate::payload::Setup, _)| {
        let host_page = match setup.backing {
            Backing::Small | Backing::Transparent => PageSize::Size4K,
            Backing::Hugetlb2M => PageSize::Size2M,
            Backing::Hugetlb1G => PageSize::Size1G,
        };
        Miss { guest_page: setup.guest_page, host_page, entries }
    };
    Ok(setups.iter().zip(walks).map(miss).collect())
}

/// What Bochs's debugger answers to `trace-mem on` and `off`.
const BEGIN: &str = "Memory-Tracing enabled";
const END: &str = "Memory-Tracing disabled";

/// The entries that were read before the one load of a record.
fn entries(record: &str) -> Result<Vec<Entry>, String> {
    let references = record.lines().filter(|line| line.starts_with("[CPU"));
    let (walk, loads): (Vec<_>, Vec<_>) = references.partition(|line| line.contains("]: PHY "));
    let last = record.lines().rfind(|line| line.starts_with("[CPU"));
    match (loads.as_slice(), last) {
        ([load], Some(last)) if load == &last && load.contains(" RD]: LIN ") => {}
        _ => return Err(format!("there is not one load, after its walk, in\n{record}")),
    }
    walk.into_iter().map(entry).collect()
}

/// The entry of one line, such as `[CPU0 RD]: PHY 0x000000011800 (len=8, WB): 0x…; EPT PDE`, with a tab before the
/// semicolon.
fn entry(line: &str) -> Result<Entry, String> {
    let name = line.rsplit("; ").next().unwrap_or_default().trim();
    let (root, name) = match name.strip_prefix("EPT ") {
        Some(name) => (Root::Slat, name),
        None => (Root::Cr3, name),
    };
    let level = match name {
        "PTE" => 1,
        "PDE" => 2,
        "PDPTE" => 3,
        "PML4E" | "PML4" => 4,
        _ => return Err(format!("no entry of a page table is read in `{line}`")),
    };
    if line.contains(" RD]: ") { Ok(Entry { root, level }) } else { Err(format!("`{line}` reads nothing")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALK: &str = "Memory-Tracing enabled for CPU0\nc\n\
        [CPU0 RD]: PHY 0x000000010000 (len=8, WB): 0x0000000000011067\t; PDE\n\
        [CPU0 RD]: PHY 0x000000011800 (len=8, WB): 0x0000000000200067\t; EPT PTE\n";
    const LOAD: &str = "[CPU0 RD]: LIN 0x0000000000200000 PHY 0x000000200000 (len=1, WB): 0x00\n";

    #[test]
    fn a_walk_is_what_was_read_before_the_load() {
        let found = entries(&format!("{WALK}{LOAD}(0) Magic breakpoint\n")).expect("a walk");
        let (first, second) = (Entry { root: Root::Cr3, level: 2 }, Entry { root: Root::Slat, level: 1 });
        assert_eq!(found, [first, second]);
    }

    #[test]
    fn what_is_more_than_a_walk_and_a_load_is_refused() {
        let written = WALK.replacen("RD", "WR", 1);
        let other = "[CPU0 RD]: PHY 0x1000 (len=8, WB): 0x0\t; VMCS\n";
        for record in [
            WALK.to_owned(),
            format!("{LOAD}{WALK}"),
            format!("{WALK}{LOAD}{LOAD}"),
            format!("{written}{LOAD}"),
            format!("{other}{LOAD}"),
        ] {
            assert!(entries(&record).is_err(), "{record}");
        }
    }

    #[test]
    fn the_models_references_in_another_order_are_not_the_models() {
        let usual = Miss { guest_page: PageSize::Size4K, host_page: PageSize::Size4K, entries: Vec::new() };
        assert!(!usual.is_as_modelled());
        let entry = |step: Step| match step {
            Step::Guest { level } => Entry { root: Root::Cr3, level },
            Step::Host { level, .. } => Entry { root: Root::Slat, level },
        };
        let mut whole = Miss { entries: usual.model().steps().into_iter().map(entry).collect(), ..usual };
        assert!(whole.is_as_modelled() && whole.references() == 24);
        whole.entries.swap(3, 4);
        assert!(!whole.is_as_modelled());
    }
}
