//! Where the lab keeps what it fetched and made: `~/.cache/ballast`.

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

/// A directory in the cache, which exists afterwards.
///
/// # Errors
/// Where there is no home directory, or the directory can't be made.
pub fn directory(name: &str) -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(env::var_os("HOME").context("HOME is not set: the lab's cache lies there")?)
            .join(".cache"),
    };
    let directory = base.join("ballast").join(name);
    fs::create_dir_all(&directory).with_context(|| format!("{} can't be made", directory.display()))?;
    Ok(directory)
}

/// Keeps other processes from making the same thing at once, for as long as the file is open.
///
/// # Errors
/// Where the lock's file can't be made.
pub fn lock(name: &str) -> Result<File> {
    let path = directory("locks")?.join(name);
    let file = File::create(&path).with_context(|| format!("{} can't be made", path.display()))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Writes a file so that others see all of it or nothing.
///
/// # Errors
/// As writing and renaming do.
pub fn write_whole(path: &Path, contents: &[u8]) -> Result<()> {
    let directory = path.parent().context("a file in the cache has a directory")?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(contents)?;
    file.persist(path).with_context(|| format!("{} can't be written", path.display()))?;
    Ok(())
}
