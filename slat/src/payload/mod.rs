//! Freestanding payloads: what they do, where they run, and how one is set up.

pub mod chain;
pub mod code;
pub mod failure;
mod layout;
pub mod machine;
pub mod memory;
pub mod native;
pub mod tables;
pub mod vcpu;

use std::fmt;

use api::units::Bytes;
use serde::{Deserialize, Serialize};

use crate::walk::PageSize;
use code::Label;
use failure::Failure;
use memory::Backing;

/// Most vCPUs a micro-VM has room for.
pub const MOST_VCPUS: u64 = 16;
/// Pages that [`Payload::MmapBatch`] maps and unmaps at once: a table full.
const BATCH: u64 = 512;
/// Most CR3 values.
pub const MOST_ROOTS: u64 = 512;

/// One kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Payload {
    /// `cpuid`: the price of leaving the guest and coming back.
    ExitPrice,
    /// Write a page-table entry, `invlpg`, touch.
    PteWrite,
    /// `invlpg` alone.
    Invlpg,
    /// Write entries of 64 pages in turn, `invlpg`, touch.
    Churn,
    /// Fault, map, unmap, `invlpg`.
    DemandFault,
    /// 512 pages: new table, fault in each, clear all, take the table out, flush.
    MmapBatch,
    /// `mov cr3` over a number of roots.
    Cr3Reload,
    /// First store to each page.
    ColdTouch,
    /// Stores to pages touched before.
    WarmTouch,
    /// Dependent loads, one a page, in random order.
    Chase,
    /// Every page of the data through each of many address spaces.
    Spaces,
    /// Laps of a chase, timed without what comes between them.
    Laps,
    /// A load that misses the TLB, between marks: tells something only where each memory reference is written
    /// down, in the lab's Intel hosts.
    Miss,
    /// Never ends. Only to test the watchdog.
    Hang,
}

impl Payload {
    /// Every payload that measures something.
    pub const ALL: [Self; 12] = [
        Self::ExitPrice,
        Self::Cr3Reload,
        Self::Invlpg,
        Self::PteWrite,
        Self::Churn,
        Self::DemandFault,
        Self::MmapBatch,
        Self::ColdTouch,
        Self::WarmTouch,
        Self::Chase,
        Self::Spaces,
        Self::Laps,
    ];

    /// The name on the command line and in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ExitPrice => "exit-price",
            Self::PteWrite => "pte-write",
            Self::Invlpg => "invlpg",
            Self::Churn => "churn",
            Self::DemandFault => "demand-fault",
            Self::MmapBatch => "mmap-batch",
            Self::Cr3Reload => "cr3-reload",
            Self::ColdTouch => "cold-touch",
            Self::WarmTouch => "warm-touch",
            Self::Chase => "chase",
            Self::Spaces => "spaces",
            Self::Laps => "laps",
            Self::Miss => "miss",
            Self::Hang => "hang",
        }
    }

    /// Where its code begins.
    pub const fn label(self) -> Label {
        match self {
            Self::ExitPrice => Label::Cpuid,
            Self::PteWrite => Label::PteWrite,
            Self::Invlpg => Label::Invlpg,
            Self::Churn => Label::Churn,
            Self::DemandFault => Label::DemandFault,
            Self::MmapBatch => Label::MmapBatch,
            Self::Cr3Reload => Label::Cr3,
            Self::ColdTouch | Self::WarmTouch => Label::Touch,
            Self::Chase => Label::Chase,
            Self::Spaces => Label::Spaces,
            Self::Laps => Label::Laps,
            Self::Miss => Label::Miss,
            Self::Hang => Label::Hang,
        }
    }

    /// Whether its instructions belong to ring 0.
    pub const fn needs_ring_0(self) -> bool {
        !matches!(
            self,
            Self::ExitPrice | Self::ColdTouch | Self::WarmTouch | Self::Chase | Self::Laps | Self::Hang
        )
    }

    /// Whether the same code can run in this process.
    pub const fn runs_natively(self) -> bool {
        matches!(self, Self::ExitPrice | Self::ColdTouch | Self::WarmTouch | Self::Chase)
    }

    /// Whether its first time is the one that counts: no warm-up, and a new machine each round.
    pub const fn once(self) -> bool {
        matches!(self, Self::ColdTouch | Self::Spaces | Self::Miss)
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Privilege of the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// In a guest's ring 0, as a kernel.
    Ring0,
    /// In a guest's ring 3, as a program.
    Ring3,
    /// In this process, without a guest.
    Native,
}

