//! What becomes of requests whose backend fails, and the backends that come after it.

use std::time::Instant;

use devices::testing::{BUFFERS, NEEDS_RESET};
use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;

/// Descriptors to be written by the device, and those with one behind them (virtio 1.2, section 2.7.5).
const WRITE: u32 = 2;
const NEXT: u32 = 1;

/// Bytes of a FUSE header.
const HEADER: u32 = 40;
const SOON: Duration = Duration::from_millis(5);

fn spare(lie: Lie) -> (Backend, Spare) {
    let patience = if lie == Lie::Nothing { LONG } else { PATIENCE };
    let (backend, socket) = Backend::start(GET_FEATURES, lie);
    let front_end = FrontEnd::silent(socket, &memory(), QUEUES, patience).unwrap();
    (backend, Spare { front_end, after: SOON })
}

/// A guest's file system: each of its requests has a head of its own, and with it a place in memory.
impl Shared {
    /// Describes a request at `head`, of which the answer's room has so many bytes.
    fn describe(&self, queue: usize, head: u16, room: u32) {
        let place = BUFFERS + 128 * u64::from(head);
        let mut asked = [0; HEADER as usize];
        asked[..4].copy_from_slice(&HEADER.to_le_bytes());
        asked[8..16].copy_from_slice(&(1000 + u64::from(head)).to_le_bytes());
        let memory = &self.guest.ram.memory;
        memory.write_slice(&asked, GuestAddress(place)).unwrap();
        memory.write_slice(&[0x55; 64], GuestAddress(place + 64)).unwrap();
        if room == 0 {
            return self.guest.describe(queue, head, place, HEADER, 0, 0);
        }
        self.guest.describe(queue, head, place, HEADER, NEXT, head + 1);
        self.guest.describe(queue, head + 1, place + 64, room, WRITE, 0);
    }

    /// The error in the answer to the request at `head`.
    fn error(&self, head: u32) -> i32 {
        let place = BUFFERS + 128 * u64::from(head) + 64;
        let read = |at| self.guest.ram.memory.read_obj::<u32>(GuestAddress(place + at)).unwrap();
        assert_eq!((read(0), read(8), read(12)), (16, 1000 + head, 0));
        assert_eq!(read(16), 0x5555_5555, "it writes no more than the header");
        read(4) as i32
    }

    /// Does what a backend does with the request at `head`, as the one with this index among those that it used.
    fn use_up(&self, queue: usize, index: u16, head: u16) {
        let (ring, size) = (self.guest.rings(queue).used, self.guest.size(queue));
        let memory = &self.guest.ram.memory;
        let element = [u32::from(head), 16u32];
        memory.write_obj(element, GuestAddress(ring + 4 + 8 * u64::from(index % size))).unwrap();
        memory.write_obj(index.wrapping_add(1), GuestAddress(ring + 2)).unwrap();
    }

    /// Waits until a backend serves that was not the first.
    fn wait_until_it_serves_again(&mut self, times: u32) {
        let begun = Instant::now();
        while self.service.restarts() < times {
            self.guest.wait(10);
            assert!(begun.elapsed() < LONG, "{:?}", self.heard);
        }
        assert_eq!(self.heard.again.load(Ordering::Relaxed), times);
        assert!(self.service.serves());
    }
}

#[test]
fn requests_fail_with_their_backend_and_after_it() {
    for carrier in CARRIERS {
        let (mut backend, socket) = Backend::start(0, Lie::Nothing);
        let mut shared = shared(carrier, socket);
        shared.guest.start(0);
        shared.guest.run();
        // Two wait for an answer, one wants none, and one has its answer.
        for (head, room) in [(0, 64), (2, 16), (4, 0), (6, 64)] {
            shared.describe(1, head, room);
            shared.guest.send(1, head);
        }
        shared.use_up(1, 0, 2);
        backend.end();
        shared.wait_until_lost();
        let mut used = shared.guest.used(1);
        used.sort_unstable();
        assert_eq!(used, [(0, 16), (2, 16), (4, 0), (6, 16)]);
        for head in [0, 6] {
            assert_eq!(shared.error(head), -libc::EIO);
        }
        assert!(shared.guest.interrupts() > 0);
        for queue in 0..QUEUES {
            shared.describe(queue, 10, 64);
            shared.guest.send(queue, 10);
            assert_eq!(shared.guest.used(queue), [(10, 16)]);
            assert_eq!(shared.error(10), -libc::EIO);
        }
        // One without a header is none.
        shared.guest.describe(1, 12, BUFFERS, 8, 0, 0);
        shared.guest.send(1, 12);
        assert_eq!(shared.guest.used(1), [(12, 0)]);
        assert_eq!(shared.guest.status(), RUNNING);
    }
}

