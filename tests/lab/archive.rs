//! The lab's results: files in a cpio archive (`newc`), as archives of a first root are too.

use std::io::{Cursor, Read};

use cpio::newc;

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
    use slat::lab::archive::Archive;

    #[test]
    fn what_was_packed_is_read_back() {
        let mut archive = Archive::with_program("/init", b"init").unwrap();
        archive.contents("/a/b/c", 0o644, b"contents").unwrap();
        let bytes = archive.finish().unwrap();
        let files = read(&bytes);
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["init", "dev", "dev/console", "dev/null", "a", "a/b", "a/b/c"]);
        assert_eq!(files[6].1, b"contents");
        assert!(read(&bytes[..bytes.len() / 2]).len() < 7);
    }
}
