//! Where the lab keeps what it fetched and made: `~/.cache/ballast`.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::Error;
use crate::error::files;

/// A directory in the cache, which exists afterwards.
///
/// # Errors
/// Where there is no home directory, or the directory can't be made.
pub fn directory(name: &str) -> Result<PathBuf, Error> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => match env::var_os("HOME") {
            Some(home) => PathBuf::from(home).join(".cache"),
            None => return Err(Error::Failed("HOME is not set: the lab's cache lies there".to_owned())),
        },
    };
    let directory = base.join("ballast").join(name);
    fs::create_dir_all(&directory).map_err(files(directory.display()))?;
    Ok(directory)
}

/// Keeps other processes from making the same thing at once, for as long as the file is open.
///
/// # Errors
/// Where the lock's file can't be made.
pub fn lock(name: &str) -> Result<File, Error> {
    take_lock(name, FlockOperation::LockExclusive)
}

/// The same, where no other process has it.
///
/// # Errors
/// As [`lock`].
pub fn try_lock(name: &str) -> Result<Option<File>, Error> {
    match take_lock(name, FlockOperation::NonBlockingLockExclusive) {
        Err(Error::Files { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => Ok(None),
        taken => taken.map(Some),
    }
}

fn take_lock(name: &str, how: FlockOperation) -> Result<File, Error> {
    let path = directory("locks")?.join(name);
    let locked = || {
        let file = File::create(&path)?;
        flock(&file, how)?;
        Ok(file)
    };
    locked().map_err(files(path.display()))
}

/// Writes a file so that others see all of it or nothing.
///
/// # Errors
/// As writing and renaming do.
pub fn write_whole(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(path))?;
        file.write_all(contents)?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(files(path.display()))
}
