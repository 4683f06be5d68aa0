//! The host's memory, and how much of it VMs may hold.

pub mod available;
pub mod cgroup;
pub mod zfs;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use api::units::Bytes;

use self::cgroup::{GroupMemory, Groups};
use self::zfs::{ARCSTATS, Arc};
use crate::driver::process::{self, PROCESSES, ResidentMemory};
use crate::policy::Pressure;

/// Where Linux shows the host's memory.
pub const MEMINFO: &str = "/proc/meminfo";

/// Where the host's memory is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// `/proc/meminfo`.
    pub meminfo: PathBuf,
    /// What ZFS says of its cache; absent where that is not loaded.
    pub arcstats: PathBuf,
    /// `/proc/pressure/memory`; absent in kernels without PSI.
    pub pressure: PathBuf,
    /// `/proc/self/cgroup`: which control groups this process is in.
    pub own_groups: PathBuf,
    /// Where control groups are mounted.
    pub groups: PathBuf,
    /// `/proc`, for what VMMs' processes hold. If it shows nothing of them, VMs are believed within bounds.
    pub processes: PathBuf,
}

impl Default for Sources {
    fn default() -> Self {
        Self {
            meminfo: MEMINFO.into(),
            arcstats: ARCSTATS.into(),
            pressure: "/proc/pressure/memory".into(),
            own_groups: "/proc/self/cgroup".into(),
            groups: "/sys/fs/cgroup".into(),
            processes: PROCESSES.into(),
        }
    }
}

/// Reads the host's memory before each round.
#[derive(Clone, Debug)]
pub struct HostReader {
    sources: Sources,
    groups: Groups,
}

impl HostReader {
    /// Finds out which control groups count; they don't change while this process lives.
    pub fn new(sources: &Sources) -> Self {
        let groups = Groups::beside(&sources.own_groups, &sources.groups);
        Self { sources: sources.clone(), groups }
    }

    /// The host's memory now.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn memory(&self) -> Result<HostMemory, HostError> {
        let memory = HostMemory::read(&self.sources.meminfo)?;
        // The kernel takes it for used.
        let cache = Arc::read(&self.sources.arcstats).map_or(Bytes::ZERO, Arc::to_be_had);
        let available = memory.available.saturating_add(cache).min(memory.total);
        let group = self.groups.memory().map_err(HostError::Group)?;
        Ok(HostMemory { available, group, ..memory })
    }

    /// What the host holds for a process; `None` if the kernel does not tell.
    pub fn resident_memory(&self, pid: u32) -> Option<ResidentMemory> {
        process::resident_memory(&self.sources.processes, pid)
    }

    /// What the control groups of a process allow it, if one of them has a limit.
    ///
    /// # Errors
    /// It can't be read now.
    pub fn cgroup_limit(&self, pid: u32) -> io::Result<Option<Bytes>> {
        let file = self.sources.processes.join(format!("{pid}/cgroup"));
        Groups::limit_of(&file, &self.sources.groups)
    }

    /// How much of the last ten seconds some task on the host waited for memory, if the kernel tells
    /// (Documentation/accounting/psi.rst).
    pub fn pressure(&self) -> Option<Pressure> {
        let text = fs::read_to_string(&self.sources.pressure).ok()?;
        let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
        let percent = some.split(' ').find_map(|field| field.strip_prefix("avg10="))?.parse().ok()?;
        Some(Pressure::percent(percent))
    }
}

/// What a host keeps for itself by default.
pub const DEFAULT_RESERVE: Bytes = Bytes::mib(512);

/// The least change of a budget that follows the host's free memory, so that a change of the page cache does
/// not move guests.
const BUDGET_STEP: Bytes = Bytes::mib(64);

/// Why the host's memory is unknown.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The file can't be read.
    #[error("cannot read {}: {source}; is /proc mounted?", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A control group's file is there and can't be read.
    #[error("nobody knows whether VMs are limited together: cannot read {0}")]
    Group(io::Error),
    /// A line is missing or is no number.
    #[error("{} has no line `{field}: NUMBER kB`", .path.display())]
    Field {
        /// Which file.
        path: PathBuf,
        /// Which line.
        field: &'static str,
    },
}

/// The host's memory at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// `MemTotal`: what the kernel manages.
    pub total: Bytes,
    /// What could be had without swapping: `MemAvailable`, which is the kernel's own count of what
    /// [`available`] defines, and what ZFS would give of its cache.
    pub available: Bytes,
    /// `SwapFree`: what could still be swapped out, if the kernel tells.
    pub swap: Option<Bytes>,
    /// What the control groups leave to VMs, if one of them has a limit.
    pub group: Option<GroupMemory>,
}

impl HostMemory {
    /// Reads it from `path`, which is [`MEMINFO`] outside tests.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn read(path: &Path) -> Result<Self, HostError> {
        let text =
            fs::read_to_string(path).map_err(|source| HostError::Read { path: path.to_owned(), source })?;
        let field = |field: &'static str| {
            text.lines()
                .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
                .and_then(|rest| {
                    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
                })
                .map(Bytes)
                .ok_or_else(|| HostError::Field { path: path.to_owned(), field })
        };
        Ok(Self {
            total: field("MemTotal")?,
            available: field("MemAvailable")?,
            swap: field("SwapFree").ok(),
            group: None,
        })
    }

    /// What VMs could have without swapping and within their control groups.
    pub fn to_be_had(&self) -> Bytes {
        self.group.map_or(self.available, |group| group.free.min(self.available))
    }
}

