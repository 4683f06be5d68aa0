//! A device whose requests are done by another thread, in any order: a made-up disk that reads a file.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use devices::state::StateError;
use devices::testing::{BUFFERS, CARRIERS, Carrier, Guest, HIGH, NEEDS_RESET, RUNNING};
use devices::virtio::device::{Active, Progress, VirtioDevice};
use devices::virtio::queue::{Budget, Chain, Faults, IoVectors, Verdict, complete, serve};
use serde_json::{Value, json};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::tempfile::TempFile;

/// A read of the file, from a place in it into the chain's writable buffers.
struct Request {
    chain: Chain,
    vectors: IoVectors,
    place: u64,
}

/// What the thread is told.
enum Order {
    Keep(Request),
    FinishLast,
    FinishAll,
}

fn serve_file(file: &File, orders: &Receiver<Order>, done: &Sender<(Chain, u32)>, wake: &EventFd) {
    let mut kept: Vec<Request> = Vec::new();
    for order in orders {
        let finished = match order {
            Order::Keep(request) => {
                kept.push(request);
                continue;
            }
            Order::FinishLast => kept.pop().into_iter().collect(),
            Order::FinishAll => std::mem::take(&mut kept),
        };
        for mut request in finished.into_iter().rev() {
            let count = request.vectors.fill_from(file.as_fd(), request.place).unwrap();
            // The device may be gone.
            let _ = done.send((request.chain, count as u32));
            wake.write(1).unwrap();
        }
    }
}

struct Disk {
    faults: Faults,
    orders: Sender<Order>,
    done: Receiver<(Chain, u32)>,
    wake: EventFd,
    in_flight: usize,
    events: Sender<bool>,
}

impl Disk {
    /// The disk, the way to tell its thread when to finish what, and what own events it heard of:
    /// whether a driver was there.
    fn new() -> (Self, Sender<Order>, Receiver<bool>) {
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&content()).unwrap();
        let (orders, to_do) = channel();
        let (finished, done) = channel();
        let (events, heard) = channel();
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        let waker = wake.try_clone().unwrap();
        thread::spawn(move || serve_file(&file, &to_do, &finished, &waker));
        let disk =
            Self { faults: Faults::default(), orders: orders.clone(), done, wake, in_flight: 0, events };
        (disk, orders, heard)
    }
}

