//! What can be had without swapping: one definition for the host and for control groups.
//!
//! It is the kernel's (Documentation/filesystems/proc.rst, `MemAvailable`; `si_mem_available` in mm): what is
//! free, and of the page cache and of slabs that can be reclaimed all but what a working system keeps of them,
//! which is the low watermark or half, whichever is less. Of the host the kernel tells that itself. Of control
//! groups it tells only the parts.

use api::units::Bytes;

/// The parts, of the host or of a control group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// What nobody uses.
    pub free: Bytes,
    /// The page cache on both lists, active and inactive.
    pub page_cache: Bytes,
    /// Slabs that can be reclaimed.
    pub slabs: Bytes,
}

impl Parts {
    /// What can be had of them, where all there is has this size.
    pub fn to_be_had(self, size: Bytes) -> Bytes {
        let low = low_watermark(size);
        let of = |part: Bytes| part.saturating_sub(low.min(Bytes(part.0 / 2)));
        [self.free, of(self.page_cache), of(self.slabs)].into_iter().sum()
    }
}

/// The low watermark of a host of this size by the kernel's defaults: `min_free_kbytes` is four times the root
/// of the size in KiB, between 128 KiB and 256 MiB, and the low watermark is above it by a quarter of it or by
/// a thousandth of the size (`watermark_scale_factor`), whichever is more.
fn low_watermark(size: Bytes) -> Bytes {
    let size_kib = size.0 / 1024;
    let min_kib = size_kib.saturating_mul(16).isqrt().clamp(128, 262_144);
    Bytes::kib(min_kib.saturating_add((min_kib / 4).max(size_kib / 1000)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn half_of_a_small_cache_stays_and_the_low_watermark_of_a_large_one() {
        let parts = Parts { free: Bytes::mib(1), page_cache: Bytes::mib(4), slabs: Bytes::ZERO };
        assert_eq!(parts.to_be_had(Bytes::gib(1)), Bytes::mib(3));
        let low = low_watermark(Bytes::gib(1));
        assert_eq!(low, Bytes::kib(4096 + 1048));
        let cached = Parts { page_cache: Bytes::mib(500), slabs: Bytes::mib(100), ..parts };
        let all = Bytes::mib(601);
        assert_eq!(cached.to_be_had(Bytes::gib(1)), all.saturating_sub(low).saturating_sub(low));
        assert_eq!(low_watermark(Bytes::ZERO), Bytes::kib(160));
        assert!(low_watermark(Bytes(u64::MAX)) < Bytes(u64::MAX));
    }

    /// The kernel takes off what each zone keeps too, which it does not tell in one figure.
    #[test]
    fn on_this_host_the_kernel_counts_the_same() {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
            Bytes::kib(line.trim().trim_end_matches(" kB").parse().unwrap())
        };
        let parts = Parts {
            free: of("MemFree"),
            page_cache: of("Active(file)") + of("Inactive(file)"),
            slabs: of("SReclaimable"),
        };
        let (ours, kernels, total) = (parts.to_be_had(of("MemTotal")), of("MemAvailable"), of("MemTotal"));
        let difference = Bytes(ours.0.abs_diff(kernels.0));
        assert!(difference <= total.percent(5), "{ours} and {kernels} of {total}");
    }
}
