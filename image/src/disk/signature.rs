//! What begins where: file systems and what else a partition may hold, told by its first bytes.

use std::io;

use super::fields::Fields;
use super::source::View;

/// What a partition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// ext2, ext3 or ext4.
    Ext,
    /// FAT12, FAT16 or FAT32.
    Fat,
    /// Something that is known and not read, by its name.
    Other(&'static str),
    /// Something else, or nothing.
    Unknown,
}

/// A name, the place of its mark, the mark.
const MARKS: [(&str, usize, &[u8]); 14] = [
    ("LUKS (encrypted)", 0, b"LUKS\xba\xbe"),
    ("XFS", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("LVM", 0x218, b"LVM2 001"),
    ("LVM", 0x18, b"LVM2 001"),
    ("swap", 4096 - 10, b"SWAPSPACE2"),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    ("ISO 9660", 0x8001, b"CD001"),
    ("squashfs", 0, b"hsqs"),
    ("EROFS", 1024, b"\xe2\xe1\xf5\xe0"),
    ("F2FS", 1024, b"\x10\x20\xf5\xf2"),
    ("bcachefs", 4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    ("a RAID member", 4096, b"\xfc\x4e\x2b\xa9"),
];

/// As many bytes hold all marks.
const LOOKED_AT: usize = 0x1_0050;

/// What lies in `view`.
///
/// # Errors
/// The disk's.
pub fn probe(view: &View) -> io::Result<Content> {
    let bytes = view.bytes(0, LOOKED_AT)?;
    let fields = Fields(&bytes);
    let marked = MARKS.iter().find(|(_, offset, mark)| fields.bytes(*offset, mark.len()) == *mark);
    if let Some((name, ..)) = marked {
        return Ok(Content::Other(name));
    }
    if fields.half(0x438) == 0xef53 {
        return Ok(Content::Ext);
    }
    let is_fat = fields.bytes(0x36, 3) == b"FAT" || fields.bytes(0x52, 5) == b"FAT32";
    Ok(if is_fat && fields.half(510) == 0xaa55 { Content::Fat } else { Content::Unknown })
}
