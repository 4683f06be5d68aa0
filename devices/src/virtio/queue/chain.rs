//! Descriptor chains, read once and checked as a whole.

use serde::{Deserialize, Serialize};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::vectors::IoVectors;

/// One buffer of a chain: inside guest memory, not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it starts.
    pub address: GuestAddress,
    /// How many bytes it has.
    pub len: u32,
}

/// A descriptor chain that was well formed when it was read: no loop, not
/// longer than the queue, every buffer inside guest memory and not empty,
/// buffers to read before buffers to write (virtio 1.2, section 2.7.4.2).
///
/// Nothing that the guest changes afterwards matters, which is why the readers and writers of
/// virtio-queue have no place here: each of them walks the guest's descriptors anew.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    /// Those for the device to read, then those for it to write.
    buffers: Vec<Buffer>,
    /// How many of them are to read.
    readable: usize,
}

impl Chain {
    /// A chain without buffers that takes its room from `room`.
    pub(super) fn in_room(room: Vec<Buffer>) -> Self {
        Self { head: 0, buffers: room, readable: 0 }
    }

    /// Gives the room back.
    pub(super) fn into_room(self) -> Vec<Buffer> {
        self.buffers
    }

    /// Reads a chain of a queue of `size` descriptors. Returns whether it is well formed.
    pub(super) fn read(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
        size: u16,
    ) -> bool {
        let inside = |buffer: &Buffer| {
            usize::try_from(buffer.len)
                .is_ok_and(|len| GuestMemoryBackend::check_range(memory, buffer.address, len))
        };
        self.check(chain.head_index(), chain, inside, size)
    }

    /// The rules, apart from where descriptors and memory are.
    pub(in crate::virtio) fn check(
        &mut self,
        head: u16,
        descriptors: impl Iterator<Item = Descriptor>,
        inside: impl Fn(&Buffer) -> bool,
        size: u16,
    ) -> bool {
        self.head = head;
        self.buffers.clear();
        self.readable = 0;
        // virtio-queue ends a broken chain as it ends a whole one, so the
        // last descriptor tells: if it has a next, the chain was cut short.
        let mut cut_short = true;
        for (count, descriptor) in (1u16..=size.saturating_add(1)).zip(descriptors) {
            let buffer = Buffer { address: descriptor.addr(), len: descriptor.len() };
            if count > size || buffer.len == 0 || !inside(&buffer) {
                return false;
            }
            let writes = self.readable < self.buffers.len();
            match (descriptor.is_write_only(), writes) {
                (true, _) => {}
                (false, false) => self.readable += 1,
                (false, true) => return false,
            }
            self.buffers.push(buffer);
            cut_short = descriptor.has_next();
        }
        !cut_short
    }

    /// Takes the chain out of the hands of whoever lent it, for a device that keeps it to use later
    /// ([`Verdict::Kept`](super::Verdict::Kept)).
    pub fn keep(&mut self) -> Self {
        std::mem::take(self)
    }

    /// The descriptor that names this chain to the driver.
    pub fn head(&self) -> Head {
        Head(self.head)
    }

    /// Buffers for the device to read.
    pub fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or_default()
    }

    /// Buffers for the device to write.
    pub fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..).unwrap_or_default()
    }

    /// Bytes in all buffers together.
    pub fn len(&self) -> u64 {
        self.buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
    }

    /// Never: a chain has at least one buffer, and none is empty.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// Reads the chain's readable bytes from front to back.
    pub fn reader<'a>(&'a self, memory: &'a GuestMemoryMmap) -> Reader<'a> {
        Reader { place: Place::start(memory, self.readable()) }
    }

    /// Writes the chain's writable bytes from front to back.
    pub fn writer<'a>(&'a self, memory: &'a GuestMemoryMmap) -> Writer<'a> {
        Writer { place: Place::start(memory, self.writable()) }
    }
}

/// Names a chain that a device keeps to use later. One that was read back may name anything:
/// [`retake`](super::retake) looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Head(pub(super) u16);

/// A place in some buffers of a chain.
struct Place<'a> {
    memory: &'a GuestMemoryMmap,
    /// From the buffer that the place is in.
    buffers: &'a [Buffer],
    /// Bytes of that buffer that are behind the place.
    offset: u32,
    passed: u64,
}

