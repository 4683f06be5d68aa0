//! Anonymous memory that goes back to the kernel the moment it is dropped.

use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// What one touch brings in.
const PAGE: usize = 4096;

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
