//! The places in a kernel that hold its own addresses, and are changed when it moves.
//!
//! A kernel that can choose its address (CONFIG_RANDOMIZE_BASE) has them behind its ELF, made by
//! arch/x86/tools/relocs.c and read from the end by `handle_relocations` (arch/x86/boot/compressed/misc.c): link
//! addresses of 32 bits, sign-extended, in runs that a zero ends. First come places of 32 bits, then those of 32
//! bits that hold the distance to something which does not move (dropped when its per-CPU variables got addresses as
//! all others have), then those of 64.

use std::ops::Range;

use vm_memory::{Bytes, VolatileMemoryError, VolatileSlice, bitmap::BitmapSlice};

use super::elf::Kernel;
use super::{IMAGE_SPACE, LINK_MAP, part};
use crate::Error;

/// More than any kernel has, by far.
pub const MOST: usize = 4 << 20;

/// Places, each as the distance from the kernel's first byte in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relocations {
    /// 32 bits that grow as the kernel moves up.
    pub add_32: Vec<u32>,
    /// 32 bits that shrink.
    pub subtract_32: Vec<u32>,
    /// 64 bits that grow.
    pub add_64: Vec<u32>,
}

impl Relocations {
    /// Reads what lies behind the ELF of `kernel` in `file`, with places from `base` on. `None` where that is nothing:
    /// the kernel can't move.
    ///
    /// # Errors
    /// [`Error::Relocations`] where it is not such a table, or a place is not in the kernel.
    pub fn parse(file: &[u8], kernel: &Kernel, base: u64) -> Result<Option<Self>, Error> {
        let bad = Error::Relocations;
        let table = part(file, kernel.end..file.len() as u64).ok_or(bad("they lie nowhere"))?;
        if table.is_empty() {
            return Ok(None);
        }
        let (words, []) = table.as_chunks::<4>() else {
            return Err(bad("their size is no multiple of 4"));
        };
        if words.len() > MOST {
            return Err(bad("there are too many"));
        }
        if words.first() != Some(&[0; 4]) {
            return Err(bad("they don't begin with a zero"));
        }
        // From the end on, and without the zero that ends the last run.
        let runs: Vec<&[[u8; 4]]> =
            words.get(1..).unwrap_or_default().rsplit(|word| *word == [0; 4]).collect();
        let places = |run: &[[u8; 4]], width: u64| -> Result<Vec<u32>, Error> {
            run.iter().rev().map(|word| place(u32::from_le_bytes(*word), width, kernel, base)).collect()
        };
        let relocations = match runs.as_slice() {
            [add_32, subtract_32, add_64] => Self {
                add_32: places(add_32, 4)?,
                subtract_32: places(subtract_32, 4)?,
                add_64: places(add_64, 8)?,
            },
            [add_32, add_64] => {
                Self { add_32: places(add_32, 4)?, subtract_32: Vec::new(), add_64: places(add_64, 8)? }
            }
            _ => return Err(bad("they are in other runs than those known")),
        };
        // A run taken for another would show here: what moves is an address of the kernel, linked or physical.
        let is_address = |bytes: &[u8]| {
            let value = bytes.try_into().map_or(u64::MAX >> 1, u64::from_le_bytes);
            value < IMAGE_SPACE || value.wrapping_sub(LINK_MAP) < IMAGE_SPACE
        };
        let all_addresses = relocations.add_64.iter().all(|place| {
            let start = base.saturating_add(u64::from(*place));
            let there = kernel.in_file(start..start.saturating_add(8)).and_then(|range| part(file, range));
            there.is_some_and(is_address)
        });
        if all_addresses {
            Ok(Some(relocations))
        } else {
            Err(bad("a place of 64 bits holds no address of the kernel"))
        }
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.add_32.len() + self.subtract_32.len() + self.add_64.len()
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Changes a kernel in `memory`, which begins with its first byte, to one that is linked `distance` higher.
    ///
    /// # Errors
    /// A place lies outside `memory`.
    pub fn apply<B: BitmapSlice>(
        &self,
        memory: &VolatileSlice<'_, B>,
        distance: u64,
    ) -> Result<(), VolatileMemoryError> {
        if distance == 0 {
            return Ok(());
        }
        // The kernel knows no other: its addresses of 32 bits are sign-extended.
        let low = distance as u32;
        for &place in &self.add_32 {
            let value: u32 = memory.read_obj(place as usize)?;
            memory.write_obj(value.wrapping_add(low), place as usize)?;
        }
        for &place in &self.subtract_32 {
            let value: u32 = memory.read_obj(place as usize)?;
            memory.write_obj(value.wrapping_sub(low), place as usize)?;
        }
        for &place in &self.add_64 {
            let value: u64 = memory.read_obj(place as usize)?;
            memory.write_obj(value.wrapping_add(distance), place as usize)?;
        }
        Ok(())
    }
}

/// The distance from `base` of a place at a link address.
fn place(link: u32, width: u64, kernel: &Kernel, base: u64) -> Result<u32, Error> {
    let address = i64::from(link.cast_signed()).cast_unsigned().wrapping_sub(LINK_MAP);
    let addresses: Range<u64> =
        address..address.checked_add(width).ok_or(Error::Relocations("a place has no address"))?;
    kernel.in_file(addresses).ok_or(Error::Relocations("a place lies outside the kernel"))?;
    let distance = address.checked_sub(base).and_then(|distance| u32::try_from(distance).ok());
    distance.ok_or(Error::Relocations("a place lies outside the kernel"))
}
