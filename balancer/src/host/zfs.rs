//! The cache of ZFS (ARC), which the kernel's `MemAvailable` takes for used.
//!
//! OpenZFS shrinks it when the kernel asks for memory, down to a least size (module parameter `zfs_arc_min`).

use std::fs;
use std::path::Path;

use api::units::Bytes;

/// Where OpenZFS tells of it (zfs(4), arcstats).
pub const ARCSTATS: &str = "/proc/spl/kstat/zfs/arcstats";

/// The cache at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arc {
    /// `size`: what it holds.
    pub size: Bytes,
    /// `c_min`: what it keeps in any case.
    pub least: Bytes,
}

impl Arc {
    /// Reads it from `path`, which is [`ARCSTATS`] outside tests. `None` without ZFS.
    pub fn read(path: &Path) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        // Each line is a name, a type and a number.
        let value = |name: &str| {
            let mut lines = text.lines().map(str::split_whitespace);
            let mut fields = lines.find_map(|mut fields| (fields.next()? == name).then_some(fields))?;
            Some(Bytes(fields.nth(1)?.parse().ok()?))
        };
        Some(Self { size: value("size")?, least: value("c_min")? })
    }

    /// What it would give where memory is short.
    pub fn to_be_had(self) -> Bytes {
        self.size.saturating_sub(self.least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_the_least_can_be_had() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |text: &str| {
            fs::write(file.path(), text).unwrap();
            Arc::read(file.path())
        };
        let text = "13 1 0x01 147 39984 8155018210 1164436236846\n\
                    name                            type data\n\
                    hits                            4    81237\n\
                    c                               4    3221225472\n\
                    c_min                           4    268435456\n\
                    c_max                           4    3221225472\n\
                    size                            4    2147483648\n\
                    compressed_size                 4    1073741824\n";
        let arc = read(text).unwrap();
        assert_eq!(arc, Arc { size: Bytes::gib(2), least: Bytes::mib(256) });
        assert_eq!(arc.to_be_had(), Bytes::mib(2048 - 256));
        assert_eq!(Arc { least: Bytes::gib(3), ..arc }.to_be_had(), Bytes::ZERO);
        for text in ["", "size 4 1\n", "size\nc_min 4 1\n", "size 4 -1\nc_min 4 1\n"] {
            assert_eq!(read(text), None, "{text:?}");
        }
        assert_eq!(Arc::read(Path::new("/nowhere")), None);
    }
}
