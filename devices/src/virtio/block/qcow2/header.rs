//! The head of a qcow2 image (QEMU, docs/interop/qcow2.txt), as far as it says whether the image can be used.
//!
//! It is read before any library sees the image: an image that is refused does not change by one byte, and
//! what it names is looked at before it is opened. A guest may have written every byte of it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::layout::Layout;

/// What an image begins with.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes of the head of version 3 that are looked at.
const HEAD: usize = 104;

/// Bytes of the longest name of a backing file.
const MOST_NAME: usize = 1023;

/// Bytes of all extensions of the head that are looked at: they end with the first cluster, which has more
/// room than any image needs.
const MOST_EXTENSIONS: usize = 64 << 10;

/// Bytes of the largest table of tables (L1): 32 MiB name 2^22 of them, which is 2 PiB with usual clusters.
const MOST_L1: u64 = 32 << 20;

/// Bytes of the largest table of reference counts: 8 MiB.
const MOST_REFCOUNT_TABLE: u64 = 8 << 20;

/// The extension that names the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// It can't be read.
    #[error("it can't be read: {0}")]
    Read(#[from] io::Error),
    /// It is something else.
    #[error("it does not begin like a qcow2 image: say what it is, such as `,format=raw`")]
    NoQcow2,
    /// An unknown version.
    #[error("it is a qcow2 image of version {0}, and 2 and 3 are known")]
    Version(u32),
    /// It was not closed, and its reference counts are stale.
    #[error("it was not closed rightly (dirty): mend it with `qemu-img check -r all`")]
    Dirty,
    /// It was found to be damaged.
    #[error("it is marked as damaged (corrupt): look at it with `qemu-img check`, and mend it with `-r all`")]
    Corrupt,
    /// A feature that is not there.
    #[error("it uses {0}, which is not supported: convert it with `qemu-img convert -O qcow2`")]
    Feature(&'static str),
    /// Older states of the disk lie in it.
    #[error(
        "it holds snapshots, which are not supported: make an image of the state that you want with \
         `qemu-img convert -O qcow2`, or delete them with `qemu-img snapshot -d`"
    )]
    Snapshots,
    /// It is encrypted.
    #[error("it is encrypted, which is not supported: convert it with `qemu-img convert -O qcow2`")]
    Encrypted,
    /// A number that no good image has.
    #[error("its head is wrong: {0}")]
    Wrong(&'static str),
    /// The format of its backing file would have to be guessed.
    #[error(
        "it does not say what format its backing file has: say it with `qemu-img rebase -u -F FORMAT -b FILE`"
    )]
    NoBackingFormat,
    /// The backing file is of a format that is not there.
    #[error("its backing file is of the format `{0}`: raw and qcow2 are known")]
    BackingFormat(String),
    /// Its backing file is no file of the host.
    #[error("its backing file is `{0}`, and only names of files are known")]
    BackingName(String),
}

/// What lies behind an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The file's name, from the directory of the image.
    pub name: String,
    /// What it is.
    pub is_qcow2: bool,
}

/// What an image says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its version, 2 or 3.
    pub version: u32,
    /// Bytes of the disk in it.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Where its first table (L1) lies in the file, in bytes.
    pub table: Range<u64>,
    /// Where its table of reference counts lies.
    pub counts: Range<u64>,
    /// Bits of a reference count: 1, 2, 4 and so on to 64.
    pub count_bits: u32,
    /// What shows where it has nothing.
    pub backing: Option<Backing>,
}