impl Place {
    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ring0 => "ring 0",
            Self::Ring3 => "ring 3",
            Self::Native => "native",
        }
    }
}

/// What comes between two laps of [`Payload::Laps`]. All four are needed to tell a TLB that is
/// flushed at each exit, one that is flushed at each switch, and one that is shared by tags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Between {
    /// Nothing: the guest runs on.
    #[default]
    Nothing,
    /// An exit and back.
    Exit,
    /// Another VM's turn, in which it loads from one page.
    OtherPage,
    /// Another VM's turn, in which it chases through as many pages.
    OtherSet,
}

impl Between {
    /// All, in the order of what they add.
    pub const ALL: [Self; 4] = [Self::Nothing, Self::Exit, Self::OtherPage, Self::OtherSet];

    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing between",
            Self::Exit => "an exit between",
            Self::OtherPage => "another VM's page between",
            Self::OtherSet => "another VM's set between",
        }
    }
}

/// One payload with everything that can be varied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Setup {
    /// The work.
    pub payload: Payload,
    /// Where it runs.
    pub place: Place,
    /// Page size of the guest's own tables over the data.
    pub guest_page: PageSize,
    /// What the host backs the data with.
    pub backing: Backing,
    /// Whether the host's pages are there before the guest touches them.
    pub present: bool,
    /// Size of the data.
    pub data: Bytes,
    /// CR3 values or address spaces.
    pub roots: u64,
    /// vCPUs that run the payload at once.
    pub vcpus: u64,
    /// Operations a round and vCPU.
    pub operations: u64,
    /// What comes between laps.
    #[serde(default)]
    pub between: Between,
}

impl Setup {
    /// The payload as it is measured where nothing is varied.
    pub fn usual(payload: Payload) -> Self {
        let (data, roots, operations) = match payload {
            Payload::ExitPrice | Payload::Invlpg | Payload::PteWrite | Payload::DemandFault => (2, 1, 2048),
            Payload::Churn => (2, 1, 4096),
            Payload::MmapBatch => (4, 1, 2048),
            Payload::Cr3Reload => (2, 2, 2048),
            Payload::ColdTouch => (16, 1, 4096),
            Payload::WarmTouch => (16, 1, 16384),
            Payload::Chase => (16, 1, 16384),
            Payload::Spaces => (32, 16, 16 * 8192),
            Payload::Laps => (4, 1, 64),
            Payload::Miss | Payload::Hang => (2, 1, 1),
        };
        Self {
            payload,
            place: if payload.needs_ring_0() { Place::Ring0 } else { Place::Ring3 },
            guest_page: PageSize::Size4K,
            backing: Backing::Small,
            present: true,
            data: Bytes::mib(data),
            roots,
            vcpus: 1,
            operations,
            between: Between::Nothing,
        }
    }

