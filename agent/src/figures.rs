//! What the kernel says of this guest's memory.

use api::agent::AgentFigures;
use api::units::Bytes;

use crate::cgroups;
use crate::pressure::stall_total;
use crate::source::{Source, counter};

/// Reads figures from files that stay open.
pub struct Reader {
    meminfo: Source,
    vmstat: Source,
    pressure: Source,
    page: u64,
}

/// How much reclaim the whole guest has done, as a count of no unit that only rises.
///
/// A cgroup that comes to its own limit reclaims too, and its tasks wait, but
/// these counters leave that out (`mm/vmscan.c`: `if (!cgroup_reclaim(sc))`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaim(u64);

impl Reader {
    /// Opens the kernel's files.
    pub fn new() -> Self {
        Self {
            meminfo: Source::open("/proc/meminfo"),
            vmstat: Source::open("/proc/vmstat"),
            pressure: Source::open("/proc/pressure/memory"),
            page: rustix::param::page_size() as u64,
        }
    }

    /// All figures.
    pub fn all(&self) -> AgentFigures {
        let mut figures = AgentFigures::default();
        self.meminfo.read(|text| read_meminfo(text, &mut figures));
        self.vmstat.read(|text| read_vmstat(text, self.page, &mut figures));
        self.pressure.read(|text| read_pressure(text, &mut figures));
        if let Some(cgroups) = cgroups::look() {
            figures.cgroup_stall_us = Some(cgroups.most_stalled_us);
            figures.cgroup_limited = Some(cgroups.limited);
        }
        figures
    }

    /// Those that matter while the guest waits, and how much it has reclaimed.
    pub fn urgent(&self) -> (AgentFigures, Reclaim) {
        let mut figures = AgentFigures::default();
        self.meminfo.read(|text| read_meminfo(text, &mut figures));
        self.pressure.read(|text| read_pressure(text, &mut figures));
        let reclaim = self.vmstat.read(|text| {
            figures.oom_kills = counter(text, "oom_kill");
            figures.allocation_stalls = allocation_stalls(text);
            reclaim(text)
        });
        let AgentFigures { available, total, stall_us, oom_kills, allocation_stalls, .. } = figures;
        let few = AgentFigures {
            available,
            total,
            stall_us,
            oom_kills,
            allocation_stalls,
            ..AgentFigures::default()
        };
        (few, reclaim.unwrap_or_default())
    }

    /// How much the guest has reclaimed.
    pub fn reclaim(&self) -> Reclaim {
        self.vmstat.read(reclaim).unwrap_or_default()
    }
}

fn read_meminfo(text: &str, figures: &mut AgentFigures) {
    let line = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        value.trim().strip_suffix(" kB")?.parse().ok().map(Bytes::kib)
    };
    figures.available = line("MemAvailable");
    figures.total = line("MemTotal");
    figures.committed = line("Committed_AS");
    figures.swap_free = line("SwapFree");
}

fn read_vmstat(text: &str, page: u64, figures: &mut AgentFigures) {
    let bytes = |pages: Option<u64>| pages.map(|pages| Bytes(pages.saturating_mul(page)));
    figures.refaults = bytes(sum(text, "workingset_refault_"));
    figures.swap_in = bytes(counter(text, "pswpin"));
    figures.swap_out = bytes(counter(text, "pswpout"));
    figures.oom_kills = counter(text, "oom_kill");
    figures.allocation_stalls = allocation_stalls(text);
}

fn allocation_stalls(vmstat: &str) -> Option<u64> {
    sum(vmstat, "allocstall_")
}

fn reclaim(vmstat: &str) -> Reclaim {
    let parts = [
        allocation_stalls(vmstat),
        counter(vmstat, "pageoutrun"),
        counter(vmstat, "pgscan_kswapd"),
        counter(vmstat, "pgscan_direct"),
    ];
    Reclaim(parts.into_iter().flatten().fold(0, u64::saturating_add))
}

/// The sum of all counters whose names begin so.
fn sum(text: &str, prefix: &str) -> Option<u64> {
    let values = text.lines().filter(|line| line.starts_with(prefix));
    let values = values.filter_map(|line| line.split_once(' ')?.1.trim().parse().ok());
    values.fold(None, |sum, value: u64| Some(sum.unwrap_or(0).saturating_add(value)))
}

fn read_pressure(text: &str, figures: &mut AgentFigures) {
    figures.stall_us = stall_total(text, "some");
    figures.full_stall_us = stall_total(text, "full");
}

#[cfg(test)]
mod tests {
    use super::*;

    const VMSTAT: &str = "nr_free_pages 100\npswpin 3\npswpout 4\npageoutrun 2\nallocstall_dma 0\n\
        allocstall_normal 5\nallocstall_movable 6\nworkingset_refault_anon 1\nworkingset_refault_file 2\n\
        pgscan_kswapd 10\npgscan_direct 20\npgscan_direct_throttle 99\noom_kill 1\n";

    #[test]
    fn the_kernels_files_are_understood() {
        let mut figures = AgentFigures::default();
        read_meminfo(
            "MemTotal:  1000 kB\nMemAvailable:   500 kB\nSwapFree: 0 kB\nCommitted_AS:  70 kB\n",
            &mut figures,
        );
        read_vmstat(VMSTAT, 4096, &mut figures);
        read_pressure(
            "some avg10=0.10 avg60=0.00 avg300=0.00 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=67\n",
            &mut figures,
        );
        let expected = AgentFigures {
            available: Some(Bytes::kib(500)),
            total: Some(Bytes::kib(1000)),
            committed: Some(Bytes::kib(70)),
            stall_us: Some(12345),
            full_stall_us: Some(67),
            refaults: Some(Bytes(3 * 4096)),
            swap_in: Some(Bytes(3 * 4096)),
            swap_out: Some(Bytes(4 * 4096)),
            swap_free: Some(Bytes::ZERO),
            allocation_stalls: Some(11),
            oom_kills: Some(1),
            ..AgentFigures::default()
        };
        assert_eq!(figures, expected);
        assert_eq!(reclaim(VMSTAT), Reclaim(11 + 2 + 10 + 20));
    }

    #[test]
    fn what_a_kernel_lacks_is_not_known() {
        let mut figures = AgentFigures::default();
        read_meminfo("", &mut figures);
        read_vmstat("garbage\npswpin\n", 4096, &mut figures);
        read_pressure("some total=x", &mut figures);
        assert_eq!(figures, AgentFigures::default());
    }

    #[test]
    fn this_machine_has_memory() {
        let figures = Reader::new().all();
        assert!(figures.available <= figures.total && figures.total > Some(Bytes::ZERO));
    }
}
