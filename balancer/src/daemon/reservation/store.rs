//! The file of grants to VMs that have not appeared yet.
//!
//! A new daemon learns everything else from the VMs. A VM that starts has no socket yet and may be touching
//! the memory that the last daemon granted: for a moment only this file knows of it. It lies in the runtime
//! directory, which does not outlive the host's boot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::units::Bytes;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::LIFE;
use super::starting_process::StartingProcess;

/// One entry of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredReservation {
    /// The VM that is about to start.
    pub name: String,
    /// What it was granted.
    pub size: Bytes,
    /// The process that touches it meanwhile, if that is known.
    #[serde(default)]
    pub starting: Option<StartingProcess>,
    /// When it is dropped, in milliseconds since the host's boot.
    until_boot_ms: u64,
}

impl StoredReservation {
    /// An entry that stands for `left` from now on.
    pub fn new(name: &str, size: Bytes, starting: Option<StartingProcess>, left: Duration) -> Self {
        let until = since_boot().saturating_add(left).as_millis();
        Self {
            name: name.to_owned(),
            size,
            starting,
            until_boot_ms: u64::try_from(until).unwrap_or(u64::MAX),
        }
    }

    /// How long it still stands: at most [`LIFE`], and zero if its time is over.
    pub fn left(&self) -> Duration {
        Duration::from_millis(self.until_boot_ms).saturating_sub(since_boot()).min(LIFE)
    }
}

/// The file.
#[derive(Debug)]
pub struct ReservationStore {
    path: PathBuf,
}

impl ReservationStore {
    /// The file in the daemon's own directory.
    pub fn in_directory(own: &Path) -> Self {
        Self { path: own.join("reservations.json") }
    }

    /// The entries of the last daemon; none if there is no file.
    ///
    /// # Errors
    /// It can't be read, or makes no sense.
    pub fn read(&self) -> io::Result<Vec<StoredReservation>> {
        match fs::read(&self.path) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// How long a promise in the file may still stand, whatever it says: [`LIFE`] from when it was last written.
    pub fn longest_left(&self) -> Duration {
        let written = fs::metadata(&self.path).and_then(|metadata| metadata.modified());
        // A clock that was set tells nothing.
        let age = written.ok().and_then(|written| written.elapsed().ok()).unwrap_or_default();
        LIFE.saturating_sub(age)
    }

    /// Replaces the file as a whole: a daemon that is killed meanwhile leaves the old one.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, kept: &[StoredReservation]) -> io::Result<()> {
        if kept.is_empty() {
            return match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let new = self.path.with_extension("new");
        fs::write(&new, serde_json::to_vec(kept)?)?;
        fs::rename(&new, &self.path)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::Process;

    #[test]
    fn what_was_written_is_read_and_nothing_leaves_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let store = ReservationStore::in_directory(directory.path());
        assert_eq!(store.read().unwrap(), []);
        let starting = Process::own().map(StartingProcess::new);
        let kept = [StoredReservation::new("web", Bytes::mib(266), starting, Duration::from_secs(30))];
        store.write(&kept).unwrap();
        assert_eq!(store.read().unwrap(), kept);
        assert!(kept[0].left() > Duration::from_secs(20) && kept[0].left() <= Duration::from_secs(30));
        store.write(&[]).unwrap();
        assert!(!store.path().exists());
        fs::write(store.path(), "[{").unwrap();
        assert!(store.read().is_err());
    }

    #[test]
    fn what_an_unreadable_file_promises_is_over_after_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let store = ReservationStore::in_directory(directory.path());
        fs::write(store.path(), "[{").unwrap();
        let left = store.longest_left();
        assert!(left > LIFE - Duration::from_secs(10) && left <= LIFE, "{left:?}");
        let file = fs::File::options().write(true).open(store.path()).unwrap();
        let now = std::time::SystemTime::now();
        file.set_modified(now - LIFE).unwrap();
        assert_eq!(store.longest_left(), Duration::ZERO);
        // The clock was set back since.
        file.set_modified(now + 100 * LIFE).unwrap();
        assert_eq!(store.longest_left(), LIFE);
    }

    #[test]
    fn no_promise_outlives_its_time() {
        assert_eq!(StoredReservation::new("web", Bytes::mib(1), None, Duration::MAX).left(), LIFE);
        assert_eq!(StoredReservation::new("web", Bytes::mib(1), None, Duration::ZERO).left(), Duration::ZERO);
    }
}
