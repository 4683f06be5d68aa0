//! RAM of a guest between canaries.

use std::ptr;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::{HIGH, LOW, REGION};

const CANARY: usize = 16 << 10;
const CANARY_BYTE: u8 = 0xa5;
const ARENA: usize = 3 * CANARY + 2 * REGION;

/// RAM of a guest that lies between canaries in one mapping.
pub struct GuestRam {
    arena: *mut u8,
    /// The guest's view.
    pub memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the mapping belongs to this value, and only its owner changes what the pointer says.
unsafe impl Send for GuestRam {}

impl Default for GuestRam {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestRam {
    /// Two regions of zeros.
    pub fn new() -> Self {
        let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: a new anonymous mapping, wherever the kernel likes.
        let arena =
            unsafe { libc::mmap(ptr::null_mut(), ARENA, read_write, private | libc::MAP_ANONYMOUS, -1, 0) };
        assert_ne!(arena, libc::MAP_FAILED);
        let arena: *mut u8 = arena.cast();
        for canary in Self::canaries() {
            // SAFETY: inside the arena, which nobody else knows yet.
            unsafe { ptr::write_bytes(arena.add(canary), CANARY_BYTE, CANARY) };
        }
        let regions = Self::regions().map(|(guest, offset)| {
            // SAFETY: inside the arena, which lives as long as this value.
            let mapping = unsafe { MmapRegion::build_raw(arena.add(offset), REGION, read_write, private) };
            GuestRegionMmap::new(mapping.unwrap(), GuestAddress(guest)).unwrap()
        });
        let memory = Arc::new(GuestMemoryMmap::from_regions(regions.into()).unwrap());
        Self { arena, memory }
    }

    fn canaries() -> [usize; 3] {
        [0, CANARY + REGION, 2 * (CANARY + REGION)]
    }

    /// Guest address and offset in the arena of each region.
    fn regions() -> [(u64, usize); 2] {
        [(LOW, CANARY), (HIGH, 2 * CANARY + REGION)]
    }

    /// Panics where anything beside guest RAM was written or dropped.
    pub fn assert_canaries(&self) {
        for canary in Self::canaries() {
            // SAFETY: inside the arena, and canaries are only read after they were made.
            let bytes = unsafe { std::slice::from_raw_parts(self.arena.add(canary), CANARY) };
            assert!(bytes.iter().all(|byte| *byte == CANARY_BYTE), "memory outside the guest was touched");
        }
    }

    /// Where the byte at `guest` is mapped in this process.
    pub fn host(&self, guest: u64) -> *mut u8 {
        self.memory.get_host_address(GuestAddress(guest)).unwrap()
    }

    /// Whether the host has a page for the byte at `guest` (`mincore(2)`).
    pub fn resident(&self, guest: u64) -> bool {
        let page = self.host(guest & !4095);
        let mut resident = 0u8;
        // SAFETY: asks for one page inside the arena, one byte of answer.
        let result = unsafe { libc::mincore(page.cast(), 4096, &mut resident) };
        assert_eq!(result, 0);
        resident & 1 != 0
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; whoever kept a clone of `memory` past this broke the test.
        unsafe { libc::munmap(self.arena.cast(), ARENA) };
    }
}
