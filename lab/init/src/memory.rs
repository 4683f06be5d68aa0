//! Anonymous memory that goes back to the kernel the moment it is dropped.

use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// What one touch brings in.
const PAGE: usize = 4096;

/// From one patterned word to the next: eight in a page, the first at its start.
const BETWEEN: usize = PAGE / 8;

/// Another word for each place and seed.
fn pattern(seed: u64, place: usize) -> u64 {
    (seed << 40 ^ place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// A piece of private anonymous memory. An allocator would keep freed pieces;
/// this one's end must be seen by the kernel.
pub struct Block {
    start: NonNull<u8>,
    length: usize,
}

impl Block {
    /// Maps `length` bytes; none of them is in memory yet.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn new(length: usize) -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at a place of the kernel's choice aliases nothing.
        let start = unsafe {
            mmap_anonymous(ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Ok(Self { start, length })
    }

    /// Pages in it.
    pub fn pages(&self) -> usize {
        self.length.div_ceil(PAGE)
    }

    /// Writes to every page, upwards.
    pub fn touch_all(&mut self) {
        for page in 0..self.pages() {
            self.touch(page);
        }
    }

    /// Writes to as many pages as there are, each drawn by Knuth's 64-bit linear congruential generator:
    /// repeatable, and good enough to scatter touches.
    pub fn touch_scattered(&mut self, state: &mut u64) {
        for _ in 0..self.pages() {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            self.touch((*state >> 33) as usize);
        }
    }

    /// Writes to every page what [`first_changed`](Self::first_changed) expects for this seed.
    pub fn fill(&mut self, seed: u64) {
        for place in 0..self.length / BETWEEN {
            // SAFETY: a place ends below length, and &mut self makes this the only access; the
            // mapping's start is a page's, so it is aligned.
            unsafe { self.start.add(place * BETWEEN).cast::<u64>().write_volatile(pattern(seed, place)) };
        }
    }

    /// The first page whose contents are not those of [`fill`](Self::fill) any more.
    pub fn first_changed(&self, seed: u64) -> Option<usize> {
        let changed = (0..self.length / BETWEEN).find(|&place| {
            // SAFETY: as in `fill`, and nothing else writes.
            let found = unsafe { self.start.add(place * BETWEEN).cast::<u64>().read_volatile() };
            found != pattern(seed, place)
        });
        changed.map(|place| place * BETWEEN / PAGE)
    }

    /// Writes to one page; numbers past the end wrap around.
    pub fn touch(&mut self, page: usize) {
        let offset = page % self.pages() * PAGE;
        // SAFETY: offset is below length, and &mut self makes this the only access.
        unsafe { self.start.add(offset).write_volatile(page as u8 | 1) };
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `new` made, which nobody can reach any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_found() {
        let mut block = Block::new(8 * PAGE).unwrap();
        assert_eq!(block.first_changed(1), Some(0), "zeros are no pattern");
        block.fill(1);
        assert_eq!(block.first_changed(1), None);
        assert_eq!(block.first_changed(2), Some(0));
        block.touch(5);
        assert_eq!(block.first_changed(1), Some(5));
    }
}
