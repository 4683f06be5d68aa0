//! Guest physical memory, mapped through `/dev/mem`: devices, and RAM that the kernel does not use.

use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A piece of guest physical memory. Others may change it at any time.
pub struct Window {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: it is an address range that any thread may access; all access is volatile.
unsafe impl Send for Window {}

impl Window {
    /// Maps `length` bytes at physical `address`, which must be a page's.
    ///
    /// # Errors
    /// As mmap(2); the kernel refuses its own RAM and what a driver has claimed.
    pub fn map(memory: &File, address: u64, length: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice aliases nothing of this process.
        let start = unsafe { mmap(ptr::null_mut(), length, access, MapFlags::SHARED, memory, address)? };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Ok(Self { start, length })
    }

    fn place<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.length, "{offset:#x} is outside of the window");
        // SAFETY: offset is inside the mapping.
        unsafe { self.start.as_ptr().add(offset).cast() }
    }

    /// Reads a number. x86 takes it from any alignment.
    pub fn read<T: Number>(&self, offset: usize) -> T {
        T::read(self.place(offset))
    }

    /// Writes a number.
    pub fn write<T: Number>(&self, offset: usize, value: T) {
        value.write(self.place(offset));
    }

    /// Reads, or writes the low bytes of `value`: 1, 2, 4 or 8 bytes.
    pub fn access(&self, offset: usize, width: usize, value: Option<u64>) {
        match (width, value) {
            (1, Some(value)) => self.write(offset, value as u8),
            (2, Some(value)) => self.write(offset, value as u16),
            (4, Some(value)) => self.write(offset, value as u32),
            (_, Some(value)) => self.write(offset, value),
            (1, None) => drop(self.read::<u8>(offset)),
            (2, None) => drop(self.read::<u16>(offset)),
            (4, None) => drop(self.read::<u32>(offset)),
            (_, None) => drop(self.read::<u64>(offset)),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `map` made, which nobody can reach any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// What one instruction reads or writes.
pub trait Number: Copy {
    /// One load.
    fn read(place: *mut Self) -> Self;
    /// One store.
    fn write(self, place: *mut Self);
}

macro_rules! number {
    ($type:ty, $register:ident, $modifier:literal) => {
        impl Number for $type {
            fn read(place: *mut Self) -> Self {
                let value;
                // SAFETY: `Window::place` has checked the range. In assembly, as a volatile access
                // of Rust may not be misaligned, and devices must stand that too.
                unsafe {
                    std::arch::asm!(
                        concat!("mov {value", $modifier, "}, [{place}]"),
                        place = in(reg) place,
                        value = out($register) value,
                        options(nostack, preserves_flags)
                    )
                };
                value
            }

            fn write(self, place: *mut Self) {
                // SAFETY: as above.
                unsafe {
                    std::arch::asm!(
                        concat!("mov [{place}], {value", $modifier, "}"),
                        place = in(reg) place,
                        value = in($register) self,
                        options(nostack, preserves_flags)
                    )
                };
            }
        }
    };
}

number!(u8, reg_byte, "");
number!(u16, reg, ":x");
number!(u32, reg, ":e");
number!(u64, reg, ":r");
