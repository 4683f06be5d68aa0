//! Which setups a run goes through.

use api::units::Bytes;

use crate::payload::memory::Backing;
use crate::payload::{Between, Payload, Place, Setup};
use crate::walk::PageSize;

/// Size of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// One setup of each payload.
    Quick,
    /// And what the lab can tell: series that count, none that only time.
    Lab,
    /// Churn and faults on 1 to N vCPUs alone.
    Scaling,
    /// What KVM's memory for a guest depends on, alone.
    Memory,
    /// Laps with each thing between them, for what is counted of switches, alone.
    Switches,
    /// A load that misses the TLB, for each page size in both dimensions, alone.
    Walks,
    /// Nothing but Linux guests.
    Guests,
    /// All of it.
    Full,
}

/// The setups of a plan, none of which needs more than `memory`, on a host of `cpus`.
pub fn setups(extent: Extent, memory: Bytes, cpus: u64) -> Vec<Setup> {
    let mut setups = Vec::new();
    let scale = || scaling(cpus);
    match extent {
        Extent::Scaling => return scale().collect(),
        Extent::Memory => {
            return memory_series().filter(|s| touched(s) <= memory.0 / 4).collect();
        }
        Extent::Switches => return laps().collect(),
        Extent::Walks => return misses().collect(),
        Extent::Guests => return Vec::new(),
        Extent::Quick | Extent::Lab | Extent::Full => {}
    }
    for payload in Payload::ALL {
        let usual = Setup::usual(payload);
        if payload == Payload::Laps {
            // It tells nothing but time.
            continue;
        }
        if payload.runs_natively() {
            setups.push(usual.clone().at(Place::Native));
            setups.push(usual.clone().at(Place::Ring3));
        }
        setups.push(usual.at(Place::Ring0));
    }
    if matches!(extent, Extent::Lab | Extent::Full) {
        setups.extend(counting());
    }
    if extent == Extent::Full {
        setups.extend(timing());
        setups.extend(scale().filter(|s| s.vcpus > 1));
    }
    setups.retain(|s| touched(s) <= memory.0 / 4);
    setups
}

/// Bytes of host memory that a setup really takes.
pub fn touched(setup: &Setup) -> u64 {
    let data = setup.data.0.saturating_mul(setup.vcpus);
    let stores = setup.operations.saturating_mul(PageSize::Size4K.bytes());
    if setup.present || setup.backing != Backing::Small { data } else { data.min(stores) }
}

/// Series whose counts and memory say something.
fn counting() -> Vec<Setup> {
    let usual = Setup::usual;
    let cold = |place| usual(Payload::ColdTouch).at(place);
    let mut setups = Vec::new();
    for place in [Place::Native, Place::Ring3] {
        setups.push(Setup { present: false, ..cold(place) });
    }
    for backing in [Backing::Transparent, Backing::Hugetlb2M] {
        setups.push(Setup { backing, ..cold(Place::Ring0) });
    }
    for roots in [1, 8, 64] {
        setups.push(Setup { roots, ..usual(Payload::Cr3Reload) });
    }
    // One of the spaces is the payload's usual setup.
    setups.extend(memory_series().filter(|s| *s != usual(Payload::Spaces)));
    setups
}

/// What KVM keeps for a guest: by its size, and by its address spaces.
fn memory_series() -> impl Iterator<Item = Setup> {
    SPACES.into_iter().map(spaces).chain([untouched()])
}

/// Numbers of address spaces in the series.
pub const SPACES: [u64; 5] = [1, 4, 16, 32, 64];

/// Every page of 32 MiB through each of `roots` address spaces.
pub fn spaces(roots: u64) -> Setup {
    Setup { roots, operations: roots * 8192, ..Setup::usual(Payload::Spaces) }
}

/// A guest of 512 MiB that touches next to none of it: what KVM sets aside for the memory alone.
pub fn untouched() -> Setup {
    let setup = Setup::usual(Payload::ColdTouch).at(Place::Ring0);
    Setup { data: Bytes::mib(512), present: false, operations: 512, ..setup }
}

/// Series whose times say something: a guest's ring 3, which every kind of host runs as it is, beside native.
fn timing() -> Vec<Setup> {
    let chase = |place| Setup::usual(Payload::Chase).at(place);
    let mut setups = Vec::new();
    for place in [Place::Native, Place::Ring3] {
        for mib in CHASE_MIB {
            setups.push(Setup { data: Bytes::mib(mib), ..chase(place) });
        }
        for backing in [Backing::Transparent, Backing::Hugetlb2M] {
            setups.push(Setup { backing, data: Bytes::mib(64), ..chase(place) });
        }
    }
    for backing in [Backing::Small, Backing::Transparent, Backing::Hugetlb2M, Backing::Hugetlb1G] {
        let data = Bytes::mib(if backing == Backing::Hugetlb1G { 1024 } else { 64 });
        setups.push(Setup { guest_page: PageSize::Size2M, backing, data, ..chase(Place::Ring3) });
    }
    setups.extend(laps());
    setups
}

/// Laps, with each thing between them.
fn laps() -> impl Iterator<Item = Setup> {
    Between::ALL.into_iter().map(|between| Setup { between, ..Setup::usual(Payload::Laps) })
}

/// A miss for each page size of the guest over those that a host of the lab gives: it has no huge page of 1 GiB.
fn misses() -> impl Iterator<Item = Setup> {
    [Backing::Small, Backing::Hugetlb2M].into_iter().flat_map(|backing| {
        PageSize::ALL.map(|guest_page| Setup { guest_page, backing, ..Setup::usual(Payload::Miss) })
    })
}

/// Working sets of the pointer chase in the timing series.
const CHASE_MIB: [u64; 8] = [2, 4, 8, 32, 64, 128, 256, 1024];

/// Work on page tables by more and more vCPUs of one machine.
fn scaling(cpus: u64) -> impl Iterator<Item = Setup> {
    let counts = [1, 2, 4, 8, 16].into_iter().filter(move |n| *n <= cpus.max(1));
    counts.flat_map(|vcpus| {
        [Payload::Churn, Payload::DemandFault].map(|payload| Setup { vcpus, ..Setup::usual(payload) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_fit_the_host_and_repeat_nothing() {
        for extent in [Extent::Quick, Extent::Lab, Extent::Scaling, Extent::Memory, Extent::Full] {
            let mut all = setups(extent, Bytes::gib(64), 8);
            let count = all.len();
            assert!(all.iter().all(|s| s.place != Place::Native || s.payload.runs_natively()));
            all.sort();
            all.dedup();
            assert_eq!(all.len(), count);
            let small = setups(extent, Bytes::mib(64), 1);
            assert!(small.iter().all(|s| touched(s) <= 16 << 20), "{small:?}");
        }
    }
}
