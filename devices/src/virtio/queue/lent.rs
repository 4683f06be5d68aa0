//! Queues that a backend outside of the device works on (another process, or the kernel), and that come back.
//!
//! A backend may end in the middle of its work. The rings do not say which chains it had then: a driver's entries
//! are overwritten as it goes on, and chains may be used in any order. So they are counted while the backend has the
//! queue, at each signal of either side.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{ActiveQueue, Chain, Verdict};

/// What a backend has of a queue, as far as its rings tell. Nothing in them is to be trusted: its driver writes
/// one of them, and the backend the other.
#[derive(Debug)]
pub(in crate::virtio) struct Lent {
    /// Up to which index the driver's entries were counted, and those of used chains.
    offered: u16,
    used: u16,
    /// By head: how often it was offered, less how often it was used. 0 or 1 where all are honest.
    counts: Vec<i8>,
    /// Whether no entry was overwritten before it was counted.
    is_known: bool,
}

impl Lent {
    /// `queue` goes to a backend from where it stands, with nothing in flight.
    pub(in crate::virtio) fn new(queue: &ActiveQueue) -> Self {
        Self {
            offered: queue.queue.next_avail(),
            used: queue.queue.next_used(),
            counts: vec![0; usize::from(queue.size())],
            is_known: true,
        }
    }

    /// Counts what came to the rings since the last look.
    pub(in crate::virtio) fn look(&mut self, queue: &ActiveQueue, memory: &GuestMemoryMmap) {
        // In this order: what was used had been offered before.
        let (Some(used), Some(offered)) = (queue.used_index(memory), queue.available_index(memory)) else {
            self.is_known = false;
            return;
        };
        let heads = |queue: &ActiveQueue, from: u16, to: u16, read: &dyn Fn(u16) -> Option<u16>| {
            let count = to.wrapping_sub(from);
            let places = (0..count.min(queue.size())).map(move |step| from.wrapping_add(step));
            let heads: Option<Vec<u16>> = places.map(|at| read(queue.place(at))).collect();
            heads.filter(|_| count <= queue.size())
        };
        let new_offers = heads(queue, self.offered, offered, &|place| queue.available(memory, place));
        let new_uses = heads(queue, self.used, used, &|place| queue.used_head(memory, place));
        (self.offered, self.used) = (offered, used);
        for (heads, step) in [(new_offers, 1), (new_uses, -1)] {
            for head in heads.as_deref().unwrap_or_default() {
                match self.counts.get_mut(usize::from(*head)) {
                    Some(count) => *count = count.saturating_add(step),
                    None => self.is_known = false,
                }
            }
            self.is_known &= heads.is_some();
        }
        if offered == used {
            // Nothing is in flight, whatever was missed.
            self.counts.fill(0);
            self.is_known = true;
        }
    }

    /// The heads that are in flight; `None` where that is not known.
    fn in_flight(&self) -> Option<Vec<u16>> {
        let is_honest = self.is_known && self.counts.iter().all(|count| (0..=1).contains(count));
        let heads = (0..).zip(&self.counts).filter(|(_, count)| **count == 1).map(|(head, _)| head);
        let heads: Vec<u16> = heads.collect();
        let count = usize::from(self.offered.wrapping_sub(self.used));
        (is_honest && heads.len() == count).then_some(heads)
    }
}

impl ActiveQueue {
    /// The index at which whoever works on it begins.
    pub(in crate::virtio) fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Takes the queue back from a backend that works on it no more. Each chain that it left goes to `work`, and back to
    /// the driver; the device goes on with what the driver offers next. Returns how many there were; `None` where
    /// that is not known: then what it left stays with nobody.
    pub(in crate::virtio) fn take_back(
        &mut self,
        mut lent: Lent,
        memory: &GuestMemoryMmap,
        mut work: impl FnMut(&GuestMemoryMmap, &mut Chain) -> Verdict,
    ) -> Option<usize> {
        lent.look(self, memory);
        let heads = lent.in_flight();
        self.queue.set_next_used(lent.used);
        self.told = lent.used;
        let found: Option<Vec<u16>> = heads
            .and_then(|heads| heads.iter().map(|head| self.place_of(memory, *head, lent.offered)).collect());
        let mut done = 0;
        for at in found.as_deref().unwrap_or_default() {
            self.queue.set_next_avail(*at);
            let mut chain = Chain::in_room(self.rooms.pop().unwrap_or_default());
            // None where the driver has offered more meanwhile than there is room for.
            if let Some(next) = next_of(&mut self.queue, memory) {
                let head = next.head_index();
                let is_whole = chain.read(memory, next, self.queue.size());
                let verdict = if is_whole { work(memory, &mut chain) } else { Verdict::Malformed };
                let written = if let Verdict::Used(written) = verdict { written } else { 0 };
                // A head that is not in the table can't be given back.
                done += usize::from(self.queue.add_used(memory, head, written).is_ok());
            }
            self.take_in_room(chain);
        }
        self.queue.set_next_avail(lent.offered);
        // The backend may have used some and not have told.
        self.interrupt.raise();
        found.map(|found| found.len()).filter(|count| *count == done)
    }

    fn place(&self, index: u16) -> u16 {
        // A queue that is ready has a size.
        index.checked_rem(self.queue.size()).unwrap_or(0)
    }

    fn available_index(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        self.queue.avail_idx(memory, Ordering::Acquire).map(|index| index.0).ok()
    }

    fn used_index(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        self.queue.used_idx(memory, Ordering::Acquire).map(|index| index.0).ok()
    }

    fn used_head(&self, memory: &GuestMemoryMmap, place: u16) -> Option<u16> {
        let address = self.queue.used_ring().checked_add(4 + 8 * u64::from(place))?;
        let head: u32 = memory.read_obj(GuestAddress(address)).map(u32::from_le).ok()?;
        u16::try_from(head).ok()
    }

    /// The last index before `end` at which the driver has offered `head`.
    fn place_of(&self, memory: &GuestMemoryMmap, head: u16, end: u16) -> Option<u16> {
        let mut before = (1..=self.queue.size()).map(|step| end.wrapping_sub(step));
        before.find(|at| self.available(memory, self.place(*at)) == Some(head))
    }
}

fn next_of<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Option<virtio_queue::DescriptorChain<&'m GuestMemoryMmap>> {
    queue.iter(memory).ok()?.next()
}