impl VirtioDevice for Disk {
    fn device_id(&self) -> u32 {
        63
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 {
            data[0] = self.faults.total() as u8;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _active: &mut Active) {}

    fn reset(&mut self) {
        assert_eq!(self.in_flight, 0, "reset before it was drained");
        self.faults.forgive();
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        let (memory, orders, in_flight) = (active.memory.clone(), &self.orders, &mut self.in_flight);
        serve(active, index, &mut self.faults, Budget { chains: 16, bytes: u64::MAX }, |guest, chain| {
            let mut place = [0; 8];
            if chain.reader(guest).read(&mut place) < place.len() {
                return Verdict::Malformed;
            }
            let mut vectors = IoVectors::new(memory.clone());
            let mut writer = chain.writer(guest);
            writer.vectors(usize::MAX, &mut vectors);
            let place = u64::from_le_bytes(place);
            orders.send(Order::Keep(Request { chain: chain.keep(), vectors, place })).unwrap();
            *in_flight += 1;
            Verdict::Kept
        })
    }

    fn own_events(&self) -> Vec<RawFd> {
        vec![self.wake.as_raw_fd()]
    }

    fn own_event(&mut self, _index: usize, active: Option<&mut Active>) {
        let _ = self.wake.read();
        // The test may not listen.
        let _ = self.events.send(active.is_some());
        if let Some(active) = active {
            let in_flight = &mut self.in_flight;
            complete(active, 0, self.done.try_iter().inspect(|_| *in_flight -= 1));
        }
    }

    fn drain(&mut self, active: &mut Active) {
        self.orders.send(Order::FinishAll).unwrap();
        let left = std::mem::take(&mut self.in_flight);
        complete(active, 0, self.done.iter().take(left));
    }

    fn save(&self) -> Result<Value, StateError> {
        assert_eq!(self.in_flight, 0, "saved before it was drained");
        Ok(json!({}))
    }

    fn restore(&mut self, _state: Value, _active: Option<&mut Active>) -> Result<(), StateError> {
        Ok(())
    }
}

/// What the file holds: every 4 bytes their own place.
fn content() -> Vec<u8> {
    (0..0x1_0000_u32).step_by(4).flat_map(u32::to_le_bytes).collect()
}

/// A guest with the disk, an honest driver that wants to hear of every request, and the disk's thread.
fn room(carrier: Carrier) -> (Guest, Sender<Order>, Receiver<bool>) {
    let (disk, orders, heard) = Disk::new();
    let mut guest = Guest::on(carrier, |_| Box::new(disk));
    guest.start(1 << VIRTIO_RING_F_EVENT_IDX);
    (guest, orders, heard)
}

/// Where the payload of the request at `head` goes: in two buffers.
fn buffers(head: u16) -> [u64; 2] {
    [BUFFERS + 0x1000 * u64::from(head), HIGH + 0x1000 * u64::from(head)]
}

/// Describes a request for 96 bytes from `place` on, at `head` and the two descriptors after it.
fn describe(guest: &Guest, head: u16, place: u64) {
    let header = BUFFERS + 0x2_0000 + 8 * u64::from(head);
    guest.ram.memory.write_obj(place.to_le(), GuestAddress(header)).unwrap();
    let [first, second] = buffers(head);
    guest.describe(0, head, header, 8, VRING_DESC_F_NEXT, head + 1);
    guest.describe(0, head + 1, first, 32, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, head + 2);
    guest.describe(0, head + 2, second, 64, VRING_DESC_F_WRITE, 0);
}

fn request(guest: &mut Guest, head: u16, place: u64) {
    describe(guest, head, place);
    guest.send(0, head);
}

fn payload(guest: &Guest, head: u16) -> Vec<u8> {
    let [first, second] = buffers(head);
    let mut bytes = vec![0; 96];
    guest.ram.memory.read_slice(&mut bytes[..32], GuestAddress(first)).unwrap();
    guest.ram.memory.read_slice(&mut bytes[32..], GuestAddress(second)).unwrap();
    bytes
}

fn assert_read(guest: &Guest, head: u16, place: usize) {
    assert_eq!(payload(guest, head), content()[place..place + 96], "the request at {head}");
}

/// What comes back next; the thread may have woken the device for what came back before.
fn finished(guest: &mut Guest) -> Vec<(u32, u32)> {
    loop {
        assert!(guest.wait(10_000), "nothing comes back");
        let used = guest.used(0);
        if !used.is_empty() {
            return used;
        }
    }
}

#[test]
fn requests_are_completed_in_any_order() {
    for carrier in CARRIERS {
        let (mut guest, orders, _) = room(carrier);
        for head in [0, 3, 6] {
            request(&mut guest, head, 0x100 * u64::from(head));
        }
        assert_eq!(guest.used(0), []);
        for head in [6, 3, 0] {
            assert_eq!(guest.interrupts(), 0);
            orders.send(Order::FinishLast).unwrap();
            assert_eq!(finished(&mut guest), [(u32::from(head), 96)]);
            assert_read(&guest, head, 0x100 * usize::from(head));
            assert_eq!(guest.interrupts(), 1);
        }
        // The room of what is done is used again.
        for round in 0..100 {
            request(&mut guest, 9, 4 * round);
            orders.send(Order::FinishLast).unwrap();
            assert_eq!(finished(&mut guest), [(9, 96)]);
            assert_read(&guest, 9, 4 * round as usize);
        }
        guest.ram.assert_canaries();
    }
}

#[test]
fn a_read_ends_where_the_file_does() {
    for carrier in CARRIERS {
        let (mut guest, orders, _) = room(carrier);
        request(&mut guest, 0, 0x1_0000 - 40);
        orders.send(Order::FinishLast).unwrap();
        assert_eq!(finished(&mut guest), [(0, 40)]);
        assert_eq!(payload(&guest, 0)[..40], content()[0x1_0000 - 40..]);
        assert_eq!(payload(&guest, 0)[40..], [0; 56]);
    }
}

/// Once a driver reads 0 from the status, its memory is its own again.
#[test]
fn a_reset_waits_for_what_is_in_flight() {
    for carrier in CARRIERS {
        let (mut guest, orders, _) = room(carrier);
        for head in [0, 3, 6] {
            request(&mut guest, head, 0x100 * u64::from(head));
        }
        guest.write(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(guest.status(), 0);
        assert_eq!(guest.used(0), [(6, 96), (3, 96), (0, 96)]);
        for head in [0, 3, 6] {
            assert_read(&guest, head, 0x100 * usize::from(head));
            let [first, second] = buffers(head);
            guest.ram.memory.write_slice(&[0xaa; 32], GuestAddress(first)).unwrap();
            guest.ram.memory.write_slice(&[0xaa; 64], GuestAddress(second)).unwrap();
        }
        // Nobody has anything left to do.
        orders.send(Order::FinishAll).unwrap();
        guest.run();
        guest.start(1 << VIRTIO_RING_F_EVENT_IDX);
        request(&mut guest, 9, 0);
        orders.send(Order::FinishLast).unwrap();
        assert_eq!(finished(&mut guest), [(9, 96)]);
        assert_eq!([0, 3, 6].map(|head| payload(&guest, head)), [[0xaa; 96]; 3].map(Vec::from));
    }
}

#[test]
fn a_device_that_is_drained_stands_still_until_it_goes_on() {
    for carrier in CARRIERS {
        let (mut guest, orders, heard) = room(carrier);
        request(&mut guest, 0, 0);
        request(&mut guest, 3, 0x300);
        guest.transport().lock().unwrap().drain();
        assert_eq!(guest.used(0), [(3, 96), (0, 96)]);
        assert!(guest.interrupts() > 0);
        // A second time changes nothing.
        guest.transport().lock().unwrap().drain();
        // Neither a notification nor an event of its own is served, and none keeps its loop busy.
        request(&mut guest, 6, 0x600);
        guest.run();
        assert_eq!(guest.run(), 0);
        orders.send(Order::FinishAll).unwrap();
        assert_eq!((guest.used(0), heard.try_iter().count()), (vec![], 0));

        guest.transport().lock().unwrap().resume();
        guest.run();
        assert!(heard.try_iter().count() > 0, "the event that waited is served");
        orders.send(Order::FinishLast).unwrap();
        assert_eq!(finished(&mut guest), [(6, 96)]);
        assert_read(&guest, 6, 0x600);
    }
}

#[test]
fn a_device_is_saved_with_nothing_in_flight() {
    for carrier in CARRIERS {
        let (mut guest, _, _) = room(carrier);
        request(&mut guest, 0, 0);
        guest.transport().lock().unwrap().drain();
        describe(&guest, 3, 0x300);
        guest.offer(0, 3);
        let state = guest.save().unwrap();
        let queue = state.driver.queues[0];
        assert_eq!((queue.next_available, queue.next_used), (1, 1));
        let (disk, orders, _heard) = Disk::new();
        let mut guest = guest.restore(Box::new(disk), state).unwrap();
        guest.run();
        orders.send(Order::FinishLast).unwrap();
        assert_eq!(finished(&mut guest), [(0, 96), (3, 96)]);
        assert_read(&guest, 3, 0x300);
    }
}

#[test]
fn a_head_that_is_in_flight_is_not_taken_again() {
    for carrier in CARRIERS {
        let (mut guest, orders, _) = room(carrier);
        request(&mut guest, 0, 0x40);
        guest.send(0, 0);
        guest.send(0, 0);
        assert_eq!(guest.used(0), [(0, 0), (0, 0)]);
        assert_eq!(guest.read(0x100) & 0xff, 2, "both are counted");
        orders.send(Order::FinishAll).unwrap();
        assert_eq!(finished(&mut guest), [(0, 96)]);
        assert_read(&guest, 0, 0x40);
        // Given back, it can come again.
        request(&mut guest, 0, 0x80);
        orders.send(Order::FinishLast).unwrap();
        assert_eq!(finished(&mut guest), [(0, 96)]);
        assert_eq!(guest.status(), RUNNING);
    }
}

#[test]
fn what_a_driver_breaks_is_finished_before_it_starts_anew() {
    for carrier in CARRIERS {
        let (mut guest, orders, heard) = room(carrier);
        request(&mut guest, 0, 0);
        guest.set_available(0, 1000);
        guest.notify(0);
        assert_eq!(guest.status(), RUNNING | NEEDS_RESET);
        orders.send(Order::FinishLast).unwrap();
        assert!(guest.wait(10_000));
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [false]);
        guest.start(1 << VIRTIO_RING_F_EVENT_IDX);
        request(&mut guest, 3, 0x300);
        orders.send(Order::FinishLast).unwrap();
        assert_eq!(finished(&mut guest), [(3, 96)]);
    }
}

/// The memory that vectors point into stays mapped, whoever else lets go of it.
#[test]
fn vectors_keep_their_memory() {
    let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let memory = Arc::new(memory);
    let mut vectors = IoVectors::new(memory.clone());
    assert!(!vectors.push(GuestAddress(0xff0), 0x20), "past the end");
    assert!(vectors.is_empty());
    assert!(vectors.push(GuestAddress(0xff0), 0x10));
    drop(memory);
    let mut file = TempFile::new().unwrap().into_file();
    file.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(vectors.fill_from(file.as_fd(), 0).unwrap(), 16);
    assert!(vectors.is_empty());
    let refused = IoVectors::new(Arc::new(vm_memory::GuestMemoryMmap::new())).push(GuestAddress(0), 1);
    assert!(!refused);
}

#[test]
fn more_vectors_than_one_call_takes_are_transferred() {
    let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    let memory = Arc::new(memory);
    let bytes: Vec<u8> = (0..3000_u32).map(|n| n as u8).collect();
    let file = TempFile::new().unwrap().into_file();
    // Every other byte of guest memory, backwards.
    let places = || (0..3000_u64).map(|n| GuestAddress(0x3fff - 2 * n));
    for (place, byte) in places().zip(&bytes) {
        memory.write_obj(*byte, place).unwrap();
    }
    let mut vectors = IoVectors::new(memory.clone());
    assert!(places().all(|place| vectors.push(place, 1)));
    assert_eq!((vectors.len(), vectors.as_slice().len()), (3000, 3000));
    assert_eq!(vectors.write_to(file.as_fd(), 7).unwrap(), 3000);
    let mut back = IoVectors::new(memory.clone());
    assert!(back.push(GuestAddress(0), 3000));
    back.advance(1);
    assert_eq!(back.fill_from(file.as_fd(), 7).unwrap(), 2999);
    let mut read = vec![0; 2999];
    memory.read_slice(&mut read, GuestAddress(1)).unwrap();
    assert_eq!(read, bytes[..2999]);
}
