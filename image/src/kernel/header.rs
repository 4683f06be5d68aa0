//! The setup header of a bzImage (Documentation/arch/x86/boot.rst).

use std::ops::Range;

use super::{LARGEST_FILE, LARGEST_UNPACKED, part};
use crate::Error;

// Where the fields are.
const SETUP_SECTORS: u64 = 0x1f1;
const MAGIC: u64 = 0x202;
const VERSION: u64 = 0x206;
const ALIGNMENT: u64 = 0x230;
const RELOCATABLE: u64 = 0x234;
const LOAD_FLAGS: u64 = 0x236;
const PAYLOAD_OFFSET: u64 = 0x248;
const PAYLOAD_LENGTH: u64 = 0x24c;
const PREFERRED_ADDRESS: u64 = 0x258;
const INIT_SIZE: u64 = 0x260;

/// Bytes from the start of a file that hold all these fields.
pub const HEAD: usize = 0x264;

/// `xloadflags`, with which 64-bit kernels name themselves, came last of the fields.
const OLDEST: u16 = 0x20c;
/// XLF_KERNEL_64.
const KERNEL_64: u16 = 1;
/// What `startup_64` takes at least (`MIN_KERNEL_ALIGN` on x86-64).
pub const SMALLEST_ALIGNMENT: u64 = 2 << 20;

/// What the header says of the packed kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetupHeader {
    /// Where in the file it lies.
    pub payload: Range<u64>,
    /// The physical address that it is linked for (`LOAD_PHYSICAL_ADDR`).
    pub base: u64,
    /// What its address is a multiple of: a power of two, 2 MiB at least.
    pub alignment: u64,
    /// Memory from there on that it takes to unpack itself: its unpacked size at least.
    pub init_size: u64,
    /// Whether it may lie elsewhere.
    pub is_relocatable: bool,
}

impl SetupHeader {
    /// Reads it from the first bytes of a file ([`HEAD`]).
    ///
    /// # Errors
    /// [`Error::NotABzImage`], [`Error::OldProtocol`], [`Error::Header`], [`Error::TooLarge`].
    pub fn parse(head: &[u8]) -> Result<Self, Error> {
        if field(head, MAGIC)? != *b"HdrS" {
            return Err(Error::NotABzImage);
        }
        let version = u16::from_le_bytes(field(head, VERSION)?);
        if version < OLDEST {
            return Err(Error::OldProtocol(version));
        }
        if u16::from_le_bytes(field(head, LOAD_FLAGS)?) & KERNEL_64 == 0 {
            return Err(Error::Header("it is no 64-bit kernel"));
        }
        let [sectors] = field(head, SETUP_SECTORS)?;
        // "For backwards compatibility".
        let sectors = if sectors == 0 { 4 } else { u64::from(sectors) };
        let word = |at| field(head, at).map(|bytes| u64::from(u32::from_le_bytes(bytes)));
        let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
        let end = start + word(PAYLOAD_LENGTH)?;
        let too_large = |what, limit: u64| Error::TooLarge { what, limit: api::units::Bytes(limit) };
        if end > LARGEST_FILE {
            return Err(too_large("the packed kernel", LARGEST_FILE));
        }
        let init_size = word(INIT_SIZE)?;
        if init_size > LARGEST_UNPACKED {
            return Err(too_large("the unpacked kernel", LARGEST_UNPACKED));
        }
        let base = u64::from_le_bytes(field(head, PREFERRED_ADDRESS)?);
        let alignment = word(ALIGNMENT)?.max(SMALLEST_ALIGNMENT);
        if !alignment.is_power_of_two() || !base.is_multiple_of(alignment) {
            return Err(Error::Header("its address is not aligned as it says"));
        }
        let [relocatable] = field(head, RELOCATABLE)?;
        Ok(Self { payload: start..end, base, alignment, init_size, is_relocatable: relocatable != 0 })
    }
}

fn field<const N: usize>(head: &[u8], at: u64) -> Result<[u8; N], Error> {
    part(head, at..at + N as u64).and_then(|bytes| bytes.try_into().ok()).ok_or(Error::NotABzImage)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestKernel;
    use proptest::prelude::*;

    /// Reads a good header with other bytes at one place.
    fn changed<const N: usize>(at: u64, bytes: [u8; N]) -> Result<SetupHeader, Error> {
        let mut image = TestKernel::default().bzimage();
        let at = usize::try_from(at).expect("it fits");
        image[at..at + N].copy_from_slice(&bytes);
        SetupHeader::parse(&image)
    }

    #[test]
    fn a_header_says_where_the_kernel_is_packed() {
        let header = changed(MAGIC, *b"HdrS").expect("it is whole");
        assert_eq!((header.base, header.alignment, header.is_relocatable), (16 << 20, 2 << 20, true));
        assert_eq!(header.payload.start, 1024 + 0x40);
        // "For backwards compatibility" it is four sectors and the boot sector.
        assert_eq!(changed(SETUP_SECTORS, [0]).expect("it is whole").payload.start, 5 * 512 + 0x40);
    }

    #[test]
    fn other_files_and_old_kernels_are_refused() {
        assert!(matches!(changed(MAGIC, *b"hdrs"), Err(Error::NotABzImage)));
        assert!(matches!(SetupHeader::parse(&[0; HEAD - 1]), Err(Error::NotABzImage)));
        let error = changed(VERSION, 0x20b_u16.to_le_bytes()).expect_err("too old").to_string();
        assert!(error.contains("2.11"), "{error}");
        assert!(matches!(changed(LOAD_FLAGS, [0, 0]), Err(Error::Header(_))));
    }

    #[test]
    fn sizes_and_alignments_beyond_any_kernel_are_refused() {
        assert!(matches!(changed(PAYLOAD_LENGTH, [0xff; 4]), Err(Error::TooLarge { .. })));
        assert!(matches!(changed(INIT_SIZE, [0xff; 4]), Err(Error::TooLarge { .. })));
        assert!(matches!(changed(ALIGNMENT, 0x60_0000_u32.to_le_bytes()), Err(Error::Header(_))));
        assert!(matches!(changed(PREFERRED_ADDRESS, 0x110_0000_u64.to_le_bytes()), Err(Error::Header(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_within_bounds_or_none(mut head in prop::collection::vec(any::<u8>(), 0..700), is_kernel: bool) {
            if is_kernel && head.len() > 0x238 {
                head[0x202..0x206].copy_from_slice(b"HdrS");
                head[0x207] = 2;
                head[0x236] = 1;
            }
            if let Ok(header) = SetupHeader::parse(&head) {
                prop_assert!(header.payload.start <= header.payload.end && header.payload.end <= LARGEST_FILE);
                prop_assert!(header.init_size <= LARGEST_UNPACKED && header.base % header.alignment == 0);
            }
        }
    }
}
