//! How a device works on a queue whose driver may be hostile.
//!
//! A chain is read once into memory of our own and checked as a whole before a
//! device sees it, so nothing that the guest changes afterwards matters. What
//! one event may cost is bounded by a [`Budget`].
//!
//! A device gives a chain back at once, or keeps it and gives it back later, in any order: what it
//! keeps is in flight, and a driver that offers such a chain once more has it back as malformed.

mod chain;
mod together;
mod vectors;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::device::{Active, Progress};
use super::interrupt::Interrupt;
pub use chain::{Buffer, Chain, Head, Reader, Writer};
pub use together::{complete_together, put_back};
pub use vectors::IoVectors;

/// Malformed chains that a driver may hand over before the device asks for a reset.
pub const MOST_MALFORMED: u32 = 64;

/// Buffers that a room keeps space for while no chain is in it.
const ROOM: usize = 64;

/// What a device made of one chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Done; so many bytes were written into it.
    Used(u32),
    /// Not a request that the device understands: goes back with nothing written, and is counted.
    Malformed,
    /// Stays with the device, which calls [`give_back`], [`complete`] or [`complete_together`] for it later.
    Kept,
    /// Stays in the queue, as the device can take no more for now. It comes back to the queue by itself: the
    /// driver need not notify it of what it adds until then.
    Later,
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

/// A queue that a device works on, as the driver set it up.
#[derive(Debug)]
pub struct ActiveQueue {
    pub(super) queue: Queue,
    interrupt: Interrupt,
    in_flight: InFlight,
    /// The used index when the driver was last asked whether it wants to be told.
    told: u16,
    /// Room for chains that are to be read.
    rooms: Vec<Vec<Buffer>>,
}

impl ActiveQueue {
    pub(super) fn new(queue: Queue, interrupt: Interrupt) -> Self {
        Self { told: queue.next_used(), queue, interrupt, in_flight: InFlight::default(), rooms: Vec::new() }
    }

    /// Whether the driver has enabled it, and not stopped it since.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// What tells the driver of used buffers, for a device whose buffers somebody else uses.
    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The driver stops the queue: what the device may still keep of it is void.
    pub(super) fn stop(&mut self) {
        self.queue.set_ready(false);
        self.in_flight = InFlight::default();
    }

    /// Tells the driver of used buffers, where it wants that.
    fn notify(&mut self, memory: &GuestMemoryMmap) {
        let used = self.queue.next_used();
        let before = std::mem::replace(&mut self.told, used);
        // The driver must see the used index before it is asked up to which it wants to know nothing.
        fence(Ordering::SeqCst);
        // virtio-queue knows only of what was given back one by one.
        let wanted = self
            .used_event(memory)
            .is_none_or(|event| used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before));
        if wanted {
            self.interrupt.raise();
        }
    }

    /// Past which used index the driver wants to be told (section 2.7.7.1); always, where it does not say.
    fn used_event(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        if !self.queue.event_idx_enabled() {
            return None;
        }
        self.available(memory, self.queue.size())
    }

    /// The entry of the available ring at `place`.
    fn available(&self, memory: &GuestMemoryMmap, place: u16) -> Option<u16> {
        let address = self.queue.avail_ring().checked_add(4 + 2 * u64::from(place))?;
        memory.read_obj(GuestAddress(address)).map(u16::from_le).ok()
    }

    fn take_in_room(&mut self, chain: Chain) {
        let mut room = chain.into_room();
        if room.capacity() > 0 && self.rooms.len() < usize::from(self.queue.size()) {
            room.clear();
            room.shrink_to(ROOM);
            self.rooms.push(room);
        }
    }

    fn work(
        &mut self,
        memory: &GuestMemoryMmap,
        faults: &mut Faults,
        budget: Budget,
        any: &mut bool,
        work: &mut impl FnMut(&GuestMemoryMmap, &mut Chain) -> Verdict,
    ) -> Result<Progress, Broken> {
        let size = self.queue.size();
        let mut bytes = 0u64;
        self.queue.disable_notification(memory)?;
        for _ in 0..budget.chains.min(size) {
            let mut chain = Chain::in_room(self.rooms.pop().unwrap_or_default());
            let Some(next) = next(&mut self.queue, memory)? else {
                self.take_in_room(chain);
                return Ok(Progress::Done);
            };
            let head = next.head_index();
            let verdict = if !self.in_flight.has(head) && chain.read(memory, next, size) {
                bytes = bytes.saturating_add(chain.len());
                work(memory, &mut chain)
            } else {
                Verdict::Malformed
            };
            self.take_in_room(chain);
            let written = match verdict {
                Verdict::Kept => {
                    self.in_flight.insert(head);
                    continue;
                }
                Verdict::Later => {
                    self.queue.go_to_previous_position();
                    return Ok(Progress::Done);
                }
                Verdict::Used(written) => written,
                Verdict::Malformed if faults.add() => return Err(Broken),
                Verdict::Malformed => 0,
            };
            // A head that is not in the table can't be given back.
            *any |= self.queue.add_used(memory, head, written).is_ok();
            if bytes >= budget.bytes {
                break;
            }
        }
        Ok(Progress::More)
    }

    fn give_back(&mut self, memory: &GuestMemoryMmap, head: Head, written: u32) -> bool {
        self.queue.ready()
            && self.in_flight.remove(head.0)
            && self.queue.add_used(memory, head.0, written).is_ok()
    }
}