#[test]
fn the_next_backend_goes_on_behind_what_has_failed() {
    for carrier in CARRIERS {
        let (mut first, socket) = Backend::start(0, Lie::Nothing);
        let (mut second, next) = spare(Lie::Nothing);
        let (third, last) = spare(Lie::Nothing);
        let mut shared = with_spares(carrier, socket, vec![next, last], true);
        shared.guest.start(0);
        shared.guest.run();
        assert_eq!(second.seen.lock().unwrap().requests.len(), 0, "it is told nothing yet");
        for head in [0, 2, 4] {
            shared.describe(1, head, 64);
            shared.guest.send(1, head);
        }
        first.end();
        shared.wait_until_it_serves_again(1);
        assert_eq!(shared.guest.used(1), [(0, 16), (2, 16), (4, 16)]);
        let seen = second.seen.lock().unwrap();
        let bases = seen.all(SET_VRING_BASE);
        assert_eq!(bases, [[0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 3, 0, 0, 0]]);
        assert_eq!(seen.all(SET_MEM_TABLE).len(), 1);
        drop(seen);
        // It has its own signals.
        shared.guest.interrupts();
        shared.describe(1, 6, 64);
        shared.guest.send(1, 6);
        assert_eq!(shared.guest.used(1), []);
        shared.use_up(1, 3, 6);
        second.call(1);
        assert!(shared.guest.wait(1000));
        assert_eq!((shared.guest.interrupts(), shared.guest.used(1)), (1, vec![(6, 16)]));
        // And so does the one after it, for a driver that comes while there is none.
        second.end();
        let begun = Instant::now();
        while shared.service.serves() {
            shared.guest.wait(10);
            assert!(begun.elapsed() < LONG);
        }
        shared.guest.start(0);
        shared.wait_until_it_serves_again(2);
        let seen = third.seen.lock().unwrap();
        assert_eq!(seen.all(SET_VRING_ENABLE).len(), QUEUES);
        assert!(seen.all(SET_VRING_BASE).iter().all(|base| base[4..] == [0; 4]));
        assert_eq!(shared.heard.lost.load(Ordering::Relaxed), 2);
    }
}

/// It is bounded, whatever they do: each is tried once.
#[test]
fn backends_that_fail_at_once_are_tried_once_each() {
    for lie in [Lie::Death, Lie::Silence, Lie::Value(0)] {
        let (mut first, socket) = Backend::start(0, Lie::Nothing);
        let ((_second, next), (_third, last)) = (spare(lie), spare(lie));
        let mut shared = with_spares(Carrier::Pci, socket, vec![next, last], true);
        shared.guest.start(0);
        shared.guest.run();
        first.end();
        let begun = Instant::now();
        while shared.heard.lost.load(Ordering::Relaxed) < 3 {
            shared.guest.wait(10);
            assert!(begun.elapsed() < LONG, "{lie:?}: {:?}", shared.heard);
        }
        shared.describe(1, 0, 64);
        shared.guest.send(1, 0);
        assert_eq!(shared.guest.used(1), [(0, 16)], "{lie:?}");
        assert_eq!((shared.service.serves(), shared.service.restarts()), (false, 0));
        assert!(!shared.guest.wait(3 * SOON.as_millis() as u32));
    }
}

