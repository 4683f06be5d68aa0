//! A queue as the driver describes it, register by register, until it is ready.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::saved::QueueState;
use crate::virtio::queue::ActiveQueue;

/// Which half of a 64-bit register an access means.
#[derive(Clone, Copy)]
pub(in crate::virtio) enum Half {
    Low,
    High,
}

impl Half {
    /// The half that a driver selects by its number; there are no feature bits past 63.
    pub(in crate::virtio) fn of(select: u32) -> Option<Self> {
        match select {
            0 => Some(Self::Low),
            1 => Some(Self::High),
            _ => None,
        }
    }

    /// This half of `register`.
    pub(in crate::virtio) fn get(self, register: u64) -> u32 {
        match self {
            Self::Low => register as u32,
            Self::High => (register >> 32) as u32,
        }
    }

    /// `register` with this half replaced.
    pub(in crate::virtio) fn put(self, register: &mut u64, value: u32) {
        *register = match self {
            Self::Low => *register & !u64::from(u32::MAX) | u64::from(value),
            Self::High => *register & u64::from(u32::MAX) | u64::from(value) << 32,
        };
    }
}

/// Guest addresses from `start` up to `end`.
#[derive(Clone, Copy)]
pub(super) struct Area {
    start: u64,
    end: u64,
}

impl Area {
    fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// The registers of one queue (virtio 1.2, sections 4.1.4.3 and 4.2.2).
pub(in crate::virtio) struct QueueSetup {
    pub(in crate::virtio) max_size: u16,
    pub(in crate::virtio) size: u32,
    pub(in crate::virtio) descriptors: u64,
    pub(in crate::virtio) available: u64,
    pub(in crate::virtio) used: u64,
    ready: bool,
    /// Built and checked once the driver has said that it is ready; the device has it from DRIVER_OK on.
    built: Option<Queue>,
}

impl QueueSetup {
    pub(super) fn new(max_size: u16) -> Self {
        let size = u32::from(max_size);
        Self { max_size, size, descriptors: 0, available: 0, used: 0, ready: false, built: None }
    }

    pub(in crate::virtio) fn is_ready(&self) -> bool {
        self.ready
    }

    pub(super) fn disable(&mut self) {
        self.ready = false;
        self.built = None;
    }

    /// The driver says that the queue is ready. Returns whether size, alignment and addresses make a
    /// queue inside guest memory whose parts overlap nothing in `taken`.
    pub(super) fn enable(&mut self, memory: &GuestMemoryMmap, taken: &[Area]) -> bool {
        self.built = self.build(memory).filter(|_| self.is_apart_from(taken));
        self.ready = self.built.is_some();
        self.ready
    }

    /// What the queue's three parts cover (virtio 1.2, section 2.7).
    pub(super) fn areas(&self) -> [Area; 3] {
        let size = u64::from(self.size);
        let area = |start: u64, len: u64| Area { start, end: start.saturating_add(len) };
        [area(self.descriptors, 16 * size), area(self.available, 6 + 2 * size), area(self.used, 6 + 8 * size)]
    }

    /// A device that writes one ring into another would feed itself for ever.
    fn is_apart_from(&self, taken: &[Area]) -> bool {
        let [descriptors, available, used] = self.areas();
        let own =
            !descriptors.overlaps(available) && !descriptors.overlaps(used) && !available.overlaps(used);
        own && !self.areas().into_iter().any(|area| taken.iter().any(|other| area.overlaps(*other)))
    }

    fn build(&self, memory: &GuestMemoryMmap) -> Option<Queue> {
        // virtio-queue takes an available ring at 0 for one that was never set,
        // and its setters keep the old value where the new one is bad.
        if self.available == 0 {
            return None;
        }
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(u16::try_from(self.size).ok()?).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).ok()?;
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }

    /// The registers and, of a queue that is ready, how far it has come.
    pub(super) fn save(&self, running: Option<&ActiveQueue>) -> QueueState {
        let queue = running.map(|queue| &queue.queue).or(self.built.as_ref()).filter(|_| self.ready);
        QueueState {
            size: self.size,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            ready: self.ready,
            next_available: queue.map_or(0, Queue::next_avail),
            next_used: queue.map_or(0, Queue::next_used),
        }
    }

    /// Takes in what [`save`](Self::save) gave, by the checks that a driver has to pass.
    /// Returns whether it is a queue that a driver could have made.
    pub(super) fn restore(&mut self, state: &QueueState, memory: &GuestMemoryMmap, taken: &[Area]) -> bool {
        self.size = state.size;
        self.descriptors = state.descriptors;
        self.available = state.available;
        self.used = state.used;
        if !state.ready {
            return true;
        }
        // What the device took and has not given back is at most the whole queue.
        let taken_chains = state.next_available.wrapping_sub(state.next_used);
        if u32::from(taken_chains) > state.size || !self.enable(memory, taken) {
            return false;
        }
        if let Some(queue) = &mut self.built {
            queue.set_next_avail(state.next_available);
            queue.set_next_used(state.next_used);
        }
        true
    }

    /// The queue for the device; one that was never enabled is not `ready`.
    pub(super) fn take(&mut self, event_idx: bool) -> Queue {
        let mut queue = self.built.take().unwrap_or_default();
        queue.set_event_idx(event_idx);
        queue
    }
}