/// What all VMs together may hold.
#[derive(Clone, Copy, Debug)]
pub enum Budget {
    /// As the administrator set it.
    Fixed(Bytes),
    /// All but this much of the host, and less where other programs need more.
    AllBut {
        /// What the host keeps.
        reserve: Bytes,
        /// The budget now; moves in steps.
        current: Option<Bytes>,
    },
}

impl Budget {
    /// All of the host but `reserve`.
    pub const fn all_but(reserve: Bytes) -> Self {
        Self::AllBut { reserve, current: None }
    }

    /// The budget now, if VMs hold `resident` of the host's memory.
    pub fn now(&mut self, host: HostMemory, resident: Bytes) -> Bytes {
        match self {
            Self::Fixed(budget) => *budget,
            Self::AllBut { reserve, current } => {
                let whole = host.total.saturating_sub(*reserve);
                let left = resident.saturating_add(host.available).saturating_sub(*reserve);
                let mut budget = whole.min(left);
                // A control group's limit leaves the host's reserve alone already.
                if let Some(GroupMemory { limit, free }) = host.group {
                    budget = budget.min(limit).min(resident.saturating_add(free));
                }
                let moved = current.map_or(Bytes(u64::MAX), |current| Bytes(current.0.abs_diff(budget.0)));
                if moved >= BUDGET_STEP {
                    *current = Some(budget);
                }
                current.unwrap_or(budget)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn reads_this_hosts_memory() {
        let memory = HostMemory::read(Path::new(MEMINFO)).unwrap();
        assert!(memory.total >= memory.available && memory.available > Bytes::ZERO);
    }

    #[test]
    fn what_zfs_would_give_of_its_cache_can_be_had() {
        let meminfo = file("MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n");
        let available = |arcstats: &str| {
            let arcstats = file(arcstats);
            let sources = Sources {
                meminfo: meminfo.path().to_owned(),
                arcstats: arcstats.path().to_owned(),
                ..Sources::default()
            };
            HostReader::new(&sources).memory().unwrap().available
        };
        let gib = 1_u64 << 30;
        let size = |size: u64| format!("c_min 4 {}\nsize 4 {size}\n", gib / 4);
        assert_eq!(available(&size(2 * gib)), Bytes::mib(1024 + 2048 - 256));
        assert_eq!(available(&size(u64::MAX)), Bytes::gib(4), "never more than there is");
        assert_eq!(available(""), Bytes::gib(1));
    }

    #[test]
    fn pressure_is_read_where_there_is_some() {
        let pressure = |text: &str| {
            let file = file(text);
            let sources = Sources { pressure: file.path().to_owned(), ..Sources::default() };
            HostReader::new(&sources).pressure()
        };
        let text = "some avg10=12.34 avg60=1.00 avg300=0.00 total=5\nfull avg10=9.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(pressure(text), Some(Pressure::percent(12.34)));
        for text in ["", "some avg10=x", "full avg10=1.00", "some total=1"] {
            assert_eq!(pressure(text), None, "{text:?}");
        }
    }

    #[test]
    fn says_what_is_missing() {
        let good = file("MemTotal:  2048 kB\nMemFree: 7 kB\nMemAvailable:\t 1024 kB\n");
        let memory = HostMemory { total: Bytes::mib(2), available: Bytes::mib(1), swap: None, group: None };
        assert_eq!(HostMemory::read(good.path()).unwrap(), memory);
        for text in
            ["", "MemTotal: 1 kB\n", "MemTotal: x kB\nMemAvailable: 1 kB\n", "MemTotal: 99999999999999999 kB"]
        {
            let error = HostMemory::read(file(text).path()).unwrap_err();
            assert!(matches!(error, HostError::Field { .. }), "{text:?}: {error}");
        }
        assert!(matches!(HostMemory::read(Path::new("/nowhere")), Err(HostError::Read { .. })));
    }

    #[test]
    fn the_budget_leaves_other_programs_theirs_and_does_not_wobble() {
        let mut budget = Budget::all_but(Bytes::gib(1));
        let host = |available| HostMemory { total: Bytes::gib(8), available, swap: None, group: None };
        assert_eq!(budget.now(host(Bytes::gib(8)), Bytes::ZERO), Bytes::gib(7));
        assert_eq!(budget.now(host(Bytes::mib(5 * 1024 - 30)), Bytes::gib(3)), Bytes::gib(7));
        assert_eq!(budget.now(host(Bytes::gib(2)), Bytes::gib(3)), Bytes::gib(4));
        assert_eq!(budget.now(host(Bytes::mib(2 * 1024 + 20)), Bytes::gib(3)), Bytes::gib(4));
        let group = Some(GroupMemory { limit: Bytes::gib(6), free: Bytes::gib(1) });
        let mut limited = Budget::all_but(Bytes::gib(1));
        let host_with_room = HostMemory { group, ..host(Bytes::gib(8)) };
        assert_eq!(limited.now(host_with_room, Bytes::gib(2)), Bytes::gib(3), "what the slice has left");
        assert_eq!(limited.now(host_with_room, Bytes::gib(7)), Bytes::gib(6), "never more than its limit");
        assert_eq!(Budget::Fixed(Bytes::gib(2)).now(host(Bytes::ZERO), Bytes::ZERO), Bytes::gib(2));
        assert_eq!(host_with_room.to_be_had(), Bytes::gib(1));
    }
}