impl Head {
    /// Where the parts of `file` lie.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn layout(&self, file: &File) -> io::Result<Layout> {
        // Bounded by MOST_L1.
        let mut entries = vec![0; usize::try_from(self.table.end - self.table.start).unwrap_or(0)];
        let read = read_at(file, &mut entries, self.table.start)?;
        entries.truncate(read);
        Ok(Layout::new(self.cluster, self.table.clone(), self.counts.clone(), &entries))
    }

    /// Looks whether the image counts its own head as taken, without which a writer takes that room and has no
    /// place for its counts.
    ///
    /// # Errors
    /// [`HeadError`].
    pub(super) fn check_counts(&self, file: &File) -> Result<(), HeadError> {
        const WRONG: HeadError = HeadError::Wrong(
            "it does not count its own first cluster as taken; look at it with `qemu-img check`, and mend it with \
             `-r all`",
        );
        let mut entry = [0; 8];
        if read_at(file, &mut entry, self.counts.start)? < entry.len() {
            return Err(WRONG);
        }
        let block = Fields(&entry).long(0);
        if block == 0 || !block.is_multiple_of(self.cluster) {
            return Err(WRONG);
        }
        // A count has up to 8 bytes, or some low bits of one.
        let mut count = [0; 8];
        let bytes = self.count_bits.div_ceil(8).min(8) as usize;
        let count = count.get_mut(..bytes).unwrap_or_default();
        let read = read_at(file, count, block)?;
        let mask = if self.count_bits < 8 { (1 << self.count_bits) - 1 } else { u8::MAX };
        if read == bytes && count.iter().any(|byte| byte & mask != 0) { Ok(()) } else { Err(WRONG) }
    }

    /// Reads and checks the head of `file`.
    ///
    /// # Errors
    /// [`HeadError`].
    pub fn read(file: &File) -> Result<Self, HeadError> {
        let mut bytes = [0; HEAD];
        let read = read_at(file, &mut bytes, 0)?;
        if read < 72 || bytes.get(..4) != Some(&MAGIC) {
            return Err(HeadError::NoQcow2);
        }
        let head = Fields(&bytes);
        let version = head.word(4);
        match version {
            2 => {}
            3 if read == HEAD => incompatible(head.long(72))?,
            3 => return Err(HeadError::Wrong("it is cut short")),
            _ => return Err(HeadError::Version(version)),
        }
        if head.word(32) != 0 {
            return Err(HeadError::Encrypted);
        }
        let cluster_bits = head.word(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(HeadError::Wrong("its clusters are of no size from 512 bytes to 2 MiB"));
        }
        let size = head.long(24);
        if size == 0 || size % 512 != 0 || size > i64::MAX as u64 {
            return Err(HeadError::Wrong("its size is no whole number of 512-byte sectors"));
        }
        let l1 = u64::from(head.word(36)) * 8;
        // A table of this level names so many bytes of the disk.
        let covered = 1u64 << (2 * cluster_bits - 3);
        if l1 > MOST_L1 || l1 / 8 < size.div_ceil(covered) {
            return Err(HeadError::Wrong("its table of tables (L1) does not fit its size"));
        }
        let cluster = 1 << cluster_bits;
        let counts = u64::from(head.word(56)) << cluster_bits;
        if counts > MOST_REFCOUNT_TABLE {
            return Err(HeadError::Wrong("its table of reference counts is too large"));
        }
        if head.word(60) != 0 {
            return Err(HeadError::Snapshots);
        }
        let header_length = if version == 2 { 72 } else { u64::from(head.word(100)) };
        let order = if version == 2 { 4 } else { head.word(96) };
        if order > 6 {
            return Err(HeadError::Wrong("its reference counts have more than 64 bits"));
        }
        let backing = backing(file, &head, header_length, cluster)?;
        let table = head.long(40);
        let end = table.checked_add(l1).filter(|_| table.is_multiple_of(cluster));
        let table = table..end.ok_or(HeadError::Wrong("its table of tables (L1) begins in no cluster"))?;
        let counts = head.long(48)..head.long(48).saturating_add(counts);
        Ok(Self { version, size, cluster, table, counts, count_bits: 1 << order, backing })
    }
}

fn incompatible(bits: u64) -> Result<(), HeadError> {
    let has = |bit: u64| bits & 1 << bit != 0;
    match bits {
        0 => Ok(()),
        _ if has(1) => Err(HeadError::Corrupt),
        _ if has(0) => Err(HeadError::Dirty),
        _ if has(2) => Err(HeadError::Feature("an external data file")),
        _ if has(3) => Err(HeadError::Feature("another compression than zlib")),
        _ if has(4) => Err(HeadError::Feature("extended L2 entries")),
        _ => Err(HeadError::Feature("a feature that this version does not know")),
    }
}

fn backing(
    file: &File,
    head: &Fields<'_>,
    header_length: u64,
    cluster: u64,
) -> Result<Option<Backing>, HeadError> {
    let (place, len) = (head.long(8), head.word(16) as usize);
    if place == 0 {
        return Ok(None);
    }
    if len == 0 || len > MOST_NAME || place > cluster {
        return Err(HeadError::Wrong("the name of its backing file lies outside of its head"));
    }
    let mut name = vec![0; len];
    if read_at(file, &mut name, place)? < len {
        return Err(HeadError::Wrong("the name of its backing file is cut short"));
    }
    let name = String::from_utf8(name).map_err(|_| HeadError::Wrong("its backing file's name is no text"))?;
    // `json:{...}` and `nbd://...` are no names of files; `./a:b` is one.
    let is_protocol = name.split_once(':').is_some_and(|(before, _)| !before.contains('/'));
    if is_protocol || name.contains('\0') {
        return Err(HeadError::BackingName(name));
    }
    let mut extensions = vec![0; MOST_EXTENSIONS.min(cluster as usize)];
    let read = read_at(file, &mut extensions, header_length)?;
    extensions.truncate(read);
    let is_qcow2 = match backing_format(&extensions) {
        None => return Err(HeadError::NoBackingFormat),
        Some(b"raw") => false,
        Some(b"qcow2") => true,
        Some(other) => return Err(HeadError::BackingFormat(String::from_utf8_lossy(other).into_owned())),
    };
    Ok(Some(Backing { name, is_qcow2 }))
}

