//! A file of the kernel's that is read again and again: opened once, into a
//! buffer of a fixed size, so that reading it takes no memory when there is none.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes read of one file; `/proc/vmstat`, the longest, has about 5,000.
const LONGEST: usize = 16 << 10;

/// One file, or none where this kernel lacks it.
pub struct Source(Option<File>);

impl Source {
    /// Opens it.
    pub fn open(path: impl AsRef<Path>) -> Self {
        Self(File::open(path).ok())
    }

    /// Reads it from its beginning and hands it over, where it can be read.
    pub fn read<T>(&self, look: impl FnOnce(&str) -> T) -> Option<T> {
        let file = self.0.as_ref()?;
        let mut buffer = [0; LONGEST];
        let mut length = 0;
        // The kernel may give such a file in several parts.
        while let Some(space) = buffer.get_mut(length..).filter(|space| !space.is_empty()) {
            match file.read_at(space, length as u64) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(_) => return None,
            }
        }
        std::str::from_utf8(buffer.get(..length)?).ok().map(look)
    }
}

/// The number behind `name` at the beginning of a line, as in `/proc/vmstat` and `memory.events`.
pub fn counter(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_anew_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("counters");
        std::fs::write(&path, "low 1\nhigh 2\n").unwrap();
        let source = Source::open(&path);
        assert_eq!(source.read(|text| counter(text, "high")), Some(Some(2)));
        std::fs::write(&path, "low 1\nhigh 30\nhigher 4\n").unwrap();
        assert_eq!(source.read(|text| counter(text, "high")), Some(Some(30)));
        assert_eq!(source.read(|text| counter(text, "max")), Some(None));
        assert_eq!(Source::open(directory.path().join("none")).read(str::len), None);
    }
}
