//! The host's memory: what there is, and how much of it VMs may hold.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use balloon::units::Bytes;

/// Where Linux tells about memory.
pub const MEMINFO: &str = "/proc/meminfo";

/// What a host keeps for itself where nobody says otherwise.
pub const DEFAULT_RESERVE: Bytes = Bytes::mib(512);

/// A budget that follows the host's free memory moves only by this much or more,
/// so that the page cache's comings and goings don't move guests.
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
    /// `MemAvailable`: what could be had without swapping.
    pub available: Bytes,
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
        Ok(Self { total: field("MemTotal")?, available: field("MemAvailable")? })
    }
}

/// What all VMs together may hold.
#[derive(Clone, Copy, Debug)]
pub enum Budget {
    /// As the administrator says.
    Fixed(Bytes),
    /// All but this much of the host, and less where other programs need more.
    AllBut {
        /// What the host keeps.
        reserve: Bytes,
        /// The budget now; moves in steps.
        held: Option<Bytes>,
    },
}

impl Budget {
    /// All of the host but `reserve`.
    pub const fn all_but(reserve: Bytes) -> Self {
        Self::AllBut { reserve, held: None }
    }

    /// What it is now, when VMs hold `resident` of the host's memory.
    pub fn now(&mut self, host: HostMemory, resident: Bytes) -> Bytes {
        match self {
            Self::Fixed(budget) => *budget,
            Self::AllBut { reserve, held } => {
                let whole = host.total.saturating_sub(*reserve);
                let left = resident.saturating_add(host.available).saturating_sub(*reserve);
                let budget = whole.min(left);
                let moved = held.map_or(Bytes(u64::MAX), |held| Bytes(held.0.abs_diff(budget.0)));
                if moved >= BUDGET_STEP {
                    *held = Some(budget);
                }
                held.unwrap_or(budget)
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
    fn says_what_is_missing() {
        let good = file("MemTotal:  2048 kB\nMemFree: 7 kB\nMemAvailable:\t 1024 kB\n");
        let memory = HostMemory { total: Bytes::mib(2), available: Bytes::mib(1) };
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
        let host = |available| HostMemory { total: Bytes::gib(8), available };
        assert_eq!(budget.now(host(Bytes::gib(8)), Bytes::ZERO), Bytes::gib(7));
        assert_eq!(budget.now(host(Bytes::mib(5 * 1024 - 30)), Bytes::gib(3)), Bytes::gib(7));
        assert_eq!(budget.now(host(Bytes::gib(2)), Bytes::gib(3)), Bytes::gib(4));
        assert_eq!(budget.now(host(Bytes::mib(2 * 1024 + 20)), Bytes::gib(3)), Bytes::gib(4));
        assert_eq!(Budget::Fixed(Bytes::gib(2)).now(host(Bytes::ZERO), Bytes::ZERO), Bytes::gib(2));
    }
}