/// Two at once would be at the guest's queues.
#[test]
fn nobody_comes_after_a_backend_that_can_not_be_ended() {
    let (mut first, socket) = Backend::start(0, Lie::Nothing);
    let (second, next) = spare(Lie::Nothing);
    let mut shared = with_spares(Carrier::Pci, socket, vec![next], false);
    shared.guest.start(0);
    shared.describe(1, 0, 64);
    shared.guest.send(1, 0);
    first.end();
    shared.wait_until_lost();
    assert!(!shared.guest.wait(3 * SOON.as_millis() as u32));
    assert_eq!(second.seen.lock().unwrap().requests.len(), 0);
    assert_eq!(shared.guest.used(1), []);
    shared.guest.notify(1);
    assert_eq!(shared.guest.status(), RUNNING | NEEDS_RESET);
}

/// A driver or a backend that writes nonsense into its ring harms itself alone.
#[test]
fn rings_that_make_no_sense_are_left_alone() {
    let wrong: [fn(&mut Shared); 4] = [
        |shared| shared.guest.set_available(1, 5000),
        |shared| shared.use_up(1, 700, 0),
        |shared| shared.use_up(1, 0, 1023),
        |shared| shared.use_up(1, 0, u16::MAX),
    ];
    for wrong in wrong {
        for calls in [false, true] {
            let (mut backend, socket) = Backend::start(0, Lie::Nothing);
            let mut shared = shared(Carrier::Mmio, socket);
            shared.guest.start(0);
            shared.describe(1, 0, 64);
            shared.guest.send(1, 0);
            wrong(&mut shared);
            if calls {
                backend.call(1);
                shared.guest.wait(1000);
            }
            backend.end();
            shared.wait_until_lost();
            shared.guest.notify(1);
            shared.guest.start(0);
            shared.describe(1, 0, 64);
            shared.guest.send(1, 0);
            assert_eq!(shared.guest.used(1), [(0, 16)]);
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The driver makes a request with one of its free heads, and notifies or not.
    Offer { which: usize, notify: bool },
    /// The backend answers one of those that it has, and says so or not.
    Use { which: usize, call: bool },
    /// The VM is paused for a moment.
    Pause,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (any::<usize>(), any::<bool>()).prop_map(|(which, notify)| Step::Offer { which, notify }),
        5 => (any::<usize>(), any::<bool>()).prop_map(|(which, call)| Step::Use { which, call }),
        1 => Just(Step::Pause),
    ];
    // At most as many between two signals as the smaller queue holds.
    proptest::collection::vec(step, 0..100)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Each request comes back once, whatever the order in which others had their answers.
    #[test]
    fn what_was_in_flight_fails_and_nothing_else(steps in steps(), queue in 0..QUEUES) {
        let (mut backend, socket) = Backend::start(0, Lie::Nothing);
        let mut shared = shared(Carrier::Mmio, socket);
        shared.guest.start(0);
        shared.guest.run();
        let mut free: Vec<u16> = (0..20).map(|head| 2 * head).collect();
        let (mut busy, mut used) = (Vec::new(), 0u16);
        for step in steps {
            match step {
                Step::Offer { which, notify } if !free.is_empty() => {
                    let head = free.remove(which % free.len());
                    shared.describe(queue, head, 64);
                    shared.guest.offer(queue, head);
                    if notify {
                        shared.guest.notify(queue);
                    }
                    busy.push(head);
                }
                Step::Use { which, call } if !busy.is_empty() => {
                    let head = busy.remove(which % busy.len());
                    shared.use_up(queue, used, head);
                    used = used.wrapping_add(1);
                    if call {
                        backend.call(queue as u64);
                        shared.guest.run();
                    }
                    free.push(head);
                }
                Step::Pause => {
                    shared.guest.transport().lock().unwrap().drain();
                    shared.guest.transport().lock().unwrap().resume();
                }
                _ => {}
            }
        }
        shared.guest.used(queue);
        backend.end();
        shared.wait_until_lost();
        let mut failed: Vec<u16> = shared.guest.used(queue).iter().map(|(head, _)| *head as u16).collect();
        for head in &failed {
            prop_assert_eq!(shared.error(u32::from(*head)), -libc::EIO);
        }
        failed.sort_unstable();
        busy.sort_unstable();
        prop_assert_eq!(failed, busy);
    }
}
