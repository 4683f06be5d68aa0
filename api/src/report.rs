//! What a guest says about its own memory.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// How many different statistics are kept of one report.
///
/// Linux 6.12 sends 16; the bound keeps a hostile guest from growing the map.
pub const MOST_STATISTICS: usize = 64;

/// One report of the statistics queue (virtio 1.2, section 5.5.6.4).
///
/// Every value is the guest's word and may be a lie. A statistic that the
/// guest did not send is `None`; tags unknown here are kept by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Memory swapped in since the guest booted.
    pub swap_in: Option<Bytes>,
    /// Memory swapped out since the guest booted.
    pub swap_out: Option<Bytes>,
    /// Page faults that needed I/O, since the guest booted.
    pub major_faults: Option<u64>,
    /// Page faults that needed none, since the guest booted.
    pub minor_faults: Option<u64>,
    /// Memory used for nothing (`MemFree`).
    pub free: Option<Bytes>,
    /// Memory the guest's kernel manages (`MemTotal`; the balloon is not in it).
    pub total: Option<Bytes>,
    /// What could be had without swapping (`MemAvailable`).
    pub available: Option<Bytes>,
    /// Page cache that could be dropped.
    pub disk_caches: Option<Bytes>,
    /// Huge pages the guest allocated, as a count since it booted.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages the guest failed to allocate, as a count since it booted.
    pub hugetlb_failures: Option<u64>,
    /// Processes killed for lack of memory, since the guest booted (Linux 6.12).
    pub oom_kills: Option<u64>,
    /// Allocations that had to wait for memory, since the guest booted (Linux 6.12).
    pub allocation_stalls: Option<u64>,
    /// Pages scanned by background reclaim, since the guest booted (Linux 6.12).
    pub async_scans: Option<u64>,
    /// Pages scanned by allocations themselves, since the guest booted (Linux 6.12).
    pub direct_scans: Option<u64>,
    /// Pages reclaimed in the background, since the guest booted (Linux 6.12).
    pub async_reclaims: Option<u64>,
    /// Pages reclaimed by allocations themselves, since the guest booted (Linux 6.12).
    pub direct_reclaims: Option<u64>,
    /// Statistics with a tag that this version does not know, by tag.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub unknown: BTreeMap<u16, u64>,
}

impl Report {
    /// Takes in one statistic as it stands in the virtqueue. The last of two
    /// with the same tag wins; unknown tags past [`MOST_STATISTICS`] are dropped.
    pub fn set(&mut self, tag: u16, value: u64) {
        let bytes = Some(Bytes(value));
        let count = Some(value);
        match tag {
            0 => self.swap_in = bytes,
            1 => self.swap_out = bytes,
            2 => self.major_faults = count,
            3 => self.minor_faults = count,
            4 => self.free = bytes,
            5 => self.total = bytes,
            6 => self.available = bytes,
            7 => self.disk_caches = bytes,
            8 => self.hugetlb_allocations = count,
            9 => self.hugetlb_failures = count,
            10 => self.oom_kills = count,
            11 => self.allocation_stalls = count,
            12 => self.async_scans = count,
            13 => self.direct_scans = count,
            14 => self.async_reclaims = count,
            15 => self.direct_reclaims = count,
            tag if self.unknown.len() < MOST_STATISTICS || self.unknown.contains_key(&tag) => {
                self.unknown.insert(tag, value);
            }
            _ => {}
        }
    }

    /// What the guest could give up without pain: `available`, or what is free
    /// and cached in a guest too old to say.
    pub fn spare(&self) -> Option<Bytes> {
        self.available.or_else(|| {
            let free = self.free?;
            Some(free.saturating_add(self.disk_caches.unwrap_or_default()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_have_names_and_others_keep_their_number() {
        let mut report = Report::default();
        for tag in 0..20 {
            report.set(tag, u64::from(tag) + 100);
        }
        assert_eq!(report.available, Some(Bytes(106)));
        assert_eq!(report.direct_reclaims, Some(115));
        assert_eq!(report.unknown, BTreeMap::from([(16, 116), (17, 117), (18, 118), (19, 119)]));
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }

    #[test]
    fn a_flood_of_unknown_tags_is_bounded() {
        let mut report = Report::default();
        for tag in 0..=u16::MAX {
            report.set(tag, 1);
        }
        assert_eq!(report.unknown.len(), MOST_STATISTICS);
    }

    #[test]
    fn an_old_guest_spares_what_is_free_and_cached() {
        let new = Report { available: Some(Bytes(5)), free: Some(Bytes(9)), ..Report::default() };
        assert_eq!(new.spare(), Some(Bytes(5)));
        let old = Report { free: Some(Bytes(u64::MAX)), disk_caches: Some(Bytes(2)), ..Report::default() };
        assert_eq!(old.spare(), Some(Bytes(u64::MAX)));
        assert_eq!(Report::default().spare(), None);
    }
}