    /// The same, elsewhere.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        self.place = place;
        self
    }

    /// Operations before the first measurement.
    pub fn warm(&self) -> u64 {
        match self.payload {
            payload if payload.once() => 0,
            Payload::Laps => 8,
            // One lap over all the data at least.
            Payload::WarmTouch | Payload::Chase => self.links().max(self.operations / 4),
            _ => (self.operations / 4).max(512),
        }
    }

    /// Pages of the data, by 4 KiB: touches and links of the chain go one a page.
    pub fn links(&self) -> u64 {
        self.data.pages().0.max(1)
    }

    /// Operations of a payload whose data and address spaces leave no choice: `spaces` is over when each page was
    /// stored to through each root.
    pub fn operations_given(&self) -> Option<u64> {
        (self.payload == Payload::Spaces).then(|| self.roots.saturating_mul(self.links()))
    }

    /// Whether a machine can be made for it.
    ///
    /// # Errors
    /// What is impossible about it.
    pub fn check(&self) -> Result<(), Failure> {
        let wrong = |text: String| Err(Failure::Setup(text));
        if self.place == Place::Native {
            return wrong("native code needs no machine".into());
        }
        if self.payload == Payload::Laps && (self.vcpus != 1 || self.place != Place::Ring3) {
            return wrong("laps run on one vCPU, in ring 3, where the clock can be read".into());
        }
        if self.place == Place::Ring3 && self.payload.needs_ring_0() {
            return wrong(format!("{} uses instructions of ring 0", self.payload));
        }
        if !(1..=MOST_VCPUS).contains(&self.vcpus) {
            return wrong(format!("{} vCPUs; 1 to {MOST_VCPUS} are possible", self.vcpus));
        }
        if !(1..=MOST_ROOTS).contains(&self.roots) {
            return wrong(format!("{} roots; 1 to {MOST_ROOTS} are possible", self.roots));
        }
        self.check_operations()?;
        if self.data < Bytes::mib(2) || !self.data.0.is_multiple_of(2 << 20) {
            return wrong(format!("{} of data; it must be a multiple of 2 MiB", self.data));
        }
        if self.data > Bytes::gib(64) {
            return wrong(format!("{} of data; 64 GiB are the most", self.data));
        }
        Ok(())
    }

    /// Whether the code does as many operations as its figures will be divided by.
    fn check_operations(&self) -> Result<(), Failure> {
        let wrong = |text: String| Err(Failure::Setup(text));
        let (operations, pages) = (self.operations, self.links());
        if operations == 0 {
            return wrong("no operations".into());
        }
        if let Some(given) = self.operations_given().filter(|given| *given != operations) {
            return wrong(format!(
                "{operations} operations of {}; its data and roots make {given}",
                self.payload
            ));
        }
        match self.payload {
            Payload::ColdTouch if operations > pages => wrong(format!(
                "{operations} operations of {} over {pages} pages; only the first touch of each is cold",
                self.payload
            )),
            Payload::MmapBatch if !operations.is_multiple_of(BATCH) => wrong(format!(
                "{operations} operations of {}; it maps {BATCH} pages at a time, so name a multiple of that",
                self.payload
            )),
            _ => Ok(()),
        }
    }

    /// In words, for tables.
    pub fn describe(&self) -> String {
        let mut text = format!("{}, {}", self.payload, self.place.name());
        if self.payload == Payload::Miss {
            text += &format!(", guest {}, host {}", self.guest_page, self.backing.name());
        }
        if matches!(self.payload, Payload::ColdTouch | Payload::WarmTouch | Payload::Chase) {
            text += &format!(", {}", self.data);
            if self.place != Place::Native {
                text += &format!(", guest {}", self.guest_page);
            }
            text += &format!(", host {}", self.backing.name());
            if !self.present {
                text += ", absent";
            }
        }
        if self.payload == Payload::Laps {
            text += &format!(", {}, {}", self.data, self.between.name());
        }
        if matches!(self.payload, Payload::Cr3Reload | Payload::Spaces) {
            text += &format!(", {} roots", self.roots);
        }
        if self.vcpus > 1 {
            text += &format!(", {} vCPUs", self.vcpus);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_setups_are_refused() {
        let usual = Setup::usual(Payload::Churn);
        for setup in [
            usual.clone().at(Place::Native),
            usual.clone().at(Place::Ring3),
            Setup { vcpus: 0, ..usual.clone() },
            Setup { roots: 1 << 40, ..usual.clone() },
            Setup { data: Bytes(u64::MAX), ..usual.clone() },
            Setup { operations: 0, ..usual.clone() },
        ] {
            assert!(matches!(setup.check(), Err(Failure::Setup(_))), "{setup:?}");
        }
        assert!(usual.check().is_ok());
    }

    #[test]
    fn what_a_figure_is_divided_by_is_what_the_code_does() {
        for payload in Payload::ALL {
            assert!(Setup::usual(payload).check().is_ok(), "{payload}");
        }
        let usual = Setup::usual;
        for setup in [
            Setup { data: Bytes::mib(64), ..usual(Payload::Spaces) },
            Setup { operations: 1000, ..usual(Payload::Spaces) },
            Setup { data: Bytes::mib(2), ..usual(Payload::ColdTouch) },
            Setup { operations: 4097, ..usual(Payload::ColdTouch) },
            Setup { operations: 1, ..usual(Payload::MmapBatch) },
            Setup { operations: 1000, ..usual(Payload::MmapBatch) },
        ] {
            assert!(matches!(setup.check(), Err(Failure::Setup(_))), "{setup:?}");
        }
        let spaces = Setup { data: Bytes::mib(64), ..usual(Payload::Spaces) };
        assert_eq!(spaces.operations_given(), Some(16 * 16384));
    }
}
