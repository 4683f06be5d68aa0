//! Descriptor chains, read once and checked as a whole.

use serde::{Deserialize, Serialize};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

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
        Reader { memory, buffers: self.readable(), offset: 0 }
    }
}

/// Names a chain that a device keeps to use later. One that was read back may name anything:
/// [`retake`](super::retake) looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Head(pub(super) u16);

/// A place in the readable bytes of a chain.
pub struct Reader<'a> {
    memory: &'a GuestMemoryMmap,
    buffers: &'a [Buffer],
    /// Bytes of the first buffer that are read already.
    offset: u32,
}

impl Reader<'_> {
    /// Fills `out` as far as the chain goes; returns how many bytes it got.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        let mut done = 0;
        while let (Some((buffer, rest)), Some(space)) = (self.buffers.split_first(), out.get_mut(done..)) {
            let left = buffer.len.saturating_sub(self.offset);
            let count = space.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if count == 0 && left > 0 {
                break;
            }
            let address = GuestAddress(buffer.address.0.saturating_add(u64::from(self.offset)));
            let Some(space) = space.get_mut(..count) else { break };
            if self.memory.read_slice(space, address).is_err() {
                break;
            }
            done += count;
            self.offset = self.offset.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
            if self.offset >= buffer.len {
                self.buffers = rest;
                self.offset = 0;
            }
        }
        done
    }
}
