//! How a device works on a queue whose driver may be hostile.
//!
//! A chain is read once into memory of our own and checked as a whole before a
//! device sees it, so nothing that the guest changes afterwards matters. What
//! one event may cost is bounded by a [`Budget`].

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::device::{Active, Progress};

/// Malformed chains that a driver may hand over before the device asks for a reset.
pub const MOST_MALFORMED: u32 = 64;

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
#[derive(Debug)]
pub struct Chain {
    head: u16,
    /// Buffers for the device to read.
    readable: Vec<Buffer>,
    /// Buffers for the device to write.
    writable: Vec<Buffer>,
}

impl Chain {
    fn read(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>, size: u16) -> Option<Self> {
        let inside = |buffer: &Buffer| {
            usize::try_from(buffer.len)
                .is_ok_and(|len| GuestMemoryBackend::check_range(memory, buffer.address, len))
        };
        Self::check(chain.head_index(), chain, inside, size)
    }

    /// The rules, apart from where descriptors and memory are.
    pub(super) fn check(
        head: u16,
        descriptors: impl Iterator<Item = Descriptor>,
        inside: impl Fn(&Buffer) -> bool,
        size: u16,
    ) -> Option<Self> {
        let mut this = Self { head, readable: Vec::new(), writable: Vec::new() };
        // virtio-queue ends a broken chain as it ends a whole one, so the
        // last descriptor tells: if it has a next, the chain was cut short.
        let mut cut_short = true;
        for (count, descriptor) in (1u16..=size.saturating_add(1)).zip(descriptors) {
            let buffer = Buffer { address: descriptor.addr(), len: descriptor.len() };
            if count > size || buffer.len == 0 || !inside(&buffer) {
                return None;
            }
            match (descriptor.is_write_only(), this.writable.is_empty()) {
                (true, _) => this.writable.push(buffer),
                (false, true) => this.readable.push(buffer),
                (false, false) => return None,
            }
            cut_short = descriptor.has_next();
        }
        (!cut_short).then_some(this)
    }

    /// The descriptor that names this chain to the driver.
    pub fn head(&self) -> Head {
        Head(self.head)
    }

    /// Buffers for the device to read.
    pub fn readable(&self) -> &[Buffer] {
        &self.readable
    }

    /// Buffers for the device to write.
    pub fn writable(&self) -> &[Buffer] {
        &self.writable
    }

    /// Bytes in all buffers together.
    pub fn len(&self) -> u64 {
        self.readable.iter().chain(&self.writable).map(|buffer| u64::from(buffer.len)).sum()
    }

    /// Never: a chain has at least one buffer, and none is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads the chain's readable bytes from front to back.
    pub fn reader<'a>(&'a self, memory: &'a GuestMemoryMmap) -> Reader<'a> {
        Reader { memory, buffers: &self.readable, offset: 0 }
    }
}

/// Names a chain that a device keeps to use later. One that was read back may name anything:
/// [`give_back`] looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Head(u16);

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

/// What a device made of one chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Done; so many bytes were written into it.
    Used(u32),
    /// Not a request that the device understands: goes back with nothing written, and is counted.
    Malformed,
    /// Stays with the device, which calls [`give_back`] for it later.
    Kept,
}

/// How much of a queue one event may work on.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Chains at most.
    pub chains: u16,
    /// No further chain once so many bytes have passed.
    pub bytes: u64,
}

/// Counts what a driver did wrong. Saved and restored as it is: no value of it is a wrong one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Faults {
    total: u64,
    since_reset: u32,
}

impl Faults {
    /// Malformed chains since the device was made.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The driver starts anew.
    pub fn forgive(&mut self) {
        self.since_reset = 0;
    }

    /// Counts one; true once it is one too many.
    fn add(&mut self) -> bool {
        self.total = self.total.saturating_add(1);
        self.since_reset = self.since_reset.saturating_add(1);
        self.since_reset > MOST_MALFORMED
    }
}

/// The driver broke the rings themselves, or sent too many malformed chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Broken;

impl From<Error> for Broken {
    fn from(_: Error) -> Self {
        Self
    }
}

/// Hands the chains of queue `index` to `work`, one after the other, as far as
/// `budget` goes, gives each back as `work` says and notifies the driver where
/// it wants that. [`Progress::Broken`] is an available index past the ring's
/// size, or more than [`MOST_MALFORMED`] malformed chains.
pub fn serve(
    active: &mut Active,
    index: usize,
    faults: &mut Faults,
    budget: Budget,
    mut work: impl FnMut(&GuestMemoryMmap, &Chain) -> Verdict,
) -> Progress {
    let memory = Arc::clone(&active.memory);
    let Some(queue) = active.queues.get_mut(index) else { return Progress::Done };
    if !queue.ready() {
        return Progress::Done;
    }
    let mut any = false;
    let worked = drain(queue, &memory, faults, budget, &mut any, &mut work);
    let notify = any && queue.needs_notification(&*memory).unwrap_or(true);
    if notify {
        active.interrupt.used_buffers();
    }
    worked.unwrap_or(Progress::Broken)
}

fn drain(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    faults: &mut Faults,
    budget: Budget,
    any: &mut bool,
    work: &mut impl FnMut(&GuestMemoryMmap, &Chain) -> Verdict,
) -> Result<Progress, Broken> {
    let size = queue.size();
    let mut bytes = 0u64;
    queue.disable_notification(memory)?;
    for _ in 0..budget.chains.min(size) {
        let Some(next) = next(queue, memory)? else {
            return Ok(Progress::Done);
        };
        let head = next.head_index();
        let verdict = match Chain::read(memory, next, size) {
            Some(chain) => {
                bytes = bytes.saturating_add(chain.len());
                work(memory, &chain)
            }
            None => Verdict::Malformed,
        };
        let written = match verdict {
            Verdict::Kept => continue,
            Verdict::Used(written) => written,
            Verdict::Malformed if faults.add() => return Err(Broken),
            Verdict::Malformed => 0,
        };
        // A head that is not in the table can't be given back.
        *any |= queue.add_used(memory, head, written).is_ok();
        if bytes >= budget.bytes {
            break;
        }
    }
    Ok(Progress::More)
}

/// The next chain; with none left, notifications are on again.
fn next<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, Broken> {
    // Twice, as the driver may add a buffer just before notifications are on.
    for _ in 0..2 {
        if let Some(chain) = queue.iter(memory)?.next() {
            return Ok(Some(chain));
        }
        if !queue.enable_notification(memory)? {
            return Ok(None);
        }
        queue.disable_notification(memory)?;
    }
    // The index says there is more, the ring can't be read.
    Err(Broken)
}

/// Whether the device has taken a chain of queue `index` that it has not given back.
pub fn has_taken(active: &Active, index: usize) -> bool {
    active.queues.get(index).is_some_and(|queue| queue.next_avail() != queue.next_used())
}

/// Returns a chain that was [`Kept`](Verdict::Kept), with `written` bytes in it.
pub fn give_back(active: &mut Active, index: usize, head: Head, written: u32) {
    let Some(queue) = active.queues.get_mut(index).filter(|queue| queue.ready()) else { return };
    let memory = &*active.memory;
    if queue.add_used(memory, head.0, written).is_ok() && queue.needs_notification(memory).unwrap_or(true) {
        active.interrupt.used_buffers();
    }
}
