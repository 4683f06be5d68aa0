//! The cpio archives that kernels take as their first root (`newc`; kernel:
//! Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::newc;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;
/// Devices that a first process needs before it mounts devtmpfs: name, major, minor.
const DEVICES: [(&str, u32, u32); 2] = [("dev/console", 5, 1), ("dev/null", 1, 3)];

/// An initramfs in the making.
#[derive(Debug)]
pub struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<PathBuf>,
    entries: u32,
}

impl Archive {
    /// One that holds a program at `path`, the console that the kernel opens for it, and /dev/null.
    ///
    /// # Errors
    /// As [`Archive::contents`].
    pub fn with_program(path: &str, program: &[u8]) -> io::Result<Self> {
        let mut archive = Self { bytes: Vec::new(), directories: BTreeSet::new(), entries: 0 };
        archive.contents(path, 0o755, program)?;
        for (device, major, minor) in DEVICES {
            archive.parents(Path::new(device))?;
            let device = newc::Builder::new(device).mode(CHARACTER_DEVICE);
            archive.entry(device.rdev_major(major).rdev_minor(minor), &[])?;
        }
        Ok(archive)
    }

    /// Adds an empty directory at an absolute path, and those above it.
    ///
    /// # Errors
    /// None in practice: it is written to memory.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        // What is made are the parents of something below it.
        self.parents(&Path::new(path.trim_start_matches('/')).join("_"))
    }

    /// Adds a file with these contents at an absolute path.
    ///
    /// # Errors
    /// Where it is 4 GiB or larger.
    pub fn contents(&mut self, path: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        self.parents(Path::new(path))?;
        self.entry(newc::Builder::new(path).mode(FILE | mode), contents)
    }

    /// Adds a file of this machine, with its permissions.
    ///
    /// # Errors
    /// Where it can't be read.
    pub fn file(&mut self, path: &str, source: &Path) -> io::Result<()> {
        let read = || -> io::Result<_> {
            Ok((fs::read(source)?, fs::metadata(source)?.permissions().mode() & 0o777))
        };
        let (contents, mode) = read().map_err(|error| {
            io::Error::new(error.kind(), format!("{} can't be read: {error}", source.display()))
        })?;
        self.contents(path, mode, &contents)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// As [`Archive::contents`].
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        self.parents(Path::new(path))?;
        self.entry(newc::Builder::new(path).mode(SYMLINK), target.as_bytes())
    }

    /// A static shell with the usual commands, in `/bin`.
    pub fn busybox(&mut self, busybox: &Path) -> io::Result<()> {
        self.file("/bin/busybox", busybox)?;
        let list = Command::new(busybox).arg("--list").output()?;
        for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|name| *name != "busybox") {
            self.link(&format!("/bin/{applet}"), "busybox")?;
        }
        Ok(())
    }

    /// The finished archive.
    ///
    /// # Errors
    /// None in practice: it is written to memory.
    pub fn finish(mut self) -> io::Result<Vec<u8>> {
        newc::trailer(&mut self.bytes)?;
        Ok(self.bytes)
    }

    fn parents(&mut self, path: &Path) -> io::Result<()> {
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

    fn entry(&mut self, builder: newc::Builder, contents: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let too_large = |_| io::Error::other("a file of 4 GiB or more does not fit in cpio");
        let length = u32::try_from(contents.len()).map_err(too_large)?;
        let mut entry = builder.ino(self.entries).nlink(1).write(&mut self.bytes, length);
        entry.write_all(contents)?;
        entry.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_holds_what_was_put_in_below_its_directories() {
        let mut archive = Archive::with_program("/init", b"12345").expect("written");
        archive.directory("/proc").expect("written");
        archive.contents("/a/b/c", 0o644, b"contents").expect("written");
        archive.link("/a/d", "b/c").expect("written");
        let bytes = archive.finish().expect("written");
        let mut rest = io::Cursor::new(bytes);
        let mut names = Vec::new();
        while let Ok(entry) = newc::Reader::new(rest) {
            if entry.entry().is_trailer() {
                break;
            }
            names.push(entry.entry().name().to_owned());
            rest = entry.finish().expect("an entry ends");
        }
        assert_eq!(names, ["init", "dev", "dev/console", "dev/null", "proc", "a", "a/b", "a/b/c", "a/d"]);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let mut archive = Archive::with_program("/init", b"").expect("written");
        let error = archive.file("/x", Path::new("/no/such/file")).expect_err("it is not there");
        assert!(error.to_string().contains("/no/such/file"), "{error}");
    }
}
