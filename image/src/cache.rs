//! Unpacked kernels that are kept for the next start: a directory with a file for each bzImage, named by its hash.
//!
//! Nothing depends on it. What can't be read, kept or trusted is unpacked once more.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, OFlags, flock};
use tempfile::NamedTempFile;

use crate::Error;
use crate::helper::TIME_LIMIT;
use crate::kernel::prepared::{Key, PreparedKernel};

/// Bytes that all files together may have: some fifteen kernels.
pub const SIZE_LIMIT: u64 = 512 << 20;

/// How long to wait for another VM that unpacks.
const PATIENCE: Duration = TIME_LIMIT;
/// How often to look whether it is done.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What unpacked kernels end in, and what is not whole yet begins with.
const KERNEL: &str = "kernel";
const PARTIAL: &str = ".partial-";
const LOCK: &str = "lock";

/// A directory of unpacked kernels.
#[derive(Clone, Debug)]
pub struct Cache {
    directory: PathBuf,
    size_limit: u64,
}

/// The right to change the cache: one process has it at a time.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Where the cache of this user is, if there is a place: `$XDG_CACHE_HOME/ballast/kernels`, `~/.cache/ballast/kernels`,
/// and for root without these variables `/var/cache/ballast/kernels`, as services have no home.
pub fn default_directory() -> Option<PathBuf> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = if rustix::process::geteuid().is_root() {
        variable("XDG_CACHE_HOME").unwrap_or_else(|| "/var/cache".into())
    } else {
        variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?
    };
    // A relative path is invalid (XDG Base Directory Specification).
    base.is_absolute().then(|| base.join("ballast/kernels"))
}

