//! What an emulated host hands out: files in a cpio archive (`newc`), the last of a name counts.
//!
//! The host's program may hand out files while it runs ([`hand_out`]). What is asked for is added at its end,
//! and then [`EXIT_CODE`], whose presence says that the archive is whole.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::{self, Cursor, Read, Write};
use std::path::Path;

use cpio::newc;

/// The file that holds the program's exit code: its own, or 128 and the number of the signal that ended it.
pub const EXIT_CODE: &str = "exit-code";
/// Names the device that takes files, for the host's program.
pub const PORT: &str = "BALLAST_LAB_RESULTS";
/// A plain file that everybody may read.
const FILE: u32 = 0o100_644;

/// Hands out a file from a program in an emulated host.
///
/// # Errors
/// Where this is no emulated host, or the device takes nothing.
pub fn hand_out(name: &str, contents: &[u8]) -> io::Result<()> {
    let port = env::var_os(PORT).ok_or_else(|| io::Error::other("this is no emulated host of the lab"))?;
    write(&mut OpenOptions::new().write(true).open(port)?, name, contents)
}

/// Adds a file to an archive.
///
/// # Errors
/// Where it has 4 GiB or more, or `archive` takes nothing.
pub fn write(archive: &mut impl Write, name: &str, contents: &[u8]) -> io::Result<()> {
    let length = u32::try_from(contents.len()).map_err(|_| io::Error::other("4 GiB or more"))?;
    let mut entry = newc::Builder::new(name).mode(FILE).write(archive, length);
    entry.write_all(contents)?;
    entry.finish().map(drop)
}

/// Adds a file, or all below a directory, at its own path.
///
/// # Errors
/// As [`write()`], and where it can't be read.
pub fn pack(archive: &mut impl Write, path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return fs::read_dir(path)?.try_for_each(|entry| pack(archive, &entry?.path()));
    }
    write(archive, &path.to_string_lossy(), &fs::read(path)?)
}

/// The files in an archive, with their names. A file that is cut off is lost, with all behind it.
pub fn read(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut rest = Cursor::new(archive);
    while let Ok(mut entry) = newc::Reader::new(rest) {
        let mut contents = Vec::new();
        let read = entry.read_to_end(&mut contents);
        if entry.entry().is_trailer() || read.ok() != Some(entry.entry().file_size() as usize) {
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
    fn files_are_read_back_and_one_that_is_cut_off_is_not() {
        let mut archive = Vec::new();
        write(&mut archive, "result", b"early").unwrap();
        write(&mut archive, "result", b"late").unwrap();
        let early = archive.len();
        write(&mut archive, EXIT_CODE, b"17").unwrap();
        let files = |archive: &[u8]| -> Vec<(String, String)> {
            let text = |contents| String::from_utf8(contents).unwrap();
            read(archive).into_iter().map(|(name, contents)| (name, text(contents))).collect()
        };
        let expected = [("result", "early"), ("result", "late"), (EXIT_CODE, "17")];
        let expected = expected.map(|(name, contents)| (name.to_owned(), contents.to_owned()));
        assert_eq!(files(&archive), expected);
        for cut in early..archive.len() - 2 {
            assert_eq!(files(&archive[..cut]), expected[..2], "{cut}");
        }
    }

    #[test]
    fn a_directory_is_packed_with_all_below_it() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("below")).unwrap();
        fs::write(directory.path().join("below/file"), "x").unwrap();
        let mut archive = Vec::new();
        pack(&mut archive, directory.path()).unwrap();
        let name = directory.path().join("below/file").to_string_lossy().into_owned();
        assert_eq!(read(&archive), [(name, b"x".to_vec())]);
    }
}