/// Looks for the extension that names the backing file's format.
fn backing_format(mut extensions: &[u8]) -> Option<&[u8]> {
    loop {
        let (head, rest) = extensions.split_at_checked(8)?;
        let (kind, len) = (Fields(head).word(0), Fields(head).word(4) as usize);
        if kind == 0 {
            return None;
        }
        let data = rest.get(..len)?;
        if kind == BACKING_FORMAT {
            return Some(data);
        }
        // Each is padded to 8 bytes.
        extensions = rest.get(len.checked_next_multiple_of(8)?..)?;
    }
}

/// Numbers of a head, which are big-endian; zero past its end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn word(&self, offset: usize) -> u32 {
        let bytes = self.0.get(offset..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
    }

    fn long(&self, offset: usize) -> u64 {
        u64::from(self.word(offset)) << 32 | u64::from(self.word(offset + 4))
    }
}

/// Reads as far as the file goes.
fn read_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while !bytes.is_empty() {
        match file.read_at(bytes, offset) {
            Ok(0) => break,
            Ok(count) => {
                done += count;
                offset = offset.saturating_add(count as u64);
                bytes = bytes.get_mut(count..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Head, HeadError> {
        let file = TempFile::new().expect("a file");
        std::fs::write(file.as_path(), bytes).expect("it is written");
        Head::read(file.as_file())
    }

    /// A head of version 3 of 1 GiB with clusters of 64 KiB.
    fn head() -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[23] = 16;
        bytes[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        bytes[39] = 2;
        bytes[45] = 1;
        bytes[99] = 4;
        bytes[103] = 104;
        bytes
    }

    #[test]
    fn a_plain_head_is_read() {
        let head = read(&head()).expect("it is good");
        let expected = Head {
            version: 3,
            size: 1 << 30,
            cluster: 1 << 16,
            table: 0x1_0000..0x1_0010,
            counts: 0..0,
            count_bits: 16,
            backing: None,
        };
        assert_eq!(head, expected);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (byte, value, words) in [
            (0, 0, "does not begin"),
            (7, 4, "version 4"),
            (79, 1, "dirty"),
            (79, 2, "corrupt"),
            (79, 4, "external data file"),
            (79, 8, "compression"),
            (79, 16, "extended L2"),
            (72, 1, "does not know"),
            (35, 1, "encrypted"),
            (23, 8, "clusters"),
            (23, 22, "clusters"),
            (36, 1, "L1"),
            (39, 1, "L1"),
            (56, 1, "reference counts"),
            (31, 1, "512-byte sectors"),
            (47, 1, "begins in no cluster"),
            (63, 1, "snapshots"),
            (99, 7, "64 bits"),
        ] {
            let mut bytes = head();
            bytes[byte] = value;
            let error = read(&bytes).expect_err(words).to_string();
            assert!(error.contains(words), "{byte}: {error}");
        }
    }

    #[test]
    fn a_backing_file_has_a_stated_format_and_is_a_file() {
        let with = |name: &str, format: Option<&str>| {
            let mut bytes = head();
            bytes[8..16].copy_from_slice(&400u64.to_be_bytes());
            bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            bytes[400..400 + name.len()].copy_from_slice(name.as_bytes());
            // Another extension first.
            bytes[104..112].copy_from_slice(&[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 3]);
            if let Some(format) = format {
                bytes[120..124].copy_from_slice(&BACKING_FORMAT.to_be_bytes());
                bytes[127] = format.len() as u8;
                bytes[128..128 + format.len()].copy_from_slice(format.as_bytes());
            }
            read(&bytes).map(|head| head.backing.expect("it has one"))
        };
        let backing = with("base.img", Some("raw")).expect("it is good");
        assert_eq!(backing, Backing { name: "base.img".into(), is_qcow2: false });
        assert!(with("./a:b", Some("qcow2")).expect("it is good").is_qcow2);
        assert!(matches!(with("base.img", None), Err(HeadError::NoBackingFormat)));
        assert!(matches!(with("base.img", Some("vmdk")), Err(HeadError::BackingFormat(_))));
        for name in ["json:{}", "nbd://host/x", "fat:/etc", "a\0b"] {
            assert!(matches!(with(name, Some("raw")), Err(HeadError::BackingName(_))), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_head_breaks_the_reader(
            changes in proptest::collection::vec((0..512_usize, any::<u8>()), 0..40), len in 0..512_usize,
        ) {
            let mut bytes = head();
            for (place, value) in changes {
                bytes[place] = value;
            }
            if let Ok(head) = read(&bytes[..len]) {
                prop_assert!(head.size > 0 && head.size % 512 == 0);
            }
        }
    }
}
