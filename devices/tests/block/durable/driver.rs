//! A driver that has many requests at once on four queues.

use std::collections::VecDeque;
use std::sync::Arc;

use devices::testing::{BUFFERS, CARRIERS, Guest, HIGH};
use devices::virtio::block::disk::Disk;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

use super::super::room::block;
use super::history::{Ask, Event, filled, requests};
use super::{Chance, SECTOR};

const QUEUES: usize = 4;
/// Requests on each queue at once.
const DEPTH: usize = 4;
/// Room for the data of one.
const ROOM: u64 = 32 << 10;

pub struct Driver {
    guest: Guest,
    /// The request in each place: its number and itself.
    places: [[Option<(u64, Ask)>; DEPTH]; QUEUES],
}

impl Driver {
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        let block = block(disk, "disk", QUEUES as u16);
        let mut guest = Guest::on(CARRIERS[1], |_| Box::new(block));
        guest.start(0);
        Self { guest, places: Default::default() }
    }

    /// Has the first `count` requests of a seed done, several at once. `tell` hears of each event: of a request
    /// before the device can know of it, of an answer once the driver knows it.
    pub fn run(&mut self, seed: u64, count: u64, mut tell: impl FnMut(Event)) {
        let mut asks: VecDeque<_> = (0..count).zip(requests(seed)).collect();
        let mut chance = Chance(!seed);
        loop {
            while let Some((number, ask)) = asks.front() {
                if self.is_busy(ask) {
                    break;
                }
                let place = (chance.below(QUEUES as u64) as usize, chance.below(DEPTH as u64) as usize);
                if self.places[place.0][place.1].is_some() {
                    break;
                }
                tell(Event::Asked(*number));
                self.ask(place, *number, ask.clone());
                asks.pop_front();
            }
            self.answers(&mut tell);
            let is_quiet = self.places.iter().flatten().all(Option::is_none);
            if is_quiet && asks.is_empty() {
                return;
            }
            if !is_quiet {
                self.guest.wait(10_000);
            }
        }
    }

    /// Whether another is about the same sectors.
    fn is_busy(&self, ask: &Ask) -> bool {
        let range = ask.range();
        self.places.iter().flatten().flatten().any(|(_, other)| {
            let other = other.range();
            range.start < other.end && other.start < range.end
        })
    }

    fn ask(&mut self, (queue, place): (usize, usize), number: u64, ask: Ask) {
        let index = (queue * DEPTH + place) as u64;
        let (header, status, data) = (BUFFERS + index * 32, BUFFERS + 0x1000 + index, HIGH + index * ROOM);
        let range = ask.range();
        let (kind, sector, len) = match ask {
            Ask::Write { sector, sectors } => (VIRTIO_BLK_T_OUT, sector, sectors as usize * SECTOR),
            Ask::Zero { .. } => (VIRTIO_BLK_T_WRITE_ZEROES, 0, 16),
            Ask::Discard { .. } => (VIRTIO_BLK_T_DISCARD, 0, 16),
            Ask::Flush => (VIRTIO_BLK_T_FLUSH, 0, 0),
        };
        let bytes: Vec<u8> = if kind == VIRTIO_BLK_T_OUT {
            range.flat_map(|sector| filled(number, sector)).collect()
        } else {
            let flags = u64::from(matches!(ask, Ask::Zero { unmap: true, .. }));
            [range.start, (range.end - range.start) | flags << 32].map(u64::to_le_bytes).concat()
        };
        let memory = &self.guest.ram.memory;
        memory.write_obj([u64::from(kind).to_le(), sector.to_le()], GuestAddress(header)).unwrap();
        memory.write_obj(0xaa_u8, GuestAddress(status)).unwrap();
        memory.write_slice(&bytes[..len], GuestAddress(data)).unwrap();
        let head = 3 * place as u16;
        let after = if len == 0 { head + 2 } else { head + 1 };
        self.guest.describe(queue, head, header, 16, VRING_DESC_F_NEXT, after);
        self.guest.describe(queue, head + 1, data, len as u32, VRING_DESC_F_NEXT, head + 2);
        self.guest.describe(queue, head + 2, status, 1, VRING_DESC_F_WRITE, 0);
        self.places[queue][place] = Some((number, ask));
        self.guest.send(queue, head);
    }

    fn answers(&mut self, tell: &mut impl FnMut(Event)) {
        for queue in 0..QUEUES {
            for (head, _) in self.guest.used(queue) {
                let place = head as usize / 3;
                let (number, ask) = self.places[queue][place].take().unwrap();
                let status = BUFFERS + 0x1000 + (queue * DEPTH + place) as u64;
                let status: u8 = self.guest.ram.memory.read_obj(GuestAddress(status)).unwrap();
                assert_eq!(u32::from(status), VIRTIO_BLK_S_OK, "{ask:?}");
                tell(Event::Answered(number));
            }
        }
    }
}