/// Heads that a device keeps, by their number. Empty until it keeps the first.
#[derive(Debug, Default)]
struct InFlight(Vec<u64>);

impl InFlight {
    fn place(head: u16) -> (usize, u64) {
        (usize::from(head / 64), 1 << (head % 64))
    }

    fn has(&self, head: u16) -> bool {
        let (word, bit) = Self::place(head);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    fn insert(&mut self, head: u16) {
        let (word, bit) = Self::place(head);
        if word >= self.0.len() {
            // A head is below the queue's size, so this is 4 KiB at most.
            self.0.resize(word + 1, 0);
        }
        if let Some(word) = self.0.get_mut(word) {
            *word |= bit;
        }
    }

    /// Returns whether it was there.
    fn remove(&mut self, head: u16) -> bool {
        let was = self.has(head);
        let (word, bit) = Self::place(head);
        if let Some(word) = self.0.get_mut(word) {
            *word &= !bit;
        }
        was
    }

    fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
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
    mut work: impl FnMut(&GuestMemoryMmap, &mut Chain) -> Verdict,
) -> Progress {
    let memory = Arc::clone(&active.memory);
    let Some(queue) = active.queues.get_mut(index).filter(|queue| queue.is_ready()) else {
        return Progress::Done;
    };
    let mut any = false;
    let worked = queue.work(&memory, faults, budget, &mut any, &mut work);
    if any {
        queue.notify(&memory);
    }
    worked.unwrap_or(Progress::Broken)
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

/// Takes a chain of queue `index` as in flight that was so before the device was saved. Returns
/// whether it can have been: the driver's queue has room for it, and it is not in flight already.
pub fn retake(active: &mut Active, index: usize, head: Head) -> bool {
    let Some(queue) = active.queues.get_mut(index).filter(|queue| queue.is_ready()) else { return false };
    let taken = queue.queue.next_avail().wrapping_sub(queue.queue.next_used());
    let can_be =
        head.0 < queue.size() && !queue.in_flight.has(head.0) && queue.in_flight.count() < u32::from(taken);
    if can_be {
        queue.in_flight.insert(head.0);
    }
    can_be
}

/// Returns a chain that was [`Kept`](Verdict::Kept), with `written` bytes in it.
pub fn give_back(active: &mut Active, index: usize, head: Head, written: u32) {
    let Some(queue) = active.queues.get_mut(index) else { return };
    if queue.give_back(&active.memory, head, written) {
        queue.notify(&active.memory);
    }
}

/// Returns chains that were [`Kept`](Verdict::Kept), in any order, each with so many bytes written
/// into it, and notifies the driver of all of them at once.
pub fn complete(active: &mut Active, index: usize, done: impl IntoIterator<Item = (Chain, u32)>) {
    let Some(queue) = active.queues.get_mut(index) else { return };
    let mut any = false;
    for (chain, written) in done {
        any |= queue.give_back(&active.memory, chain.head(), written);
        queue.take_in_room(chain);
    }
    if any {
        queue.notify(&active.memory);
    }
}