impl Cache {
    /// The cache in this directory, which is made where it is missing.
    ///
    /// # Errors
    /// [`Error::Cache`] where it can't be made, or others may write to it: they would choose what guests boot.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        Self::with_limit(directory, SIZE_LIMIT)
    }

    /// As [`Cache::open`], with room for `size_limit` bytes.
    ///
    /// # Errors
    /// As [`Cache::open`].
    pub fn with_limit(directory: &Path, size_limit: u64) -> Result<Self, Error> {
        let unusable = |why: String| Error::Cache { path: directory.to_owned(), why };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        let metadata =
            made.and_then(|()| fs::metadata(directory)).map_err(|error| unusable(error.to_string()))?;
        if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            return Err(unusable("it is another user's, or others may write to it".to_owned()));
        }
        Ok(Self { directory: directory.to_owned(), size_limit })
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.directory.join(format!("{key}.{KERNEL}"))
    }

    /// The unpacked kernel of the bzImage with this key, if it is there and whole. Its contents are checked as they are
    /// loaded.
    pub fn get(&self, key: &Key) -> Option<PreparedKernel> {
        let path = self.path(key);
        let options = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file =
            OpenOptions::new().read(true).custom_flags(options.bits().cast_signed()).open(&path).ok()?;
        let is_own = |metadata: fs::Metadata| {
            metadata.is_file() && metadata.uid() == rustix::process::geteuid().as_raw()
        };
        if !file.metadata().is_ok_and(is_own) {
            return None;
        }
        // The kernel that was used longest ago goes first. The time is a hint: where it can't be set nothing is lost.
        let _ = file.set_modified(SystemTime::now());
        Some(PreparedKernel::open(file, key).ok()?.kept_in(path))
    }

    /// Waits for the right to change the cache.
    ///
    /// # Errors
    /// [`Error::Cache`] where the lock can't be had, or not in time.
    pub fn lock(&self) -> Result<Lock, Error> {
        self.lock_within(PATIENCE)
    }

    fn lock_within(&self, patience: Duration) -> Result<Lock, Error> {
        let start = Instant::now();
        // It belongs to the open file, so that a process which dies gives it back.
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.directory.join(LOCK));
        let file = file.map_err(|error| self.unusable(&error))?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Lock { _file: file }),
                Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < patience => thread::sleep(LOOK_AGAIN),
                Err(error) => return Err(self.unusable(&error.into())),
            }
        }
    }

    /// A file to write an unpacked kernel to. It goes away where it is not [kept](Self::keep).
    ///
    /// # Errors
    /// [`Error::Cache`].
    pub fn start(&self, _: &Lock) -> Result<NamedTempFile, Error> {
        let file = tempfile::Builder::new().prefix(PARTIAL).tempfile_in(&self.directory);
        file.map_err(|error| self.unusable(&error))
    }

    /// Keeps what was written, and removes what was used longest ago where it is too much.
    ///
    /// # Errors
    /// [`Error::Cache`].
    pub fn keep(&self, key: &Key, file: NamedTempFile, _: &Lock) -> Result<(), Error> {
        let size = file.as_file().metadata().map_err(|error| self.unusable(&error))?.len();
        // The others stay for one that would have no place anyway.
        let Some(rest) = self.size_limit.checked_sub(size) else { return Ok(()) };
        self.make_room(rest).map_err(|error| self.unusable(&error))?;
        file.persist(self.path(key)).map_err(|error| self.unusable(&error.error))?;
        Ok(())
    }

    /// Leaves kernels of `limit` bytes at most, those that were used last.
    fn make_room(&self, limit: u64) -> io::Result<()> {
        let mut kernels = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let (path, metadata) =
                (entry.as_ref().map(fs::DirEntry::path), entry.as_ref().map(fs::DirEntry::metadata));
            let (Ok(path), Ok(Ok(metadata))) = (path, metadata) else { continue };
            if path.extension() == Some(OsStr::new(KERNEL)) {
                kernels.push((metadata.modified()?, metadata.len(), path));
            }
        }
        kernels.sort();
        let mut total: u64 = kernels.iter().map(|(_, size, _)| *size).sum();
        for (_, size, path) in kernels {
            if total <= limit {
                break;
            }
            fs::remove_file(path)?;
            total = total.saturating_sub(size);
        }
        Ok(())
    }

    /// Removes what processes that were killed have left. Whoever has the lock is the only one that writes.
    ///
    /// # Errors
    /// [`Error::Cache`].
    pub fn sweep(&self, _: &Lock) -> Result<(), Error> {
        let sweep = || {
            for entry in fs::read_dir(&self.directory)? {
                let entry = entry?;
                if entry.file_name().as_encoded_bytes().starts_with(PARTIAL.as_bytes()) {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        };
        sweep().map_err(|error: io::Error| self.unusable(&error))
    }

    fn unusable(&self, why: &io::Error) -> Error {
        Error::Cache { path: self.directory.clone(), why: why.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::prepared;
    use crate::testing::TestKernel;
    use std::io::Cursor;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A made-up kernel's key, and the file that it is unpacked to.
    fn kernel(cache: &Cache, lock: &Lock, bss: u64) -> (Key, NamedTempFile) {
        let image = TestKernel { bss, ..TestKernel::default() }.bzimage();
        let mut file = cache.start(lock).expect("a file");
        prepared::prepare(&image, file.as_file_mut()).expect("it is a kernel");
        (prepared::key(&mut Cursor::new(image)).expect("memory can be read"), file)
    }

    fn keep(cache: &Cache, bss: u64) -> Key {
        let lock = cache.lock().expect("nobody has it");
        let (key, file) = kernel(cache, &lock, bss);
        cache.keep(&key, file, &lock).expect("kept");
        key
    }

    #[test]
    fn what_was_used_longest_ago_makes_room() {
        let directory = tempfile::tempdir().expect("a directory");
        let size = {
            let cache = Cache::open(directory.path()).expect("a cache");
            let lock = cache.lock().expect("nobody has it");
            kernel(&cache, &lock, 0).1.as_file().metadata().expect("a file").len()
        };
        let cache = Cache::with_limit(directory.path(), size * 3).expect("a cache");
        let keys: Vec<Key> = (0..3).map(|bss| keep(&cache, bss << 12)).collect();
        // Clocks of file systems are coarse.
        for (key, age) in keys.iter().zip([30, 20, 10]) {
            let file = File::options().write(true).open(cache.path(key)).expect("kept");
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).expect("its time is set");
        }
        assert!(cache.get(&keys[0]).is_some(), "and is used just now");
        let newest = keep(&cache, 3 << 12);
        let is_there = |key: &Key| cache.get(key).is_some();
        assert_eq!([&keys[0], &keys[1], &keys[2], &newest].map(is_there), [true, false, true, true]);
        // One that is too large for all of it drives out no other in vain, and is not kept.
        let small = Cache::with_limit(directory.path(), size - 1).expect("a cache");
        let key = keep(&small, 4 << 12);
        assert!(small.get(&key).is_none());
    }

    #[test]
    fn a_file_that_is_damaged_or_strange_is_as_none() {
        let directory = tempfile::tempdir().expect("a directory");
        let cache = Cache::open(directory.path()).expect("a cache");
        let (key, other) = (keep(&cache, 0), keep(&cache, 1 << 12));
        let path = cache.path(&key);
        let whole = fs::read(&path).expect("kept");
        fs::write(&path, &whole[..whole.len() / 2]).expect("written");
        assert!(cache.get(&key).is_none());
        fs::copy(cache.path(&other), &path).expect("copied");
        assert!(cache.get(&key).is_none(), "another kernel under its name");
        fs::remove_file(&path).expect("it was there");
        symlink(cache.path(&other), &path).expect("linked");
        assert!(cache.get(&key).is_none());
        fs::remove_file(&path).expect("it was there");
        // Nobody will ever write to it.
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .expect("a pipe");
        assert!(cache.get(&key).is_none());
        fs::remove_file(&path).expect("it was there");
        assert_eq!((keep(&cache, 0), cache.get(&key).is_some()), (key, true));
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let cache = directory.path().join("a/b");
        Cache::open(&cache).expect("it is made");
        assert_eq!(fs::metadata(&cache).expect("it is there").mode() & 0o777, 0o700);
        for mode in [0o770, 0o702] {
            fs::set_permissions(&cache, fs::Permissions::from_mode(mode)).expect("its owner may");
            let error = Cache::open(&cache).expect_err("others may write to it").to_string();
            assert!(error.contains("a/b"), "{error}");
        }
        assert!(Cache::open(Path::new("/dev/null/kernels")).is_err());
    }

    #[test]
    fn one_process_changes_it_at_a_time_and_leaves_nothing_half() {
        let directory = tempfile::tempdir().expect("a directory");
        let cache = Cache::open(directory.path()).expect("a cache");
        let lock = cache.lock().expect("nobody has it");
        let error = cache.lock_within(Duration::ZERO).expect_err("it is taken");
        assert!(matches!(error, Error::Cache { .. }), "{error}");
        // As a process that is killed leaves it.
        let (_, file) = kernel(&cache, &lock, 0);
        let (_, path) = file.keep().expect("it stays");
        drop(lock);
        let lock = cache.lock().expect("it was given back");
        assert!(path.exists());
        cache.sweep(&lock).expect("swept");
        assert!(!path.exists());
    }
}
