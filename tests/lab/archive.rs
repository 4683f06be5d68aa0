//! The cpio archives that kernels take as their first root (`newc`), and the lab's results.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Cursor, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpio::newc;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An initramfs in the making.
pub struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<PathBuf>,
    entries: u32,
}

impl Archive {
    /// One that holds `init` as `/init`, and the console that the kernel opens for it.
    ///
    /// # Errors
    /// As [`Archive::file`].
    pub fn with_init(init: &[u8]) -> Result<Self> {
        let mut archive = Self { bytes: Vec::new(), directories: BTreeSet::new(), entries: 0 };
        archive.contents("/init", 0o755, init)?;
        archive.parents(Path::new("dev/console"))?;
        archive.entry(
            newc::Builder::new("dev/console").mode(CHARACTER_DEVICE).rdev_major(5).rdev_minor(1),
            &[],
        )?;
        Ok(archive)
    }

    /// Adds a file with these contents at an absolute path.
    ///
    /// # Errors
    /// Where it is 4 GiB or larger.
    pub fn contents(&mut self, path: &str, mode: u32, contents: &[u8]) -> Result<()> {
        let path = path.trim_start_matches('/');
        self.parents(Path::new(path))?;
        self.entry(newc::Builder::new(path).mode(FILE | mode), contents)
    }

    /// Adds a file of this machine, with its permissions.
    ///
    /// # Errors
    /// Where it can't be read.
    pub fn file(&mut self, path: &str, source: &Path) -> Result<()> {
        let read = || -> std::io::Result<_> {
            Ok((fs::read(source)?, fs::metadata(source)?.permissions().mode() & 0o777))
        };
        let (contents, mode) = read().with_context(|| format!("{} can't be read", source.display()))?;
        self.contents(path, mode, &contents)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// As [`Archive::contents`].
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let path = path.trim_start_matches('/');
        self.parents(Path::new(path))?;
        self.entry(newc::Builder::new(path).mode(SYMLINK), target.as_bytes())
    }

    /// The finished archive.
    ///
    /// # Errors
    /// None in practice: it is written to memory.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        newc::trailer(&mut self.bytes)?;
        Ok(self.bytes)
    }

    fn parents(&mut self, path: &Path) -> Result<()> {
        let missing: Vec<PathBuf> = path
            .ancestors()
            .skip(1)
            .filter(|parent| !parent.as_os_str().is_empty() && !self.directories.contains(*parent))
            .map(Path::to_owned)
            .collect();
        for parent in missing.into_iter().rev() {
            self.entry(newc::Builder::new(&parent.to_string_lossy()).mode(DIRECTORY), &[])?;
            self.directories.insert(parent);
        }
        Ok(())
    }

    fn entry(&mut self, builder: newc::Builder, contents: &[u8]) -> Result<()> {
        self.entries += 1;
        let length = u32::try_from(contents.len()).context("a file of 4 GiB or more does not fit in cpio")?;
        let mut entry = builder.ino(self.entries).nlink(1).write(&mut self.bytes, length);
        entry.write_all(contents)?;
        entry.finish()?;
        Ok(())
    }
}

/// The files in an archive, by name. What follows a damaged entry is lost.
pub fn read(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut rest = Cursor::new(archive);
    while let Ok(mut entry) = newc::Reader::new(rest) {
        if entry.entry().is_trailer() {
            break;
        }
        let mut contents = Vec::new();
        if entry.read_to_end(&mut contents).is_err() {
            break;
        }
        files.push((entry.entry().name().to_owned(), contents));
        match entry.finish() {
            Ok(after) => rest = after,
            Err(_) => break,
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_is_read_back() {
        let mut archive = Archive::with_init(b"init").unwrap();
        archive.contents("/a/b/c", 0o644, b"contents").unwrap();
        let bytes = archive.finish().unwrap();
        let files = read(&bytes);
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["init", "dev", "dev/console", "a", "a/b", "a/b/c"]);
        assert_eq!(files[5].1, b"contents");
        assert!(read(&bytes[..bytes.len() / 2]).len() < 6);
    }
}
