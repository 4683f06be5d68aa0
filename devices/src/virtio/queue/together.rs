//! Several chains at once: given back so that the driver sees all of them or none, or left in the queue as if
//! they had never been taken.

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{ActiveQueue, Chain};
use crate::virtio::device::Active;

/// Returns chains that were [`Kept`](super::Verdict::Kept), each with so many bytes written into it, in this
/// order. The driver sees all of them at once, as it must where they hold parts of one thing.
pub fn complete_together(active: &mut Active, index: usize, done: impl Iterator<Item = (Chain, u32)>) {
    let Some(queue) = active.queues.get_mut(index).filter(|queue| queue.is_ready()) else { return };
    if queue.use_together(&active.memory, done) {
        queue.notify(&active.memory);
    }
}

/// Leaves chains in the queue that were [`Kept`](super::Verdict::Kept): the last ones that were taken from it,
/// in the order in which they were. Where the driver has changed its ring since, they are given back empty.
pub fn put_back(active: &mut Active, index: usize, chains: impl DoubleEndedIterator<Item = Chain>) {
    let Some(queue) = active.queues.get_mut(index).filter(|queue| queue.is_ready()) else { return };
    let mut any = false;
    for chain in chains.rev() {
        let head = chain.head();
        if queue.untake(&active.memory, head.0) {
            queue.in_flight.remove(head.0);
        } else {
            any |= queue.give_back(&active.memory, head, 0);
        }
        queue.take_in_room(chain);
    }
    if any {
        queue.notify(&active.memory);
    }
}

impl ActiveQueue {
    /// Returns whether there was any.
    fn use_together(&mut self, memory: &GuestMemoryMmap, done: impl Iterator<Item = (Chain, u32)>) -> bool {
        let first = self.queue.next_used();
        let mut last: Option<(u16, u32)> = None;
        let mut count = 0u16;
        for (chain, written) in done {
            let head = chain.head().0;
            self.take_in_room(chain);
            if !self.in_flight.remove(head) {
                continue;
            }
            if let Some(before) = last.replace((head, written)) {
                if !self.write_used(memory, first.wrapping_add(count), before) {
                    return false;
                }
                count = count.wrapping_add(1);
            }
        }
        let Some((head, written)) = last else { return false };
        self.queue.set_next_used(first.wrapping_add(count));
        // This one moves the index past all of them.
        self.queue.add_used(memory, head, written).is_ok()
    }

    fn write_used(&self, memory: &GuestMemoryMmap, index: u16, (head, written): (u16, u32)) -> bool {
        // A queue that is ready has a size.
        let place = index.checked_rem(self.queue.size()).unwrap_or(0);
        let element = [u32::from(head).to_le(), written.to_le()];
        let address = self.queue.used_ring().checked_add(4 + 8 * u64::from(place));
        address.is_some_and(|address| memory.write_obj(element, GuestAddress(address)).is_ok())
    }

    /// Goes back by one chain, if `head` is what was taken last.
    fn untake(&mut self, memory: &GuestMemoryMmap, head: u16) -> bool {
        let before = self.queue.next_avail().wrapping_sub(1);
        let place = before.checked_rem(self.queue.size()).unwrap_or(0);
        let was_last = self.available(memory, place) == Some(head);
        if was_last {
            self.queue.set_next_avail(before);
        }
        was_last
    }
}