impl<'a> Place<'a> {
    fn start(memory: &'a GuestMemoryMmap, buffers: &'a [Buffer]) -> Self {
        Self { memory, buffers, offset: 0, passed: 0 }
    }

    fn left(&self) -> u64 {
        let all: u64 = self.buffers.iter().map(|buffer| u64::from(buffer.len)).sum();
        all.saturating_sub(u64::from(self.offset))
    }

    /// Hands at most `most` bytes to `work`, piece by piece, and goes past those that it took: until it
    /// takes less than it got. Returns how many it took.
    fn walk(
        &mut self,
        most: usize,
        mut work: impl FnMut(&GuestMemoryMmap, GuestAddress, usize) -> usize,
    ) -> usize {
        let mut done = 0;
        while let Some((buffer, rest)) = self.buffers.split_first() {
            let left = usize::try_from(buffer.len.saturating_sub(self.offset)).unwrap_or(usize::MAX);
            let count = left.min(most.saturating_sub(done));
            if count == 0 {
                break;
            }
            let address = GuestAddress(buffer.address.0.saturating_add(u64::from(self.offset)));
            let taken = work(self.memory, address, count).min(count);
            done = done.saturating_add(taken);
            self.passed = self.passed.saturating_add(taken as u64);
            if taken == left {
                (self.buffers, self.offset) = (rest, 0);
            } else {
                // Below the buffer's length.
                self.offset = self.offset.saturating_add(taken as u32);
            }
            if taken < count {
                break;
            }
        }
        done
    }

    fn vectors(&mut self, most: usize, vectors: &mut IoVectors) -> usize {
        self.walk(most, |_, address, count| if vectors.push(address, count) { count } else { 0 })
    }
}

/// A place in the readable bytes of a chain.
pub struct Reader<'a> {
    place: Place<'a>,
}

impl Reader<'_> {
    /// Fills `out` as far as the chain goes; returns how many bytes it got.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        let mut done = 0;
        self.place.walk(out.len(), |memory, address, count| {
            let part = out.get_mut(done..).and_then(|rest| rest.get_mut(..count));
            let read = part.is_some_and(|part| memory.read_slice(part, address).is_ok());
            done += count;
            if read { count } else { 0 }
        })
    }

    /// Goes past `count` bytes as far as the chain goes.
    pub fn skip(&mut self, count: usize) {
        self.place.walk(count, |_, _, count| count);
    }

    /// Bytes that are still to read.
    pub fn left(&self) -> u64 {
        self.place.left()
    }

    /// Goes past at most `most` bytes and adds where they are to `vectors`, to be written to somewhere
    /// by the host's kernel; returns how many they are.
    pub fn vectors(&mut self, most: usize, vectors: &mut IoVectors) -> usize {
        self.place.vectors(most, vectors)
    }
}

/// A place in the writable bytes of a chain.
pub struct Writer<'a> {
    place: Place<'a>,
}

impl Writer<'_> {
    /// Writes `data` as far as the chain goes; returns how many bytes fitted.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        self.place.walk(data.len(), |memory, address, count| {
            let part = data.get(done..).and_then(|rest| rest.get(..count));
            let written = part.is_some_and(|part| memory.write_slice(part, address).is_ok());
            done += count;
            if written { count } else { 0 }
        })
    }

    /// Goes past `count` bytes as far as the chain goes.
    pub fn skip(&mut self, count: usize) {
        self.place.walk(count, |_, _, count| count);
    }

    /// Bytes that still fit.
    pub fn left(&self) -> u64 {
        self.place.left()
    }

    /// Bytes before this place: the length of what was written, for the used ring. A chain of more than
    /// 4 GiB is none (section 2.7.5.2), so it fits.
    pub fn written(&self) -> u32 {
        u32::try_from(self.place.passed).unwrap_or(u32::MAX)
    }

    /// Goes past at most `most` bytes and adds where they are to `vectors`, to be filled by the host's
    /// kernel; returns how many they are.
    pub fn vectors(&mut self, most: usize, vectors: &mut IoVectors) -> usize {
        self.place.vectors(most, vectors)
    }
}
