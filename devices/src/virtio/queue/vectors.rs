//! Guest memory as the host's kernel takes it: no byte of a payload is copied here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// I/O vectors into guest memory, for `readv(2)`, `writev(2)` and io_uring. They keep the memory
/// mapped that they point into; a device has them as long as the kernel may use them.
///
/// The guest may change what is there at any time. What it has not plugged makes the kernel answer
/// EFAULT.
pub struct IoVectors {
    memory: Arc<GuestMemoryMmap>,
    vectors: Vec<libc::iovec>,
    /// How many of them have been transferred whole.
    done: usize,
}

// SAFETY: the pointers are into `memory`, which any thread may use, and only the kernel goes there by
// them.
unsafe impl Send for IoVectors {}

impl IoVectors {
    /// None yet.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self { memory, vectors: Vec::new(), done: 0 }
    }

    /// None again; the room for them stays.
    pub fn clear(&mut self) {
        self.vectors.clear();
        self.done = 0;
    }

    /// Adds `len` bytes from `address` on. False, and nothing is added, where not all of them are guest
    /// memory.
    pub fn push(&mut self, address: GuestAddress, len: usize) -> bool {
        let before = self.vectors.len();
        for slice in GuestMemoryBackend::get_slices(&*self.memory, address, len) {
            let Ok(slice) = slice else {
                self.vectors.truncate(before);
                return false;
            };
            let start = slice.ptr_guard_mut().as_ptr();
            self.vectors.push(libc::iovec { iov_base: start.cast(), iov_len: slice.len() });
        }
        true
    }

    /// What is left to transfer. The pointers are good as long as this value, whatever the guest does.
    pub fn as_slice(&self) -> &[libc::iovec] {
        self.vectors.get(self.done..).unwrap_or_default()
    }

    /// What is left to transfer, for libraries that take guest memory so.
    pub fn slices(&self) -> Vec<VolatileSlice<'_>> {
        let slice = |vector: &libc::iovec| {
            // SAFETY: each vector is a piece of `memory`, which is mapped as long as this value, and in which
            // nobody here holds a reference.
            unsafe { VolatileSlice::new(vector.iov_base.cast(), vector.iov_len) }
        };
        self.as_slice().iter().map(slice).collect()
    }

    /// Bytes that are left to transfer.
    pub fn len(&self) -> usize {
        self.as_slice().iter().map(|vector| vector.iov_len).sum()
    }

    /// Whether nothing is left to transfer.
    pub fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    /// Goes past `bytes` that were transferred; what is left may be less than one vector.
    pub fn advance(&mut self, mut bytes: usize) {
        while let Some(vector) = self.vectors.get_mut(self.done) {
            let taken = bytes.min(vector.iov_len);
            if taken < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(taken).cast();
                vector.iov_len -= taken;
                return;
            }
            bytes -= taken;
            self.done += 1;
        }
    }

    /// Fills guest memory from `file` from `offset` on, as far as the file goes, and goes past it.
    ///
    /// # Errors
    /// As `preadv(2)`; what was filled before counts nothing.
    pub fn fill_from(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.transfer(file, offset, |file, vectors, count, offset| {
            // SAFETY: `vectors` are `count` valid vectors into guest memory, which is mapped and of which
            // nobody here holds a reference.
            unsafe { libc::preadv(file, vectors, count, offset) }
        })
    }

    /// Writes guest memory to `file` from `offset` on, and goes past it.
    ///
    /// # Errors
    /// As `pwritev(2)`; what was written before counts nothing.
    pub fn write_to(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.transfer(file, offset, |file, vectors, count, offset| {
            // SAFETY: as in `fill_from`.
            unsafe { libc::pwritev(file, vectors, count, offset) }
        })
    }

    /// Reads one message: its first bytes into `head`, the next ones into guest memory, and what does not fit
    /// there into `tail`. Returns how many bytes came; the vectors are gone then.
    ///
    /// # Errors
    /// As `readv(2)`.
    pub fn read_message(
        &mut self,
        file: BorrowedFd<'_>,
        head: &mut [u8],
        tail: &mut [u8],
    ) -> io::Result<usize> {
        self.surround(head.as_mut_ptr(), head.len(), tail.as_mut_ptr(), tail.len());
        // SAFETY: `vectors` are valid: the first and the last are slices that live until this returns, those
        // between as in `fill_from`.
        self.message(|vectors, count| unsafe { libc::readv(file.as_raw_fd(), vectors, count) })
    }

    /// Writes one message: `head`, then guest memory. Returns how many bytes went; the vectors are gone then.
    ///
    /// # Errors
    /// As `writev(2)`.
    pub fn write_message(&mut self, file: BorrowedFd<'_>, head: &[u8]) -> io::Result<usize> {
        self.surround(head.as_ptr().cast_mut(), head.len(), std::ptr::null_mut(), 0);
        // SAFETY: as in `read_message`; the kernel only reads.
        self.message(|vectors, count| unsafe { libc::writev(file.as_raw_fd(), vectors, count) })
    }

    fn surround(&mut self, head: *mut u8, head_len: usize, tail: *mut u8, tail_len: usize) {
        self.vectors.insert(0, libc::iovec { iov_base: head.cast(), iov_len: head_len });
        if tail_len > 0 {
            self.vectors.push(libc::iovec { iov_base: tail.cast(), iov_len: tail_len });
        }
    }

    fn message(
        &mut self,
        call: impl Fn(*const libc::iovec, libc::c_int) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let result = loop {
            let Ok(count @ ..=MOST_VECTORS_OF_A_CALL) = libc::c_int::try_from(self.vectors.len()) else {
                break Err(io::Error::from_raw_os_error(libc::EINVAL));
            };
            match usize::try_from(call(self.vectors.as_ptr(), count)) {
                Ok(bytes) => break Ok(bytes),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        break Err(error);
                    }
                }
            }
        };
        // Nothing is left that points to the caller's slices.
        self.clear();
        result
    }

    fn transfer(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        call: impl Fn(RawFd, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let mut done = 0;
        while !self.is_empty() {
            let vectors = self.as_slice();
            let count = vectors.len().min(MOST_VECTORS);
            let place = offset.checked_add(done as u64).and_then(|place| place.try_into().ok());
            let place = place.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
            // Bounded by MOST_VECTORS.
            let result = call(file.as_raw_fd(), vectors.as_ptr(), count as libc::c_int, place);
            match usize::try_from(result) {
                Ok(0) => break,
                Ok(bytes) => {
                    done += bytes;
                    self.advance(bytes);
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(done)
    }
}

/// Vectors that the kernel takes in one call (`IOV_MAX`).
const MOST_VECTORS: usize = 1024;
const MOST_VECTORS_OF_A_CALL: libc::c_int = MOST_VECTORS as libc::c_int;
